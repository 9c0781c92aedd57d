"""Components of the user, by `imports:` and by `module:Class`."""

import sys

import pytest

from fasttrain.config.registry import CALLBACKS, OPTIMIZERS, TRAINERS

CODE = """\
from __future__ import annotations

from fasttrain.config.registry import OPTIMIZERS, TRAINERS
from fasttrain.config.schema.base import PositiveFloat
from fasttrain.config.schema.optimizer import OptimizerSection
from fasttrain.config.schema.trainer import SFTConfig


class MineConfig(OptimizerSection):
    momentum: PositiveFloat = {momentum}
    \"\"\"Share of the last step that is kept.\"\"\"


@OPTIMIZERS.register("mine")
class Mine:
    Config = MineConfig


@TRAINERS.register("weighted")
class Weighted:
    Config = SFTConfig  # inherited, as by a subclass of the built-in


@TRAINERS.register("plain")
class Plain:
    pass
"""


@pytest.fixture
def my_code(write):
    return write("my_code.py", CODE.format(momentum=0.9))


def test_a_file_registers_components(my_code, config_of):
    path_before = list(sys.path)
    loaded = config_of("imports: [./my_code.py]\noptimizer: {type: mine, momentum: 80%}\n")
    assert (loaded.config.optimizer.type, loaded.config.optimizer.momentum) == ("mine", 0.8)
    assert OPTIMIZERS.component("mine").__name__ == "Mine"
    assert [str(imported) for imported in loaded.imports] == [str(loaded.config.imports[0])]
    assert loaded.config.imports[0].endswith("/my_code.py")
    assert sys.path == path_before


def test_a_class_may_inherit_a_built_ins_options_or_have_none(my_code, config_of):
    for name in ("weighted", "plain"):
        config = config_of(f"imports: ./my_code.py\ntype: {name}\n").config
        assert config.type == config.trainer.type == name
        assert TRAINERS.config(name) is not None


def test_imports_are_relative_to_the_file_that_names_them(write, config_of):
    write("recipes/my_code.py", CODE.format(momentum=0.9))
    write("recipes/base.yaml", "imports: [./my_code.py]\n")
    loaded = config_of("extends: recipes/base.yaml\noptimizer: mine\nimports: [json]\n")
    assert loaded.config.optimizer.type == "mine"
    assert [imported.name.rpartition("/")[2] for imported in loaded.imports] == [
        "my_code.py",
        "json",
    ]


def test_two_configs_in_one_process_do_not_meet(write, config_of, problems_of):
    write("a/my_code.py", CODE.format(momentum=0.5))
    write("b/my_code.py", CODE.format(momentum=0.7))
    for _ in range(2):
        for directory, momentum in (("a", 0.5), ("b", 0.7)):
            config = config_of(f"imports: [{directory}/my_code.py]\noptimizer: mine\n").config
            assert config.optimizer.momentum == momentum
    (problem,) = problems_of("optimizer: mine\n")
    assert problem.startswith("sft.yaml:4: optimizer.type: unknown optimizer type (got 'mine', ")


def test_changed_code_is_read_again(write, config_of):
    for momentum in (0.1, 0.25):
        write("my_code.py", CODE.format(momentum=momentum) + "#" * int(momentum * 100))
        config = config_of("imports: [./my_code.py]\noptimizer: mine\n").config
        assert config.optimizer.momentum == momentum


def test_a_class_by_module_needs_no_registering(write, config_of, workspace, monkeypatch):
    write(
        "lookers.py",
        "from fasttrain.config.schema.callback import CallbackSection\n"
        "class Looker:\n"
        "    class Config(CallbackSection):\n"
        "        size: int = 3\n"
        "class Bare:\n"
        "    Config = None\n",
    )
    monkeypatch.syspath_prepend(str(workspace))
    text = "callbacks: [{type: 'lookers:Looker', size: 5}, 'lookers:Bare']\n"
    looker, bare = config_of(text).config.callbacks
    assert (looker.type, looker.size) == ("lookers:Looker", 5)
    assert bare.type == "lookers:Bare"
    assert CALLBACKS.component(looker.type).__name__ == "Looker"


def test_a_component_registered_in_python_stays(config_of):
    from fasttrain.config.schema.callback import CallbackSection

    @CALLBACKS.register("test_config_imports_callback")
    class Here:
        Config = CallbackSection

    try:
        for _ in range(2):
            config = config_of("callbacks: [test_config_imports_callback]\n").config
            assert config.callbacks[0].type == "test_config_imports_callback"
        assert CALLBACKS.component("test_config_imports_callback") is Here
    finally:
        CALLBACKS.forget(__name__)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "x = 1\nraise RuntimeError('no luck')\n",
            "importing it failed: RuntimeError: no luck (my_code.py:2).",
        ),
        ("def f(:\n", "importing it failed: SyntaxError: invalid syntax (my_code.py:1)."),
        (
            "import no_such_module_here\n",
            "importing it failed: ModuleNotFoundError: No module named 'no_such_module_here' "
            "(my_code.py:1).",
        ),
        (
            "from fasttrain.config.registry import OPTIMIZERS\n"
            "@OPTIMIZERS.register('adamw')\nclass A:\n    pass\n",
            "importing it failed: ValueError: optimizer 'adamw' is a built-in; choose another "
            "name (my_code.py:2).",
        ),
        (
            "from fasttrain.config.registry import OPTIMIZERS\n"
            "from fasttrain.config.schema.callback import CallbackSection\n"
            "@OPTIMIZERS.register('x')\nclass A:\n    Config = CallbackSection\n",
            "importing it failed: ValueError: A.Config must derive from "
            "fasttrain.config.schema.optimizer.OptimizerSection (my_code.py:3).",
        ),
    ],
)
def test_code_that_fails_names_its_line(write, problems_of, code, message):
    write("my_code.py", code)
    assert problems_of("imports: [./my_code.py]\n") == [f"sft.yaml:4: imports[0]: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "imports: [./absent.py]\n",
            "sft.yaml:4: imports[0]: no such file (got '{cwd}/absent.py'). "
            "Paths are relative to the config file.",
        ),
        (
            "imports: [absent_package.part]\n",
            "sft.yaml:4: imports[0]: no module 'absent_package.part'. Install it or put it on "
            "PYTHONPATH; a file is written as ./my_code.py.",
        ),
        (
            "imports: [3]\n",
            "sft.yaml:4: imports[0]: not text (got 3, expected text; quote a number or a bool that "
            "is meant as text).",
        ),
        (
            "callbacks: ['absent_package:X']\n",
            "sft.yaml:4: callbacks[0].type: 'absent_package:X' cannot be used as a callback: "
            "ModuleNotFoundError: No module named 'absent_package'.",
        ),
        (
            "callbacks: ['json:Absent']\n",
            "sft.yaml:4: callbacks[0].type: 'json:Absent' cannot be used as a callback: "
            "AttributeError: module 'json' has no attribute 'Absent'.",
        ),
    ],
)
def test_imports_that_are_not_there(problems_of, workspace, text, message):
    assert problems_of(text) == [message.format(cwd=workspace)]


def test_two_files_may_not_register_one_name(write, problems_of):
    write("a/my_code.py", CODE.format(momentum=0.5))
    write("b/my_code.py", CODE.format(momentum=0.7))
    (problem,) = problems_of("imports: [a/my_code.py, b/my_code.py]\n")
    assert "imports[1]: importing it failed: ValueError: optimizer 'mine' is taken by" in problem
