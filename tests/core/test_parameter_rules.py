"""Learning rates and decay by names and by layers, and freezing by names."""

import pytest
import torch
from torch import nn

from fasttrain.config.errors import UserError
from fasttrain.config.schema.optimizer import OptimizerSection
from fasttrain.core.parameter_groups import parameter_groups
from fasttrain.core.parameter_names import freeze


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.proj = nn.Linear(4, 4, bias=False)


class Model(nn.Module):
    """Named as ours are: the wrapper's name stands before each."""

    def __init__(self, layers=3):
        super().__init__()
        self.causal_lm = nn.Module()
        self.causal_lm.embed = nn.Embedding(10, 4)
        self.causal_lm.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.causal_lm.head = nn.Linear(4, 10, bias=False)


def groups_of(model, *rules, **settings):
    values = {"learning_rate": 1.0, "weight_decay": 0.1, "rules": list(rules), **settings}
    section = OptimizerSection(type="any", **values)
    return parameter_groups(model, section, head=model.causal_lm.head.weight)


def rates(groups):
    return {
        name.removeprefix("causal_lm."): (group.learning_rate, group.weight_decay)
        for group in groups
        for name in group.names
    }


def test_rules_give_their_parameters_groups_of_their_own():
    first = {"match": "layers.0.*", "learning_rate_scale": 0.5}
    head = {"match": ["head.*"], "learning_rate": 0.25, "weight_decay": 0.0}
    groups = groups_of(Model(), first, head)
    assert [(group.name, group.learning_rate, group.weight_decay) for group in groups] == [
        ("matrices", 1.0, 0.1),
        ("matrices · layers.0.*", 0.5, 0.1),
        ("head · head.*", 0.25, 0.0),
        ("embeddings", 1.0, 0.0),
        ("vectors", 1.0, 0.0),
        ("vectors · layers.0.*", 0.5, 0.0),
    ]
    assert groups[1].names == ("causal_lm.layers.0.proj.weight",)
    stepped = [parameter for group in groups for parameter in group.parameters]
    assert len(stepped) == len(set(stepped)) == len(list(Model().parameters()))


def test_what_no_rule_changes_comes_first_within_its_role():
    groups = groups_of(Model(), {"match": "layers.0.*", "learning_rate_scale": 2})
    assert [group.name for group in groups[:2]] == ["matrices", "matrices · layers.0.*"]


def test_rules_for_different_values_of_one_parameter_add_up():
    slow = {"match": "layers.*", "learning_rate": 0.5}
    strong = {"match": ["*.2.*", "head.*"], "weight_decay": 0.3}
    groups = groups_of(Model(), slow, strong)
    assert rates(groups)["layers.2.proj.weight"] == (0.5, 0.3)
    assert rates(groups)["layers.1.proj.weight"] == (0.5, 0.1)
    assert rates(groups)["head.weight"] == (1.0, 0.3)
    assert "matrices · layers.* · *.2.*, head.*" in [group.name for group in groups]


def test_rules_that_say_the_same_go_together():
    groups = groups_of(
        Model(),
        {"match": "layers.0.*", "learning_rate": 0.5},
        {"match": "*.proj.*", "learning_rate_scale": 0.5},
    )
    assert rates(groups)["layers.0.proj.weight"][0] == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("learning_rate", r"'layers.0.\*' \(0.5\) and '\*.proj.\*' \(0.3\) want .* learning rate"),
        ("weight_decay", r"'layers.0.\*' \(0.5\) and '\*.proj.\*' \(0.3\) want .* decay"),
    ],
)
def test_rules_that_contradict_are_both_named(value, message):
    with pytest.raises(UserError, match=message) as error:
        groups_of(Model(), {"match": "layers.0.*", value: 0.5}, {"match": "*.proj.*", value: 0.3})
    assert "causal_lm.layers.0.proj.weight" in str(error.value)


def test_a_glob_that_fits_nothing_is_told_with_the_names_that_come_near():
    with pytest.raises(UserError) as error:
        groups_of(Model(), {"match": ["head.*", "layer.0.proj*"], "learning_rate": 0.5})
    assert "optimizer.rules[0].match: 'layer.0.proj*' fits no trained parameter." in str(
        error.value
    )
    assert "layers.0.proj.weight" in str(error.value)


def test_a_glob_that_fits_frozen_parameters_alone_says_so():
    model = Model()
    freeze(model, ["layers.0.*"])
    with pytest.raises(UserError, match="fits only parameters that are frozen"):
        groups_of(model, {"match": "layers.0.*", "learning_rate": 0.5})


def test_decay_of_what_never_decays_is_refused():
    with pytest.raises(UserError, match=r"rules\[0\].weight_decay: '\*norm\*' fits only norms"):
        groups_of(Model(), {"match": "*norm*", "weight_decay": 0.2})


def test_decay_over_the_layers_counts_from_the_last():
    groups = groups_of(Model(layers=3), layer_decay=0.5)
    learning_rates = {name: rate for name, (rate, _) in rates(groups).items()}
    assert learning_rates == {
        "embed.weight": 0.125,
        "layers.0.norm.weight": 0.25,
        "layers.0.proj.weight": 0.25,
        "layers.1.norm.weight": 0.5,
        "layers.1.proj.weight": 0.5,
        "layers.2.norm.weight": 1.0,
        "layers.2.proj.weight": 1.0,
        "head.weight": 1.0,
    }
    assert [group.name for group in groups][:3] == [f"matrices · layer {n}" for n in (3, 2, 1)]


def test_the_decay_of_the_layers_multiplies_scales_and_leaves_given_rates():
    groups = groups_of(
        Model(layers=2),
        {"match": "*.0.proj.*", "learning_rate_scale": 0.1},
        {"match": "*.0.norm.*", "learning_rate": 0.7},
        layer_decay=0.5,
    )
    assert rates(groups)["layers.0.proj.weight"][0] == 0.05
    assert rates(groups)["layers.0.norm.weight"][0] == 0.7


def test_frozen_layers_count_as_layers():
    model = Model(layers=3)
    freeze(model, ["layers.2.*"])
    assert rates(groups_of(model, layer_decay=0.5))["layers.1.proj.weight"][0] == 0.5


def test_decay_over_the_layers_needs_numbered_layers():
    with pytest.raises(UserError, match=r"layer_decay: the model's layers have no numbers"):
        groups_of(Model(layers=0), layer_decay=0.5)


def test_frozen_is_what_fits():
    model = Model()
    freeze(model, ["embed.*", "*.norm.weight"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"causal_lm.embed.weight"} | {
        f"causal_lm.layers.{n}.norm.weight" for n in range(3)
    }
    freeze(model, ())
    assert torch.equal(model.causal_lm.layers[0].norm.weight, torch.ones(4))


def test_globs_to_freeze_may_overlap():
    model = Model()
    freeze(model, ["layers.*", "layers.0.*"])
    assert not any(p.requires_grad for p in model.causal_lm.layers.parameters())


def test_a_glob_to_freeze_that_fits_nothing_is_refused():
    with pytest.raises(UserError) as error:
        freeze(Model(), ["embd*"])
    assert "model.freeze: 'embd*' fits no trained parameter." in str(error.value)
    assert "Names that come near: embed.weight" in str(error.value)


def test_a_model_with_everything_frozen_is_refused():
    model = Model()
    freeze(model, ["*"])
    with pytest.raises(UserError, match="model: none of its parameters is trainable"):
        groups_of(model)
