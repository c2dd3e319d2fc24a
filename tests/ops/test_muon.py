"""Muon: matrices by their singular vectors, the rest as torch's AdamW."""

import pytest
import torch
from torch import Tensor, nn

from sat.ops import muon
from sat.ops.muon import COEFFICIENTS, STEPS, Muon, orthogonalize


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(draw(*shape, seed=7))


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5), (1, 6), (3, 1)])
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    expected = values / (values.norm() + 1e-7)
    for _ in range(STEPS):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(orthogonalize(matrix), left @ torch.diag(expected) @ right, rtol=0.0, atol=1e-12)
    assert expected.min() > 0.5 and expected.max() < 1.3


def test_matrices_together_are_matrices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for together in (1, 1 << 22):
        monkeypatch.setattr(muon, "TOGETHER", together)
        parameters = [nn.Parameter(draw(6, 4, seed=seed)) for seed in range(3)]
        optimizer = Muon(parameters, lr=0.02)
        for seed, parameter in enumerate(parameters):
            parameter.grad = draw(6, 4, seed=10 + seed) * 10.0**seed
        optimizer.step()
        results.append(torch.stack([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(*results)


def take_steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int = 6) -> Tensor:
    for step in range(count):
        parameter.grad = draw(*parameter.shape, seed=step).to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_a_matrix_follows_torchs_muon() -> None:
    """Which iterates in bfloat16: to two digits of what the steps have moved it by."""
    own, theirs = make_parameter(12, 20), make_parameter(12, 20)
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    got = take_steps(own, Muon([own], **options))
    expected = take_steps(theirs, torch.optim.Muon([theirs], **options, nesterov=True, adjust_lr_fn="original"))
    moved = (expected - make_parameter(12, 20).detach()).norm()
    assert (got - expected).norm() < 0.02 * moved


def test_a_tall_matrix_moves_further() -> None:
    own, theirs = make_parameter(20, 5), make_parameter(20, 5)
    got = take_steps(own, Muon([own], lr=0.02))
    expected = take_steps(theirs, torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="original"))
    assert (got - expected).norm() < 0.02 * (expected - make_parameter(20, 5).detach()).norm()


def test_a_vector_follows_torchs_adamw() -> None:
    own, theirs = make_parameter(9), make_parameter(9)
    rest = {"betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.1}
    got = take_steps(own, Muon([own], lr=0.02, adam_lr_ratio=0.25, **rest))
    torch.testing.assert_close(got, take_steps(theirs, torch.optim.AdamW([theirs], lr=0.005, **rest)))


def test_a_convolution_is_the_matrix_of_its_outputs() -> None:
    kernel = nn.Parameter(draw(6, 4, 3, 3, 3, seed=7).contiguous(memory_format=torch.channels_last_3d))
    optimizer = Muon([kernel], lr=0.02)
    got = take_steps(kernel, optimizer, 1)
    matrix = nn.Parameter(draw(6, 4, 3, 3, 3, seed=7).flatten(1))
    matrix.grad = draw(6, 4, 3, 3, 3, seed=0).flatten(1)
    Muon([matrix], lr=0.02).step()
    torch.testing.assert_close(got.flatten(1), matrix.detach())
    assert optimizer.state[kernel]["momentum"].stride() == kernel.stride()  # it is saved as the weight is


def test_what_has_no_gradient_stays() -> None:
    still, moved = make_parameter(3, 4), make_parameter(3, 4)
    optimizer = Muon([still, moved], weight_decay=0.5)
    moved.grad = draw(3, 4)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(still, make_parameter(3, 4)) and still not in optimizer.state
    assert not torch.equal(moved, still)
