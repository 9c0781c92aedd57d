"""The contenders that live in environments of their own: TRL and ArcticTraining.

`trl` and `trl-packed` are SFTTrainer on the same chats, `assistant_only_loss`, without and with
`packing` (bfd). They differ from our settings where they must: see README.md.
"""

from __future__ import annotations

import torch
from measure import Job, read_job


def run_trl(job: Job) -> None:
    """TRL's SFTTrainer. It renders, masks, tokenises and packs the chats itself."""
    from datasets import Dataset
    from instruments import Miniature
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from with_trainer import train, training_arguments

    class MiniatureSFTTrainer(Miniature, SFTTrainer):
        """SFTTrainer on an epoch in miniature."""

    settings = training_arguments(job)
    if job.variant == "trl-packed":
        # One pack has the tokens of a padded batch.
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
    run_trl(read_job(("trl", "trl-packed", "arctic-packed")))
