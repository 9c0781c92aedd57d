"""`fasttrain kernels list`"""

import pytest
import torch

from fasttrain.cli import app
from fasttrain.cli.kernels import kernel_rows
from fasttrain.runtime import log


@pytest.fixture(autouse=True)
def fresh_output(monkeypatch):
    monkeypatch.setattr(log, "_output", None)
    monkeypatch.delenv("FASTTRAIN_KERNELS", raising=False)


def test_every_backend_of_every_op_is_a_row_with_a_reason_where_it_cannot_serve():
    from fasttrain_kernels.dispatch import OPS

    rows = kernel_rows(torch.device("cpu"), torch.float32)
    assert [row[:2] for row in rows] == [
        (name, candidate.name) for name, op in sorted(OPS.items()) for candidate in op.candidates
    ]
    assert all(why for _, _, usable, why in rows if usable == "no")
    chosen = [op for op, _, usable, why in rows if why == "chosen by auto" and usable == "yes"]
    assert chosen == sorted(OPS)
    assert ("rms_norm", "triton", "no", "made for cuda") in rows


def test_the_table_is_printed(capsys):
    assert app.exit_code(["kernels", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("in order of preference:")
    assert lines[1].split() == ["op", "backend", "usable", "why"]
    assert any(line.split()[:3] == ["rms_norm", "eager", "yes"] for line in lines)


@pytest.mark.parametrize("asked", ["rms_norm=magic", "rms_morn=cpu", "mode"])
def test_a_faulty_environment_variable_is_the_users_mistake(asked, monkeypatch, capsys):
    monkeypatch.setenv("FASTTRAIN_KERNELS", asked)
    assert app.exit_code(["kernels", "list"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: error: environment: ") and error.count("\n") == 1
