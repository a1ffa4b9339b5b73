"""Chunked log-probabilities are those of the whole logits, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpsteer2.functional.logprobs import TokenLogprobs, chunked_logprobs

N, H, V = 60, 16, 200


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, H, generator=generator).requires_grad_()
    weight = torch.randn(V, H, generator=generator).requires_grad_()
    bias = torch.randn(V, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, bias, targets


def gradients(logprobs: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    factors = torch.linspace(-1, 2, len(logprobs))
    return torch.autograd.grad((logprobs * factors).sum(), inputs)


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_the_whole_logits(
    parts: tuple[Tensor, ...], chunk: int | None, with_bias: bool
) -> None:
    hidden, weight, bias, targets = parts
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    logits = torch.nn.functional.linear(*(t.double() for t in inputs))
    whole = logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    ours, greedy = chunked_logprobs(hidden, weight, targets, bias if with_bias else None, chunk)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy, logits.argmax(dim=1) == targets)
    for mine, theirs in zip(gradients(ours, *inputs), gradients(whole, *inputs), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_greedy_tokens_are_found() -> None:
    weight = torch.eye(5)
    _, greedy = chunked_logprobs(torch.eye(5)[[0, 3, 2]], weight, torch.tensor([0, 1, 2]), chunk=2)
    assert greedy.tolist() == [True, False, True]


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_all_logits_are_never_held(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets = parts
    with Largest() as largest:
        logprobs, _ = chunked_logprobs(hidden, weight, targets, bias, chunk=8)
        gradients(logprobs, hidden, weight, bias)
    assert largest.elements == max(8 * V, V * H)
    assert largest.elements < N * V / 3


def test_what_is_frozen_gets_no_gradient(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, _, targets = parts
    alone = gradients(chunked_logprobs(hidden, weight.detach(), targets)[0], hidden)
    both = gradients(chunked_logprobs(hidden, weight, targets)[0], hidden, weight)
    torch.testing.assert_close(alone[0], both[0])
    torch.testing.assert_close(
        gradients(chunked_logprobs(hidden.detach(), weight, targets)[0], weight)[0], both[1]
    )
    assert not chunked_logprobs(hidden.detach(), weight.detach(), targets)[0].requires_grad


def test_autocast_does_not_round(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, _, targets = parts
    exact = chunked_logprobs(hidden, weight, targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _ = chunked_logprobs(hidden, weight, targets)
        of_both = gradients(under, hidden, weight)
    assert torch.equal(under, exact)
    for mine, theirs in zip(of_both, gradients(exact, hidden, weight), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_in_half_precision_round_their_own_values_alone(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, _, targets = (p.detach() for p in parts)
    half = chunked_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)[0]
    exact = chunked_logprobs(hidden.bfloat16().float(), weight.bfloat16().float(), targets)[0]
    assert torch.equal(half, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_sums_are_fp32(parts: tuple[Tensor, ...], autocast: bool) -> None:
    hidden, weight, bias, targets = parts
    on_gpu = [t.detach().cuda().requires_grad_(t.is_floating_point()) for t in parts]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        ours, _ = chunked_logprobs(on_gpu[0], on_gpu[1], on_gpu[3], on_gpu[2], chunk=7)
    assert ours.dtype == torch.float32
    if autocast:  # the factors are rounded, nothing after them
        hidden, weight = (t.detach().bfloat16().float().requires_grad_() for t in (hidden, weight))
    exact, _ = chunked_logprobs(hidden, weight, targets, bias)
    torch.testing.assert_close(ours.cpu(), exact, rtol=1e-4, atol=1e-4)
    factors = torch.linspace(-1, 2, N)
    (ours * factors.cuda()).sum().backward()
    for mine, theirs in zip(on_gpu[:3], gradients(exact, hidden, weight, bias), strict=True):
        assert mine.grad.dtype == torch.float32
        # The gradient of the logits is a factor as well.
        assert (mine.grad.cpu() - theirs).norm() <= (1e-2 if autocast else 1e-4) * theirs.norm()


def test_sums_over_responses() -> None:
    tokens = TokenLogprobs(
        logprobs=torch.tensor([-1.0, -2.0, -4.0, -8.0]),
        greedy=torch.tensor([True, True, False, True]),
        responses=torch.tensor([0, 0, 2, 2]),
        n_responses=4,
    )
    assert tokens.sum_by_response(tokens.logprobs).tolist() == [-3, 0, -12, 0]
    assert tokens.sum_by_response(tokens.greedy).tolist() == [2, 0, 1, 0]
