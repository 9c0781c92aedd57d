"""Whether fasttrain trains on the same tokens as plain transformers, and computes the same loss.

Takes the documents of a fasttrain run's first step. Each must be one of the chats as transformers
renders it, with the same tokens supervised; and their loss, computed document by document with
transformers' eager attention, must be what the run reported.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from measure import IGNORED_LABEL, Job, read_job, report
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def rendered_chats(job: Job) -> dict[tuple[int, ...], list[int]]:
    """Ids of every chat, and each position's target: the next token if the assistant wrote it."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    chats = {}
    for row in job.rows():
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learnt = encoded["input_ids"], encoded["assistant_masks"]
        following = zip(ids[1:], learnt[1:], strict=True)
        targets = [t if m else IGNORED_LABEL for t, m in following] + [IGNORED_LABEL]
        chats[tuple(ids)] = targets
    return chats


def check_documents(documents: list[dict[str, list[int]]], job: Job) -> None:
    """ValueError unless every document is one of the chats, supervised where transformers says."""
    chats = rendered_chats(job)
    for number, document in enumerate(documents):
        targets = chats.get(tuple(document["input_ids"]))
        if targets is None:
            raise ValueError(f"document {number} of the first step is none of the chats")
        if targets != document["targets"]:
            raise ValueError(f"document {number} of the first step is supervised elsewhere")


@torch.no_grad()
def loss_of(documents: list[dict[str, list[int]]], job: Job) -> float:
    """Mean cross-entropy over all supervised tokens, in nats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="eager"
    ).to(device)
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([document["input_ids"]], device=device)
        targets = torch.tensor(document["targets"], device=device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids).logits[0]
        total += cross_entropy(
            logits.double(), targets, ignore_index=IGNORED_LABEL, reduction="sum"
        ).item()
        count += int((targets != IGNORED_LABEL).sum())
    return total / count


def main() -> None:
    job = read_job(("auto", "logits", "eager"))
    first = json.loads((job.output / "first_step.json").read_text())
    check_documents(first["documents"], job)
    reference = loss_of(first["documents"], job)
    # bf16 keeps 8 bits of each activation; a mean over thousands of tokens is better than that.
    tolerance = 2e-3 if torch.cuda.is_available() else 1e-4
    difference = abs(first["loss"] - reference) / reference
    report(
        documents=len(first["documents"]),
        loss=first["loss"],
        reference_loss=reference,
        relative_difference=difference,
        tolerance=tolerance,
        equal=difference <= tolerance,
    )


if __name__ == "__main__":
    main()
