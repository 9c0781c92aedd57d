"""Who may import whom. Lazy imports count: a cycle that only they hide is still a cycle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = (
    *("trainers", "tokenizer", "data", "model", "optimizer", "scheduler"),
    *("checkpoint", "callbacks", "engine"),
)
# Vendors, and the only places that know them.
VENDORS = {
    "transformers": ("fasttrain.model", "fasttrain.tokenizer"),
    "schedulefree": ("fasttrain.optimizer.schedule_free",),
    "torchao": ("fasttrain.optimizer.torchao_adamw",),
    "bitsandbytes": ("fasttrain.optimizer.bitsandbytes_adamw",),
    "peft": ("fasttrain.model.transforms.lora",),
    "datasets": ("fasttrain.data",),
    "deepspeed": ("fasttrain.engine.deepspeed", "fasttrain.launch"),
    "fasttrain_kernels": (
        "fasttrain.model",
        "fasttrain.optimizer",
        "fasttrain.data.collate",
        "fasttrain.callbacks.kernel_selection",
        "fasttrain.callbacks.canary",
        "fasttrain.cli.kernels",
    ),
}
BLOCK_MAY_IMPORT = (
    "fasttrain.core.interfaces",
    "fasttrain.core.engine_interface",
    "fasttrain.core.checkpoint_interface",
    "fasttrain.core.batch",
    "fasttrain.core.kernel_plan",
    "fasttrain.core.data_report",
    "fasttrain.core.events",
    "fasttrain.core.run",
    "fasttrain.config",
    "fasttrain.components",
    "fasttrain.runtime",
)


def modules() -> dict[str, Path]:
    found = {}
    for package_root in (ROOT, ROOT / "kernels"):
        package = "fasttrain" if package_root == ROOT else "fasttrain_kernels"
        for path in sorted((package_root / package).rglob("*.py")):
            name = ".".join(path.relative_to(package_root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def type_checking_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines |= {child.lineno for child in ast.walk(node) if hasattr(child, "lineno")}
    return lines


def imports(name: str, *, typing_too: bool = True) -> set[str]:
    """Every module that `name` imports, lazily or not; `from package import module` resolved."""
    tree = ast.parse(MODULES[name].read_text())
    skipped = set() if typing_too else type_checking_lines(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node.lineno not in skipped:
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.lineno not in skipped:
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return found


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("name", MODULES)
def test_a_vendor_is_known_in_its_room_only(name):
    for imported in imports(name):
        vendor = imported.partition(".")[0]
        if vendor in VENDORS and not name.startswith("fasttrain_kernels"):
            assert within(name, VENDORS[vendor]), f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("fasttrain_kernels")])
def test_the_kernels_know_neither_the_trainer_nor_transformers(name):
    for imported in imports(name):
        assert not within(imported, ("fasttrain", "transformers")), f"{name} imports {imported}"


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_imports_interfaces_and_no_other_block(block):
    for name in MODULES:
        if not within(name, (f"fasttrain.{block}",)):
            continue
        allowed = (f"fasttrain.{block}", *BLOCK_MAY_IMPORT)
        if block == "trainers":
            allowed += ("fasttrain.core.trainer",)
        if name in (
            "fasttrain.callbacks.kernel_selection",
            "fasttrain.callbacks.optimizer_sites",
        ):
            allowed += ("fasttrain.model.transforms",)
        for imported in imports(name):
            if within(imported, ("fasttrain",)) and imported != "fasttrain":  # the version
                assert within(imported, allowed), f"{name} imports {imported}"


def test_the_core_names_no_block():
    for name in MODULES:
        if within(name, ("fasttrain.core",)):
            for imported in imports(name):
                blocks = tuple(f"fasttrain.{block}" for block in (*BLOCKS, "cli"))
                assert not within(imported, blocks), f"{name} imports {imported}"


@pytest.mark.parametrize("package", ["fasttrain.config", "fasttrain.components"])
def test_the_config_is_light(package):
    heavy = ("torch", "transformers", "datasets", "numpy", "peft", "triton")
    for name in MODULES:
        if within(name, (package,)):
            for imported in imports(name):
                assert not within(imported, heavy), f"{name} imports {imported}"
                if within(imported, ("fasttrain",)):
                    ours = ("fasttrain.config", "fasttrain.components")
                    assert within(imported, ours), f"{name} imports {imported}"


def test_the_runtime_is_made_of_leaves():
    for name in MODULES:
        if within(name, ("fasttrain.runtime",)):
            for imported in imports(name):
                if within(imported, ("fasttrain",)):
                    assert within(imported, ("fasttrain.runtime",)), f"{name} imports {imported}"


def test_there_is_no_cycle():
    graph = {
        name: {module for module in imports(name, typing_too=False) if module in MODULES} - {name}
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
