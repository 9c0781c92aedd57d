"""The shape of the package: what importing it loads, and names that would shadow other packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def in_a_fresh_process(code, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_neither_importing_it_nor_a_call_on_the_cpu_loads_what_is_not_needed():
    loaded = in_a_fresh_process(
        "import sys, fasttrain_kernels, torch; "
        "print(hasattr(torch.ops.fasttrain_native, 'cpu_isa')); "
        "others = ('triton', 'transformers', 'fasttrain'); "
        "print([m for m in others if m in sys.modules]); "
        "fasttrain_kernels.rms_norm(torch.ones(2, 4), torch.ones(4)); "
        "print([m for m in others if m in sys.modules])"
    )
    assert loaded.split("\n") == ["False", "[]", "[]"]


def tracked(pattern):
    found = [path.relative_to(ROOT) for path in ROOT.rglob(pattern)]
    return [p for p in found if not any(part.startswith(".") for part in p.parts)]


def test_no_folder_called_kernels_is_a_package():
    """Hugging Face's package `kernels` is imported unguarded by transformers: ours would win."""
    assert [p for p in tracked("__init__.py") if p.parent.name == "kernels"] == []


@pytest.mark.parametrize("folder", ["tests", "bench"])
def test_no_package_in_tests_and_bench(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_no_file_shadows_triton_or_torch():
    assert tracked("triton.py") + tracked("torch.py") == []


def test_transformers_still_loads_from_the_checkouts_root():
    pytest.importorskip("transformers")
    assert in_a_fresh_process("import transformers.modeling_utils; print('ok')") == "ok"


# What an op is made of, and what a backend of several files, or of several ops, adds.
EVERY_OP = {"__init__.py", "reference.py", "op.py", "self_test.py", "workload.py"}
BACKENDS = {
    "cpu_kernel.py",
    "triton_kernel.py",
    "cuda_kernel.py",
    "compile_provider.py",
    "liger_provider.py",
}
PARTS = {
    "grad_norm": {"native_norm.py"},
    "cross_entropy": {"native_rows.py", "triton_rows.py"},
    "linear_cross_entropy": {"arguments.py", "by_rows.py", "by_panels.py", "products.py"},
    "rope": {"table.py", "triton_heads.py"},
    "swiglu": {"glu.py"},
    "newton_schulz": {"forms.py"},
    "optimizer_step": {"step.py", "table.py", "random_bits.py", "codes.py", "native_step.py"},
    "packed_attention": {
        "arguments.py",
        "tiles.py",
        "triton_blocks.py",
        "triton_forward.py",
        "triton_backward.py",
        "providers.py",
        "sdpa_provider.py",
        "varlen_provider.py",
        "flash_attn_provider.py",
        "flex_provider.py",
    },
}


def test_every_op_has_the_same_files():
    ops = ROOT / "kernels" / "fasttrain_kernels" / "ops"
    for folder in (p for p in ops.iterdir() if p.is_dir() and p.name != "__pycache__"):
        names = {path.name for path in folder.glob("*.py")}
        assert names >= EVERY_OP, folder
        assert names - BACKENDS - PARTS.get(folder.name, set()) == EVERY_OP, folder
        assert (folder / "__init__.py").read_text() == ""
