"""The contender: ArcticTraining's SFT trainer, from .bench-peers/arctic; one process, ZeRO 0.

run.py gives it the variables of a process group of one. Its masks come from searching the rendered
text, so that it supervises slightly other tokens than the rest; its packs are filled in order and
padded to multiples of 256.
"""

# No postponed annotations here: ArcticTraining reads its subclasses' types.
from typing import Any

import deepspeed
import torch
from arctic_trainer import MeasuredSFTTrainer
from arctic_training import get_config
from datasets import Dataset
from measure import Job, Stopwatch, read_job, report, throughput


def settings(job: Job) -> dict[str, Any]:
    """What fasttrain.yaml says, in ArcticTraining's words. Its data must be saved by `datasets`."""
    rows = str(job.output / "rows")
    Dataset.from_list(job.rows()).save_to_disk(rows)
    cuda = torch.cuda.is_available()
    return {
        "type": "measured_sft",
        "micro_batch_size": 1,
        "epochs": 1,
        "exit_iteration": job.workload.total_steps,
        "seed": job.seed,
        "model": {
            "name_or_path": job.model,
            # It has no autocast: on a GPU DeepSpeed keeps bf16 weights and fp32 masters.
            "dtype": "bf16" if cuda else "fp32",
            "attn_implementation": "sdpa",
            "disable_activation_checkpoint": True,
        },
        "data": {
            "sources": [
                {
                    "type": "huggingface_instruct",
                    "name_or_path": rows,
                    "role_mapping": {
                        role: f"messages.role.{role}" for role in ("user", "assistant")
                    },
                }
            ],
            "max_length": job.workload.pack_tokens,
            "pack_samples": True,
            "num_proc": 1,
            "dl_num_workers": 1,
            "seed": job.seed,
            "cache_dir": str(job.output / "cache"),
        },
        "optimizer": {
            "type": "torch_adamw",
            "learning_rate": job.workload.learning_rate,
            "weight_decay": 0.0,
        },
        "scheduler": {"name": "constant", "warmup_ratio": 0.0},
        "deepspeed": {"zero_optimization": {"stage": 0}, "gradient_clipping": 1.0},
        # Its summary after every step collects garbage and reads memory counters: left out.
        "train_log_iter_interval": 0,
        "train_log_metrics_path": str(job.output / "metrics.jsonl"),
    }


def main() -> None:
    job = read_job(("packed",))
    # On a CPU this op would be compiled at every first start, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    trainer = MeasuredSFTTrainer(get_config(settings(job)))
    trainer.watch = Stopwatch(job.workload.warmup)
    trainer.counts, trainer.losses = [], []
    trainer.train()
    losses = [trainer.losses[0].item(), trainer.losses[-1].item()]
    report(**throughput(trainer.counts, trainer.watch), first_loss=losses[0], final_loss=losses[1])


if __name__ == "__main__":
    main()
