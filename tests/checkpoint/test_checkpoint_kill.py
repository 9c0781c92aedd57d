"""SIGKILL at any moment leaves a complete checkpoint, and never loses one that was complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_process_killed_while_it_saves_loses_nothing(tmp_path):
    script = Path(__file__).with_name("kill_loop.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "25", "1"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kills, dirty, steps = map(int, re.findall(r"\d+", done.stdout))
    # Otherwise the kills missed what they are to hit.
    assert kills == 25 and dirty >= 1 and steps >= 1, done.stdout
