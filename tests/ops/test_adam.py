"""FusedEmaAdam is torch's Adam or AdamW with a moving average of the weights beside it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sat.ops.adam import FusedEmaAdam

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
STEPS = 60
ATOL = 1e-7  # measured: 0 for the weights, 5e-8 for the averages


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 5 - 3)


def groups(model: nn.Module) -> list[dict]:
    weights = [parameter for name, parameter in model.named_parameters() if "weight" in name]
    biases = [parameter for name, parameter in model.named_parameters() if "bias" in name]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 1e-2}]


def external_average(averages: list[Tensor], model: nn.Module, step: int, decay: float) -> None:
    """The textbook average, in double precision: shadow = d shadow + (1 - d) weight."""
    d = min(decay, (1 + step) / (10 + step))
    for average, parameter in zip(averages, model.parameters()):
        average.mul_(d).add_(parameter.detach().double(), alpha=1 - d)


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_it_is_torchs_optimizer_and_an_average(adam_w_mode: bool) -> None:
    model = make_model()
    reference = copy.deepcopy(model)
    averages = [parameter.detach().double().clone() for parameter in reference.parameters()]
    own = FusedEmaAdam(groups(model), **HYPER, adam_w_mode=adam_w_mode, ema_decay=0.85)
    theirs = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(groups(reference), **HYPER)
    for step in range(1, STEPS + 1):
        for group, other in zip(own.param_groups, theirs.param_groups):
            group["lr"] = other["lr"] = group["lr"] * 0.99  # as a schedule does
        for one, optimizer in ((model, own), (reference, theirs)):
            give_gradients(one, step)
            optimizer.step()
        external_average(averages, reference, step, 0.85)
    for parameter, expected, average in zip(model.parameters(), reference.parameters(), averages):
        torch.testing.assert_close(parameter, expected, rtol=0.0, atol=ATOL)
        torch.testing.assert_close(own.state[parameter]["shadow"].double(), average, rtol=0.0, atol=ATOL)
    moved = max((a - b).abs().max() for a, b in zip(model.parameters(), make_model().parameters()))
    assert moved > 0.05  # the comparison is not of weights at rest


@pytest.mark.parametrize(("use_num_upates", "decay"), [(True, [2 / 11, 3 / 12, 4 / 13]), (False, [0.9999] * 3)])
def test_the_averages_decay(use_num_upates: bool, decay: list[float]) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = FusedEmaAdam([parameter], lr=1.0, use_num_upates=use_num_upates)
    shadow = 0.0
    for step, d in enumerate(decay, start=1):
        parameter.grad = torch.ones(1)
        optimizer.step()
        assert optimizer.ema_decay_at(step) == pytest.approx(d)
        shadow = d * shadow + (1 - d) * parameter.item()
        assert optimizer.state[parameter]["shadow"].item() == pytest.approx(shadow, rel=1e-5)
    assert FusedEmaAdam([parameter]).ema_decay_at(10**6) == 0.9999


def test_a_parameter_that_joins_later_counts_its_own_steps() -> None:
    """A part of the model may get its first gradient late, or none in some steps."""
    model = make_model()
    reference = copy.deepcopy(model)
    own, theirs = FusedEmaAdam(model.parameters(), **HYPER), torch.optim.AdamW(reference.parameters(), **HYPER)
    for step in range(1, 12):
        for one, optimizer in ((model, own), (reference, theirs)):
            give_gradients(one, step)
            if step < 4 or step == 7:
                one[2].weight.grad = None
            optimizer.step()
    for parameter, expected in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(parameter, expected, rtol=0.0, atol=ATOL)


def test_without_bias_correction_the_first_step_is_short() -> None:
    sizes = []
    for bias_correction in (True, False):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)
        FusedEmaAdam([parameter], lr=1.0, betas=(0.9, 0.99), bias_correction=bias_correction).step()
        sizes.append(-parameter.item())
    assert sizes == [pytest.approx(1.0), pytest.approx(0.1 / 0.01**0.5)]


def test_a_closure_gives_the_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = FusedEmaAdam([parameter], lr=0.1)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert parameter.item() == pytest.approx(1.9)


def test_state_is_saved_and_loaded_like_torchs() -> None:
    model = make_model()
    optimizer = FusedEmaAdam(model.parameters(), **HYPER)
    give_gradients(model, 1)
    optimizer.step()
    copied = copy.deepcopy(model)
    resumed = FusedEmaAdam(copied.parameters(), **HYPER)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, own in ((model, optimizer), (copied, resumed)):
        give_gradients(one, 2)
        own.step()
    for parameter, other in zip(model.parameters(), copied.parameters()):
        assert torch.equal(parameter, other)
        assert torch.equal(optimizer.state[parameter]["shadow"], resumed.state[other]["shadow"])
