"""How many steps Muon and AdamW take to the same loss, each at the best of three learning rates.

    python bench/train/prepare.py && python bench/train/optimizers.py
    python bench/train/optimizers.py configs/quickstart.yaml --steps 150

The recipe, by default this folder's, is trained with a constant rate after a warm-up. The best
rate of each optimizer is the one of the lowest loss at the end with the first seed; there, two more
seeds draw another order, and other weights where they are random. The loss to be reached is AdamW's
at the end, over the seeds. Losses are means of ten steps. Writes a section into
bench/results/<device>/train.json.
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
from workload import ROOT

sys.path.insert(0, str(ROOT))
import torch
from fasttrain_kernels.fingerprint import device_name, slug

import fasttrain
from bench.harness import machine

OPTIMIZERS = ("adamw", "muon")
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (1, 2, 3)
WINDOW = 10  # steps that a loss is the mean of


def losses_of(recipe: str, steps: int, name: str, rate: float, seed: int) -> list[float]:
    """The loss of every step of one run."""
    with TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        values = {
            "extends": str(Path(recipe).resolve()),
            "seed": seed,
            "optimizer": {
                "type": name,
                "learning_rate": rate,
                "weight_decay": 0.1,
                "betas": [0.9, 0.95],
            },
            "scheduler": {"type": "constant", "warmup_ratio": 0.05},
            "max_steps": steps,
            "logging": {"every_steps": 1},
            "checkpoint": [],
            "callbacks": [],
            "eval": {"at_start": False, "every_steps": None},
            "resume": "never",
            "output_dir": f"{folder}/run",
        }
        config.write_text(json.dumps(values))
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


def train(recipe: str, steps: int) -> dict[str, dict[float, list[list[float]]]]:
    """Losses by optimizer, rate and seed: of the best rate of each with every seed."""
    runs: dict[str, dict[float, list[list[float]]]] = {}
    for name in OPTIMIZERS:
        first = {rate: [losses_of(recipe, steps, name, rate, SEEDS[0])] for rate in RATES}
        best = best_rate(first)
        first[best] += [losses_of(recipe, steps, name, best, seed) for seed in SEEDS[1:]]
        runs[name] = first
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
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "bench/train/fasttrain.yaml"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    before = machine("cpu")
    found = {"machine": before, "recipe": Path(given.recipe).name, "steps": given.steps}
    found |= {"seeds": SEEDS, **summary(train(given.recipe, given.steps))}
    path = ROOT / "bench" / "results" / slug(device_name("cpu")) / "train.json"
    write_section(path, f"optimizers ({found['recipe']})", found)
    print(json.dumps({key: value for key, value in found.items() if key != "curves"}, indent=1))


if __name__ == "__main__":
    main()
