"""How many steps Muon and AdamW take to the same loss, each at the best of three learning rates.

    python bench/train/prepare.py
    python bench/train/optimizers.py        # half an hour on one core of an EPYC

The model of this folder's comparison from random weights, and its chats, in packs of 512 tokens.
The best rate of each is the one of the lowest loss at the end with the first seed; there, two more
seeds draw other weights and another order. The loss to be reached is AdamW's at the end, over the
seeds. Losses are means of ten steps. Writes `optimizers` into bench/results/<device>/train.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from results import write_section
from workload import ROOT, WORK

sys.path.insert(0, str(ROOT))
import torch
from fasttrain_kernels.fingerprint import slug
from transformers import AutoConfig

import fasttrain
from bench.harness import machine

OPTIMIZERS = {
    "adamw": {"betas": [0.9, 0.95]},
    "muon": {"betas": [0.9, 0.95]},
}
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (1, 2, 3)
STEPS = 60
WINDOW = 10  # steps that a loss is the mean of
# What a model's file says of itself beside its shape.
NOT_SHAPE = ("architectures", "model_type", "dtype", "transformers_version", "_name_or_path")


def recipe(name: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """The config of one run."""
    made = WORK / "cpu"
    shape = AutoConfig.from_pretrained(made / "model").to_diff_dict()
    return {
        "type": "sft",
        "seed": seed,
        "model": {
            "type": "random",
            "architecture": "llama",
            "config": {key: value for key, value in shape.items() if key not in NOT_SHAPE},
        },
        "tokenizer": {"type": "huggingface", "name_or_path": str(made / "model")},
        "data": {"sources": [str(made / "chats.jsonl")], "max_length": 512},
        "optimizer": {
            "type": name,
            "learning_rate": rate,
            "weight_decay": 0.1,
            **OPTIMIZERS[name],
        },
        "scheduler": {"type": "constant", "warmup_steps": 5},
        "max_steps": STEPS,
        "logging": {"every_steps": 1},
        "checkpoint": [],
        "resume": "never",
        "output_dir": str(folder / "run"),
    }


def losses_of(name: str, rate: float, seed: int) -> list[float]:
    """The loss of every step of one run."""
    with TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(json.dumps(recipe(name, rate, seed, Path(folder))))
        fasttrain.run(str(config))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def smoothed(losses: list[float]) -> list[float]:
    """Means of WINDOW steps, each at its last one."""
    return [
        statistics.fmean(losses[max(0, end - WINDOW) : end]) for end in range(1, len(losses) + 1)
    ]


def mean_curve(curves: list[list[float]]) -> list[float]:
    """Over the seeds."""
    return [statistics.fmean(step) for step in zip(*map(smoothed, curves), strict=True)]


def steps_to(curve: list[float], target: float) -> int | None:
    """The first step whose loss is `target` or less."""
    return next((step for step, loss in enumerate(curve, 1) if loss <= target), None)


def train() -> dict[str, dict[float, list[list[float]]]]:
    """Losses by optimizer, rate and seed: of the best rate of each with every seed."""
    runs: dict[str, dict[float, list[list[float]]]] = {}
    for name in OPTIMIZERS:
        runs[name] = {rate: [losses_of(name, rate, SEEDS[0])] for rate in RATES}
        best = best_rate(runs[name])
        runs[name][best] += [losses_of(name, best, seed) for seed in SEEDS[1:]]
    return runs


def best_rate(by_rate: dict[float, list[list[float]]]) -> float:
    return min(by_rate, key=lambda rate: smoothed(by_rate[rate][0])[-1])


def summary(runs: dict[str, dict[float, list[list[float]]]]) -> dict[str, Any]:
    """Best rates, and steps to AdamW's last loss: of the mean curve, and of each seed by itself."""
    best = {name: best_rate(by_rate) for name, by_rate in runs.items()}
    curves = {name: mean_curve(runs[name][best[name]]) for name in runs}
    target = curves["adamw"][-1]
    pairs = zip(runs["muon"][best["muon"]], runs["adamw"][best["adamw"]], strict=True)
    return {
        "best_rate": best,
        "last_loss_of_first_seed": {
            name: {str(rate): round(smoothed(c[0])[-1], 4) for rate, c in by_rate.items()}
            for name, by_rate in runs.items()
        },
        "last_loss": {name: round(curve[-1], 4) for name, curve in curves.items()},
        "steps_to_adamws_last_loss": {
            name: steps_to(curve, target) for name, curve in curves.items()
        },
        "muon_steps_by_seed": [
            steps_to(smoothed(ours), smoothed(theirs)[-1]) for ours, theirs in pairs
        ],
        "curves": {name: [round(loss, 4) for loss in curve] for name, curve in curves.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    found = {"machine": machine("cpu"), "steps": STEPS, "seeds": SEEDS, **summary(train())}
    path = ROOT / "bench" / "results" / slug("cpu") / "train.json"
    write_section(path, "optimizers", found)
    print(json.dumps({key: value for key, value in found.items() if key != "curves"}, indent=1))


if __name__ == "__main__":
    main()
