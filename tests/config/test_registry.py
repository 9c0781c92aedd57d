"""The tables of components, and the errors of their use."""

import pytest

from fasttrain.components import BUILT_INS
from fasttrain.config.errors import Problem, UserError
from fasttrain.config.registry import OPTIMIZERS, REGISTRIES, SCHEDULERS
from fasttrain.config.schema.base import ComponentSection
from fasttrain.config.schema.scheduler import SchedulerSection


@pytest.fixture(autouse=True)
def forget():
    yield
    for registry in REGISTRIES.values():
        registry.forget(__name__)


class Config(SchedulerSection):
    power: float = 2.0


class Scheduler:
    Config = Config


@pytest.mark.parametrize(("kind", "name"), sorted(BUILT_INS))
def test_every_built_in_has_a_section_of_its_kind(kind, name):
    config = REGISTRIES[kind].config(name)
    assert issubclass(config, REGISTRIES[kind].section)
    assert issubclass(config, ComponentSection)
    assert config.model_fields["type"].default == name


def test_a_registered_class_is_found():
    assert SCHEDULERS.register("mine")(Scheduler) is Scheduler
    assert "mine" in SCHEDULERS.names()
    assert SCHEDULERS.config("mine") is Config
    assert SCHEDULERS.component("mine") is Scheduler
    SCHEDULERS.register("mine")(Scheduler)  # the same class again, as when a module is run twice


def test_a_taken_name_says_who_has_it():
    SCHEDULERS.register("mine")(Scheduler)

    class Other:
        Config = Config

    with pytest.raises(ValueError, match=r"'mine' is taken by .*test_registry\.Scheduler\."):
        SCHEDULERS.register("mine")(Other)
    with pytest.raises(ValueError, match="'cosine' is a built-in; choose another name"):
        SCHEDULERS.register("cosine")(Other)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"Scheduler\.Config must derive from .*OptimizerSection"):
        OPTIMIZERS.register("mine")(Scheduler)


@pytest.mark.parametrize("ask", [SCHEDULERS.config, SCHEDULERS.component])
def test_an_unknown_name_is_refused(ask):
    with pytest.raises(KeyError, match="no scheduler 'x'"):
        ask("x")


def test_a_problem_is_one_line_whatever_it_holds():
    problem = Problem("no (got '\n\x1b[31m').", where="a.yaml:1", key="x", hint="Try y.")
    assert str(problem) == r"a.yaml:1: x: no (got '\n\x1b[31m'). Try y."
    assert str(UserError(problem, "and more")) == f"{problem}\nand more"
