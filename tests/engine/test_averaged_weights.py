"""A schedule-free optimizer: its average is what is used, and training doesn't notice."""

import json

import pytest
import torch
from toys import ToyModel, batch_of, document, sum_of_losses

from fasttrain.config.schema.engine import LocalEngineConfig
from fasttrain.config.schema.optimizer import ScheduleFreeAdamWConfig
from fasttrain.core.events import Hooks
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.core.parameter_groups import parameter_groups
from fasttrain.engine.local import LocalEngine
from fasttrain.optimizer.schedule_free import ScheduleFreeAdamWFactory
from fasttrain.runtime.precision import choose_precision

CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)
BETA = 0.9


def engine_for(model):
    pytest.importorskip("schedulefree")
    config = ScheduleFreeAdamWConfig(learning_rate=0.1, betas=(BETA, 0.99))
    optimizer = ScheduleFreeAdamWFactory(config).build(
        parameter_groups(model, config), plan=KernelPlan(), precision=FP32
    )
    engine = LocalEngine(LocalEngineConfig(), precision=FP32, device=CPU)
    engine.attach(model, optimizer, max_grad_norm=0.0, hooks=Hooks())
    return engine


def train(engine, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(11, (8,), generator=generator).tolist()
        engine.train_step([batch_of(document(ids))], sum_of_losses(engine.model))
    return engine


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_the_average_is_shown_and_training_goes_on_with_the_same_bits():
    engine, undisturbed = engine_for(ToyModel()), engine_for(ToyModel())
    train(engine, 0, 4)
    training = weights(engine)
    with engine.evaluation_weights():
        shown = weights(engine)
        for name, parameter in engine.model.named_parameters():
            z = engine.optimizer.state[parameter]["z"]
            average = (training[name] - (1 - BETA) * z) / BETA
            torch.testing.assert_close(shown[name], average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(shown["head.weight"], training["head.weight"])
    assert_equal(weights(engine), training)
    train(engine, 4, 7)
    assert_equal(weights(engine), weights(train(undisturbed, 0, 7)))


def test_it_may_be_entered_twice_and_left_by_an_error():
    engine = train(engine_for(ToyModel()), 0, 3)
    training = weights(engine)
    with pytest.raises(RuntimeError, match="inside"), engine.evaluation_weights():
        shown = weights(engine)
        for _ in range(2):
            with engine.evaluation_weights():
                assert_equal(weights(engine), shown)
        assert_equal(weights(engine), shown)
        raise RuntimeError("inside")
    assert_equal(weights(engine), training)
    with engine.evaluation_weights():
        assert_equal(weights(engine), shown)
    train(engine, 3, 4)


def test_other_optimizers_show_what_they_train():
    model = ToyModel()
    engine = LocalEngine(LocalEngineConfig(), precision=FP32, device=CPU)
    engine.attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=0.0, hooks=Hooks()
    )
    address = model.head.weight.data_ptr()
    with engine.evaluation_weights():
        assert model.head.weight.data_ptr() == address
    assert engine.optimizer_numbers() == {"groups": [{}], "parameters": {}}


def test_its_numbers_go_on_where_they_were():
    whole = train(engine_for(ToyModel()), 0, 6)
    first = train(engine_for(ToyModel()), 0, 3)
    numbers = json.loads(json.dumps(first.optimizer_numbers()))
    assert {frozenset(group) for group in numbers["groups"]} == {
        frozenset({"k", "weight_sum", "lr_max", "scheduled_lr"})
    }
    second = engine_for(ToyModel(seed=1))
    second.load_slices(list(first.state_slices()))
    second.load_optimizer_numbers(numbers)
    assert_equal(weights(train(second, 3, 6)), weights(whole))
