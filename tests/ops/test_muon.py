"""Muon: against its formula in float64 and torch's, and in what it promises beyond it."""

import copy
import math

import pytest
import torch
from fasttrain_kernels.ops.newton_schulz.reference import QUINTIC
from fasttrain_kernels.ops.newton_schulz.reference import forward as orthogonal
from fasttrain_kernels.optim import AdamW, GradientRelease, Muon, hidden_matrices, muon
from fasttrain_kernels.optim import muon_groups as groups_of
from torch import nn

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = [(24, 40), (24, 40), (40, 24), (17, 64), (24, 40)]
LR, DECAY = 0.02, 0.1


def parameters(shapes=SHAPES, dtype=F32):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    return [nn.Parameter(value.to(dtype)) for value in drawn]


def give_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in params:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=F64) * scale
        parameter.grad = drawn.to(parameter.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()


def simulated(params, steps, adjust, *, momentum=0.95, nesterov=True, clip=None):
    """The formula in float64, on gradients as `params` have them."""
    values = [p.detach().double().clone() for p in params]
    means = [torch.zeros_like(v) for v in values]
    stand_ins = [nn.Parameter(p.detach().clone()) for p in params]
    for step in range(steps):
        give_gradients(stand_ins, step)
        grads = [p.grad.double() for p in stand_ins]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        share = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for value, mean, grad in zip(values, means, grads, strict=True):
            mean.lerp_(grad * share, 1 - momentum)
            mixed = (grad * share).lerp(mean, momentum) if nesterov else mean
            update = orthogonal(mixed[None], 5, QUINTIC, "direct")[0]
            rows, columns = value.shape
            ratio = math.sqrt(max(1.0, rows / columns))
            if adjust == "match_rms_adamw":
                ratio = 0.2 * math.sqrt(max(rows, columns))
            value.mul_(1 - LR * DECAY).sub_(update, alpha=LR * ratio)
    return values


@torch.no_grad()
def furthest(ones, others):
    """The largest relative difference of a matrix."""
    pairs = zip(ones, others, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


# --- against the formula, and torch's -------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_20_steps_are_nearer_to_the_formula_than_torchs(adjust, nesterov):
    """torch's makes matrices orthogonal in bfloat16."""
    mine, theirs = parameters(), parameters()
    exact = simulated(mine, 20, adjust, nesterov=nesterov)
    options = {"momentum": 0.95, "weight_decay": DECAY, "nesterov": nesterov}
    train(Muon(mine, LR, adjust_lr=adjust, **options), mine, 20)
    train(torch.optim.Muon(theirs, lr=LR, adjust_lr_fn=adjust, **options), theirs, 20)
    assert furthest(mine, exact) < 1e-5
    assert 1e-5 < furthest(theirs, exact) < 0.05


def test_in_float64_it_is_the_formula():
    mine = parameters(dtype=F64)
    exact = simulated(mine, 10, "match_rms_adamw")
    train(Muon(mine, LR, weight_decay=DECAY), mine, 10)
    assert furthest(mine, exact) < 1e-10


def test_clipping_is_of_all_gradients_before_momentum():
    mine = parameters()
    clip = 30.0  # of norms around 65
    exact = simulated(mine, 5, "original", clip=clip)
    optimizer = Muon(mine, LR, weight_decay=DECAY, adjust_lr="original", max_grad_norm=clip)
    train(optimizer, mine, 5)
    assert furthest(mine, exact) < 1e-5
    assert float(optimizer.grad_norm) > clip


def test_gradients_below_the_limit_are_left():
    mine, free = parameters(), parameters()
    train(Muon(mine, LR, max_grad_norm=1e3), mine, 3)
    train(Muon(free, LR), free, 3)
    assert all(torch.equal(a, b) for a, b in zip(mine, free, strict=True))


def test_what_is_rounded_at_random_is_so_in_each_parameter_alone():
    mine = [nn.Parameter(torch.ones(24, 40, dtype=BF16)) for _ in range(2)]
    optimizer = Muon(mine, LR, rounding="stochastic")
    for parameter in mine:
        parameter.grad = torch.ones(24, 40, dtype=BF16)
    optimizer.step()
    assert not torch.equal(*mine)
    torch.testing.assert_close(*mine, rtol=2**-7, atol=0.0)


def test_a_bfloat16_parameter_is_its_rounded_master():
    mine = parameters(dtype=BF16)
    exact = simulated(mine, 20, "match_rms_adamw")
    optimizer = Muon(mine, LR, weight_decay=DECAY)
    train(optimizer, mine, 20)
    masters = [optimizer.state[p]["master"] for p in mine]
    assert furthest(masters, exact) < 1e-5
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(mine, masters, strict=True))


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_without_a_master_it_stays_near(rounding):
    mine = parameters(dtype=BF16)
    exact = simulated(mine, 20, "match_rms_adamw")
    train(Muon(mine, LR, weight_decay=DECAY, rounding=rounding), mine, 20)
    # Each step is off by 2^-8 at most, at random; 2^-9 is what the last rounding does alone.
    limit = 2**-8 * math.sqrt(20) if rounding == "stochastic" else 2**-8
    assert furthest(mine, exact) < limit


def test_momentum_in_bfloat16_is_near():
    mine = parameters()
    exact = simulated(mine, 20, "match_rms_adamw")
    optimizer = Muon(mine, LR, weight_decay=DECAY, moments="bfloat16")
    train(optimizer, mine, 20)
    assert optimizer.state[mine[0]]["momentum_buffer"].dtype == BF16
    assert 1e-5 < furthest(mine, exact) < 0.02


# --- batches --------------------------------------------------------------------------------------


def test_matrices_of_one_shape_go_together_in_batches_of_bounded_size(monkeypatch):
    sizes = []

    def counting(matrices, **options):
        sizes.append(tuple(matrices.shape))
        return original(matrices, **options)

    original = muon.newton_schulz
    monkeypatch.setattr(muon, "newton_schulz", counting)
    whole, cut = parameters(), parameters()
    train(Muon(whole, LR), whole, 1)
    assert sizes == [(3, 24, 40), (1, 40, 24), (1, 17, 64)]
    sizes.clear()
    monkeypatch.setattr(muon, "BATCH", 2 * 24 * 40)
    train(Muon(cut, LR), cut, 1)
    assert sizes == [(2, 24, 40), (1, 24, 40), (1, 40, 24), (1, 17, 64)]
    assert furthest(cut, [p.double() for p in whole]) < 1e-6


def test_groups_of_other_options_do_not_mix():
    mine, alone = parameters([(24, 40)] * 3), parameters([(24, 40)] * 3)
    others = [{"momentum": 0.5}, {"lr": 0.3, "weight_decay": 0.0}, {"ns_steps": 2}]
    groups = [{"params": [p], **o} for p, o in zip(mine, others, strict=True)]
    train(Muon(groups, LR), mine, 3)
    for index, options in enumerate(others):
        optimizer = Muon([{"params": [alone[index]], **options}], LR)
        for step in range(3):
            give_gradients(alone, step)
            optimizer.step()
    assert furthest(mine, [p.double() for p in alone]) < 1e-5


def test_several_matrices_in_one_parameter_are_made_orthogonal_each():
    stacked, alone = parameters([(3, 24, 40)])[0], None
    alone = [nn.Parameter(part.clone()) for part in stacked.detach()]
    ours, theirs = Muon([stacked], LR), Muon(alone, LR)
    for step in range(3):
        give_gradients([stacked], step)
        for parameter, grad in zip(alone, stacked.grad, strict=True):
            parameter.grad = grad.clone()
        ours.step()
        theirs.step()
    assert furthest(stacked.detach(), [p.double() for p in alone]) < 1e-5


def test_any_order_of_memory():
    plain = parameters([(24, 40)])
    turned = [nn.Parameter(plain[0].detach().T.contiguous().T)]
    gaps = [nn.Parameter(torch.zeros(24, 80)[:, ::2].copy_(plain[0].detach()))]
    for params in (plain, turned, gaps):
        train(Muon(params, LR), params, 3)
    assert not turned[0].is_contiguous()
    assert furthest(turned, [plain[0].double()]) < 1e-6
    assert furthest(gaps, [plain[0].double()]) < 1e-6


# --- the rest -------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.router = nn.Linear(16, 4, bias=False)
        self.down = nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 50, bias=False)


def test_groups_of_a_model():
    model = Model()
    groups = groups_of(model, 0.1, adamw_lr=3e-4, adamw=["*router*"])
    names = {group["name"]: [name for name, _ in group["params"]] for group in groups}
    assert names == {
        "hidden matrices": ["up.weight", "down.weight"],
        "decayed": ["router.weight", "head.weight"],
        "not decayed": ["embed.weight", "norm.weight", "norm.bias", "up.bias"],
    }
    optimizer = Muon(groups, LR)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 3e-4, 3e-4]
    said = "Muon on 2 parameters of 1,024 elements, AdamW on 6 parameters of 1,728 elements"
    assert optimizer.describe() == said and said in repr(optimizer)


def test_an_output_layer_is_known_by_what_the_model_says():
    model = Model()
    model.get_output_embeddings = lambda: model.down
    assert hidden_matrices(model) == {model.up.weight, model.router.weight}


@pytest.mark.parametrize("momentum", [0.95, 0.0])
def test_the_rest_is_stepped_as_adamw_does(momentum):
    mine, others = parameters([(8, 9), (5,), (6, 7)]), parameters([(8, 9), (5,), (6, 7)])
    groups = [{"params": mine[:1]}, {"params": mine[1:], "muon": False, "moments": "8bit"}]
    ours = Muon(groups, LR, momentum, weight_decay=DECAY, nesterov=False)
    theirs = AdamW(others[1:], LR, (0.9, 0.95), weight_decay=DECAY, moments="8bit")
    theirs.declare_slice(others[1], tensor=1, offset=0)
    theirs.declare_slice(others[2], tensor=2, offset=0)
    for step in range(5):
        give_gradients(mine, step)
        give_gradients(others, step)
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(mine[1:], others[1:], strict=True))
    assert "exp_avg" not in ours.state[mine[0]]


# --- skipping, scaling, saving --------------------------------------------------------------------


def everything(optimizer, params):
    states = [v for p in params for v in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*params, *states, *(p.grad for p in params))]


@pytest.mark.parametrize("flag", ["norm", "found_inf"])
def test_a_step_that_is_skipped_changes_no_bit(flag):
    mine = parameters(dtype=BF16)
    optimizer = Muon(
        mine, LR, max_grad_norm=1.0 if flag == "norm" else None, zero_grad_in_step=True
    )
    train(optimizer, mine, 2)
    assert all((p.grad == 0).all() for p in mine)
    give_gradients(mine, 2)
    mine[1].grad[3, 4] = torch.nan
    if flag == "found_inf":
        optimizer.found_inf = torch.ones(())
    before = everything(optimizer, mine)
    optimizer.step()
    pairs = zip(before, everything(optimizer, mine), strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def test_a_loss_scale_is_taken_out():
    plain, scaled = parameters(), parameters()
    one, other = (Muon(p, LR, max_grad_norm=20.0) for p in (plain, scaled))
    other.grad_scale = torch.tensor(1024.0)
    for step in range(3):
        give_gradients(plain, step)
        give_gradients(scaled, step, scale=1024.0)
        one.step()
        other.step()
    assert furthest(scaled, [p.double() for p in plain]) < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_saving_and_loading_in_the_middle_changes_no_bit(dtype):
    through, resumed = parameters(dtype=dtype), parameters(dtype=dtype)
    straight = Muon(through, LR)
    train(straight, through, 6)
    first = Muon(resumed, LR)
    train(first, resumed, 3)
    kept = copy.deepcopy(first.state_dict())
    second = Muon(resumed, LR)
    second.load_state_dict(kept)
    train(second, resumed, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))


def test_steps_in_the_backward_pass():
    released, plain = parameters(), parameters()
    GradientRelease(Muon(released, LR))
    optimizer = Muon(plain, LR)
    for params in (released, plain):
        sum(p.square().sum() for p in params).backward()
    optimizer.step()
    assert furthest(released, [p.double() for p in plain]) < 1e-6
    assert all(p.grad is None for p in released)


# --- refusals -------------------------------------------------------------------------------------


def test_muon_on_nothing_is_refused():
    with pytest.raises(ValueError, match="Muon on 0 parameters: no group has muon=True"):
        Muon([{"params": parameters(), "muon": False}])
    with pytest.raises(ValueError, match="Muon on 0 parameters: none of the trainable ones"):
        groups_of(nn.Sequential(nn.Embedding(4, 5), nn.LayerNorm(5)))


def test_slices_of_matrices_are_refused():
    mine = parameters([(8, 9), (72,)])
    optimizer = Muon([{"params": mine[:1]}, {"params": mine[1:], "muon": False}])
    optimizer.declare_slice(mine[1], tensor=1, offset=256)
    with pytest.raises(ValueError, match=r"shape \(8, 9\) is Muon's, which makes whole matrices"):
        optimizer.declare_slice(mine[0], tensor=0, offset=0)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((5,), {}, r"shape \(5,\) is no matrix; put it into a group with muon=False"),
        ((4, 4, 3, 3), {}, "is no matrix"),
        ((4, 4), {"moments": "8bit"}, "moments='8bit' of a Muon group; expected float32, bfloat16"),
        ((4, 4), {"adjust_lr": "none"}, "expected match_rms_adamw, original"),
        ((4, 4), {"momentum": 1.0}, "momentum=1.0; expected 0 or more, and less than 1"),
        ((4, 4), {"ns_steps": 0}, "ns_steps=0; expected 1 or more"),
        ((4, 4), {"lr": -1.0}, "lr=-1.0; expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.ones(shape))], **options)
