"""The contender: TRL's SFTTrainer, from .bench-peers/trl.

It renders, masks (`assistant_only_loss`), tokenises and packs the chats itself. `padded` is its
plain form, `packed` its packing by best-fit decreasing; a pack has the tokens of a padded batch.
Without flash-attention it keeps packed documents apart by a block-diagonal mask.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from instruments import Miniature
from measure import read_job
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from with_trainer import train, training_arguments


class MiniatureSFTTrainer(Miniature, SFTTrainer):
    """SFTTrainer on an epoch in miniature."""


def main() -> None:
    job = read_job(("padded", "packed"))
    settings = training_arguments(job)
    if job.variant == "packed":
        settings |= {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    trainer = MiniatureSFTTrainer(
        model=model,
        args=SFTConfig(**settings, assistant_only_loss=True, max_length=job.workload.pack_tokens),
        train_dataset=Dataset.from_list(job.rows()),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    train(trainer, job)


if __name__ == "__main__":
    main()
