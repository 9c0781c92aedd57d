"""Numbers of an optimizer's state: those that steps change are kept, the config's are not."""

import pytest
import torch
from torch import nn

from fasttrain.engine.optimizer_numbers import OptimizerNumbers


class Counting(torch.optim.Optimizer):
    """Counts in its groups and by parameter."""

    def __init__(self, groups, strength=1.0):
        super().__init__(groups, {"lr": 0.1, "strength": strength, "seen": 0, "largest": 0.0})

    def step(self):
        for group in self.param_groups:
            group["seen"] += 1
            group["largest"] = 1 / 3
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 2
                state["tensor"] = torch.ones(3)


def made(*, strength=1.0, groups=2):
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "ab"})
    parameters = list(model.values())
    split = [parameters] if groups == 1 else [[p] for p in parameters]
    optimizer = Counting([{"params": members} for members in split], strength)
    return optimizer, OptimizerNumbers(model, optimizer)


def test_what_steps_change_is_kept_and_what_the_config_gives_is_not():
    optimizer, numbers = made()
    assert numbers.state_dict() == {"groups": [{}, {}], "parameters": {}}
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    saved = numbers.state_dict()
    assert saved == {
        "groups": [{"seen": 1, "largest": 1 / 3}] * 2,
        "parameters": {"a/count": 2, "b/count": 2},
    }
    other, others = made(strength=5.0)
    others.load_state_dict(saved)
    assert others.state_dict() == saved
    assert other.param_groups[0] | {"params": []} == {
        "params": [], "lr": 0.1, "strength": 5.0, "seen": 1, "largest": 1 / 3,
    }  # fmt: skip


def test_numbers_of_other_groups_are_refused():
    optimizer, numbers = made()
    optimizer.step()
    _, others = made(groups=1)
    with pytest.raises(ValueError, match="the checkpoint has 2 parameter groups, the run 1"):
        others.load_state_dict(numbers.state_dict())


def test_groups_without_numbers_may_be_others():
    _, numbers = made()
    _, others = made(groups=1)
    others.load_state_dict(numbers.state_dict())
    assert others.state_dict() == {"groups": [{}], "parameters": {}}
