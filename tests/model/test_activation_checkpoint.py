"""Checkpointed layers give the same gradients and keep less."""

import pytest
import torch
from model.tiny_models import (
    assert_same_gradients,
    documents,
    gradients,
    language_model,
    packed,
    tokenizer,
)
from torch import nn

from fasttrain.config.errors import UserError
from fasttrain.config.schema.model import ActivationCheckpointConfig
from fasttrain.core.kernel_plan import KernelPlan
from fasttrain.model.transforms.activation_checkpoint import ActivationCheckpointTransform

DEEP = {"num_hidden_layers": 5}


def apply(model, **options):
    config = ActivationCheckpointConfig(**options)
    return ActivationCheckpointTransform(config).apply(model, plan=KernelPlan())


def step(model, batch):
    torch.manual_seed(3)
    loss = model.token_losses(batch)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("attention", ["per_document", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_are_the_same(architecture, dropout, attention):
    """Dropout included: the second forward draws what the first one drew."""
    options = {"attention": attention, "attention_dropout": dropout}
    plain, checkpointed = (language_model(architecture, **options).train() for _ in range(2))
    apply(checkpointed)
    batch = packed(documents())
    torch.testing.assert_close(step(checkpointed, batch), step(plain, batch), rtol=1e-6, atol=0)
    assert_same_gradients(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [2] * 5), (2, [2, 1, 2, 1, 2]), (9, [2, 1, 1, 1, 1])]
)
def test_every_nth_layer_runs_again(every, expected):
    model = apply(language_model(**DEEP), every_layers=every)
    runs = [0] * 5
    for number, layer in enumerate(model.causal_lm.model.layers):

        def count(_module, _args, number=number):
            runs[number] += 1

        layer.mlp.register_forward_pre_hook(count)
    step(model, packed(documents()))
    assert runs == expected
    with torch.no_grad():
        model.token_losses(packed(documents()))
    assert runs == [count + 1 for count in expected]


def test_less_is_kept_for_backward():
    def kept_bytes(model):
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.token_losses(packed(documents([200])))
        del loss
        return sum(sizes.values())

    options = DEEP | {"max_position_embeddings": 256}
    assert kept_bytes(apply(language_model(**options))) < 0.5 * kept_bytes(
        language_model(**options)
    )


def test_generation_still_works():
    plain, checkpointed = language_model(), apply(language_model())
    words = tokenizer()
    answers = [
        m.generate(["w4 w5"], tokenizer=words, max_new_tokens=4) for m in (plain, checkpointed)
    ]
    assert answers[0] == answers[1]


def test_a_model_without_such_layers_is_refused():
    model = language_model()
    model.causal_lm.model.layers = nn.ModuleList([model.causal_lm.model.layers[0]])
    with pytest.raises(UserError, match="no list of 2 layers was found in LlamaForCausalLM"):
        apply(model)
