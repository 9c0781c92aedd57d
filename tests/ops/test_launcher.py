"""A GPU machine on which Triton can't build its launcher: the table says so, nothing crashes."""

import sysconfig

import pytest
import torch
from fasttrain_kernels import UnsupportedKernel, choose, launcher

HOPPER = {"device": "cuda", "dtype": torch.bfloat16, "width": 4096}


@pytest.fixture(autouse=True)
def asked_again():
    launcher.why_not.cache_clear()
    yield
    launcher.why_not.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """This machine as one with an H200, as far as the choice of a backend asks."""
    pytest.importorskip("triton")
    monkeypatch.delenv("FASTTRAIN_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launcher, "_capability", lambda device: (9, 0))


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH of its own, and the function that puts a program there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def install(name):
        (tmp_path / name).touch(mode=0o755)

    return install


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """A folder that Python takes for that of its headers, with Python.h in it."""
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(folder))
    return folder


def test_no_compiler_is_a_reason_and_never_a_crash(gpu, as_if_proven, tools):
    row = choose("rms_norm", **HOPPER)
    assert row.backend == "eager"
    assert row.rejected[0].backend == "triton"
    assert row.rejected[0].reason == (
        "Triton builds its launcher with a C compiler, and there is no gcc or clang on PATH"
    )
    for asked in ({"requested": "triton"}, {"mode": "strict"}):
        with pytest.raises(UnsupportedKernel, match="there is no gcc or clang on PATH"):
            choose("rms_norm", **HOPPER, **asked)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_compiler_and_headers_are_enough(gpu, as_if_proven, tools, headers, compiler):
    tools(compiler)
    assert choose("rms_norm", **HOPPER).backend == "triton"


def test_cc_is_the_only_compiler_that_counts_where_it_is_set(tools, headers, monkeypatch):
    tools("gcc")
    monkeypatch.setenv("CC", "icx")
    assert launcher.why_not().endswith("there is no CC='icx'")
    tools("icx")
    launcher.why_not.cache_clear()
    assert launcher.why_not() is None


def test_no_headers_are_a_reason(tools, headers):
    tools("gcc")
    (headers / "Python.h").unlink()
    assert f"there is no Python.h in {headers}" in launcher.why_not()


def test_it_is_asked_once(tools, headers):
    assert launcher.why_not() is not None
    tools("gcc")
    assert launcher.why_not() is not None
