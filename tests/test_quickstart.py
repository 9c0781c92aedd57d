"""The quick start, cut short: it learns, shows what, and leaves a model others can load."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STEPS = 120  # of 450, which reach 1.58: fewer must reach the margin, too
MARGIN = 0.5  # nats per token below a unigram model of the training tokens


def fasttrain(*arguments):
    command = [sys.executable, "-m", "fasttrain", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_quick_start_learns_what_a_unigram_model_cannot(tmp_path):
    run = tmp_path / "run"
    options = [f"output_dir={run}", f"data.cache_dir={tmp_path / 'cache'}", f"max_steps={STEPS}"]
    screen = fasttrain("run", CONFIG, *options)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    unigram = float(re.search(r"a unigram model's held-out loss is ([\d.]+)", screen)[1])
    assert held_out[-1] < unigram - MARGIN
    told = float(re.search(r"held-out loss is ([\d.]+) nat below a unigram model's", screen)[1])
    assert told == pytest.approx(unigram - held_out[-1], abs=1e-3)  # three digits are printed
    # Samples before and after, and whole modules held out.
    assert screen.count("before") >= 3 and screen.count("now") >= 3
    assert "rows grouped by column group" in screen
    assert (run / "loss.png").stat().st_size > 0
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert 1e6 < model.num_parameters() < 1e7
    assert fasttrain("generate", run, "What does `os.getcwd()` do?").strip()
