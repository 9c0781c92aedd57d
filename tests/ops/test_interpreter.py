"""Runs the op tests on Triton's interpreter, in a process of its own.

Triton decides when it is imported whether kernels are interpreted, and the compile gate needs them
uninterpreted in this one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_op_tests_pass_in_the_interpreter():
    pytest.importorskip("triton")
    options = ["-q", "-p", "no:cacheprovider", "-k", "triton-interpreted", str(HERE)]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed and int(passed[1]) >= 300, child.stdout
