"""Makes what every contender reads: tokenizer, chats, and a model with random weights.

Prints one JSON line: where it lies, and what machine and environment this is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from chat_data import make_chats, stdlib_modules
from measure import versions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from workload import ROOT, WORK, WORKLOADS, Workload

sys.path.insert(0, str(ROOT))
from fasttrain_kernels.fingerprint import slug

from bench import harness

SEED = 0
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
# The generation markers tell trainers that ask for them which tokens the assistant wrote.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(modules: Iterable[tuple[str, str]], vocab: int) -> Tokenizer:
    """A byte-level BPE of the standard library's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source for _, source in modules), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """As transformers reads it, in version 4 too."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    # transformers 5 writes the name of a class that transformers 4 does not know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def save_model(workload: Workload, folder: Path) -> int:
    """Random weights, fp32. Returns the number of parameters."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=workload.vocab,
        hidden_size=workload.hidden,
        intermediate_size=workload.intermediate,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make(workload: Workload, folder: Path, key: str) -> None:
    """Write everything; `key` last, so that a half-made folder is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key").unlink(missing_ok=True)
    modules = stdlib_modules()
    tokenizer = train_tokenizer(modules, workload.vocab)
    save_tokenizer(tokenizer, folder / "model")
    parameters = save_model(workload, folder / "model")
    chats = list(
        make_chats(
            workload.chats,
            modules,
            lambda text: tokenizer.encode(text).offsets,
            scale=workload.length_scale,
            seed=SEED,
        )
    )
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (folder / "chats.jsonl").write_text(rows, encoding="utf-8")
    profile = profile_of(chats, AutoTokenizer.from_pretrained(folder / "model"))
    mean = profile["tokens"] / profile["chats"]
    pack_tokens = max(64 * round(workload.rows * mean / 64), profile["lengths"]["max"])
    replace(workload, pack_tokens=pack_tokens).save(folder)
    profile["sha256"] = hashlib.sha256(rows.encode()).hexdigest()
    profile["parameters"] = parameters
    (folder / "profile.json").write_text(json.dumps(profile, indent=2) + "\n")
    (folder / "key").write_text(key)


def profile_of(
    chats: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The lengths as every contender will see them."""
    rendered = [
        tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        for chat in chats
    ]
    lengths = sorted(len(row["input_ids"]) for row in rendered)
    cuts = statistics.quantiles(lengths, n=100, method="inclusive")
    return {
        "chats": len(chats),
        "tokens": sum(lengths),
        "supervised_tokens": sum(sum(row["assistant_masks"]) for row in rendered),
        "lengths": {
            "p10": cuts[9],
            "p50": cuts[49],
            "p90": cuts[89],
            "p99": cuts[98],
            "max": lengths[-1],
        },
    }


def environment() -> dict[str, Any]:
    """Exact versions, and the machine as the kernels' benchmarks describe it."""
    machine = harness.machine("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "commit": _commit(),
        "device_slug": slug(str(machine["device"])),
        "machine": {
            **machine,
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
            "platform": platform.platform(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=["auto", *WORKLOADS], default="auto")
    parser.add_argument("--steps", type=int, help="optimizer steps to measure")
    parser.add_argument("--work", type=Path, default=WORK, help="where to make it")
    arguments = parser.parse_args()
    name = arguments.workload
    if name == "auto":
        name = "gpu" if torch.cuda.is_available() else "cpu"
    workload = WORKLOADS[name]
    if arguments.steps is not None:
        workload = replace(workload, steps=arguments.steps)
    folder = arguments.work / name
    sources = b"".join(
        Path(__file__).with_name(file).read_bytes() for file in ("prepare.py", "chat_data.py")
    )
    described = json.dumps([asdict(workload), platform.python_version()])
    key = hashlib.sha256(described.encode() + sources).hexdigest()
    if not (folder / "key").is_file() or (folder / "key").read_text() != key:
        make(workload, folder, key)
    profile = json.loads((folder / "profile.json").read_text())
    made = asdict(Workload.load(folder))
    print(json.dumps({"folder": str(folder), "workload": made, "data": profile, **environment()}))


if __name__ == "__main__":
    main()
