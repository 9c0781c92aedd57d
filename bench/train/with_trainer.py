"""The contender: transformers' own Trainer, set up as its users do for supervised fine-tuning.

Rows are tokenised beforehand, prompts labelled -100, and each batch is padded to its longest row by
`DataCollatorForSeq2Seq`. `padded` draws rows at random; `grouped` puts rows of like length together
(`group_by_length`). A measurement sees few batches of the epoch, so they are chosen to stand for
all of them: the first ones would not do, since `group_by_length` begins with the longest rows.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from instruments import CountingCollator, Miniature, StopwatchCallback
from measure import IGNORED_LABEL, Job, Stopwatch, read_job, report, throughput
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)


class MiniatureTrainer(Miniature, Trainer):
    """transformers' Trainer on an epoch in miniature."""


def tokenised(job: Job, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Every chat as `input_ids` and `labels`; what the assistant wrote is supervised."""
    rows = []
    for row in job.rows():
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = encoded["input_ids"]
        assert len(ids) <= job.workload.pack_tokens, "no chat is longer than the sequence limit"
        learnt = encoded["assistant_masks"]
        labels = [t if m else IGNORED_LABEL for t, m in zip(ids, learnt, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(rows)


def training_arguments(job: Job) -> dict[str, Any]:
    """What fasttrain.yaml says, in transformers' words."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(job.output),
        "max_steps": job.workload.total_steps,
        "per_device_train_batch_size": job.workload.rows,
        "optim": "adamw_torch_fused",
        "learning_rate": job.workload.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "seed": job.seed,
        "logging_steps": job.workload.warmup,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def train(trainer: Any, job: Job) -> None:
    """Measure any trainer of the family: put the instruments in, train, report."""
    watch = Stopwatch(job.workload.warmup)
    trainer.data_collator = collator = CountingCollator(trainer.data_collator)
    trainer.add_callback(StopwatchCallback(watch))
    trainer.job = job
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    report(
        **throughput(collator.counts, watch),
        first_loss=losses[0],
        final_loss=losses[-1],
    )


def main() -> None:
    job = read_job(("padded", "grouped"))
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    strategy = {"padded": "random", "grouped": "group_by_length"}[job.variant]
    trainer = MiniatureTrainer(
        model=model,
        args=TrainingArguments(**training_arguments(job), train_sampling_strategy=strategy),
        train_dataset=tokenised(job, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    train(trainer, job)


if __name__ == "__main__":
    main()
