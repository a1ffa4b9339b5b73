"""Chunked log-probabilities are those of the whole logits, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
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
    ours, greedy, _ = chunked_logprobs(hidden, weight, targets, bias if with_bias else None, chunk)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy, logits.argmax(dim=1) == targets)
    for mine, theirs in zip(gradients(ours, *inputs), gradients(whole, *inputs), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_greedy_tokens_are_found() -> None:
    weight = torch.eye(5)
    _, greedy, _ = chunked_logprobs(
        torch.eye(5)[[0, 3, 2]], weight, torch.tensor([0, 1, 2]), chunk=2
    )
    assert greedy.tolist() == [True, False, True]


def entropy_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In fp64, as torch has it."""
    logits = torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )
    return Categorical(logits=logits).entropy()


@pytest.mark.parametrize("chunk", [1, 7, 60, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_entropies_and_gradients_are_those_of_the_whole_logits(
    parts: tuple[Tensor, ...], chunk: int | None, with_bias: bool
) -> None:
    hidden, weight, bias, targets = parts
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    whole = entropy_of_logits(*inputs)
    logprobs, greedy, ours = chunked_logprobs(
        hidden, weight, targets, bias if with_bias else None, chunk, entropy=True
    )
    without = chunked_logprobs(hidden, weight, targets, bias if with_bias else None, chunk)
    assert torch.equal(logprobs, without[0])
    assert torch.equal(greedy, without[1])
    assert without[2] is None
    assert ours.dtype == torch.float32
    assert whole.max() - whole.min() > 1
    torch.testing.assert_close(ours.double(), whole, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(ours, *inputs), gradients(whole, *inputs), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_log_probabilities_and_entropies_can_be_learned_together(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets = parts
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    whole = Categorical(logits=logits)
    logprobs, _, entropy = chunked_logprobs(hidden, weight, targets, bias, 7, entropy=True)
    both = gradients(3 * entropy - logprobs, hidden, weight, bias)
    expected = gradients(3 * whole.entropy() - whole.log_prob(targets), hidden, weight, bias)
    for mine, theirs in zip(both, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_gradient_of_the_entropy_is_its_slope(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets = parts
    factors = torch.linspace(-1, 2, N)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (chunked_logprobs(hidden, weight, targets, bias, 7, True)[2] * factors).sum()

    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    slopes = torch.autograd.grad(total(**inputs), list(inputs.values()))
    for name, slope in zip(inputs, slopes, strict=True):
        step = 1e-2 * slope / slope.norm()
        up, down = (total(**{**inputs, name: inputs[name] + sign * step}) for sign in (1, -1))
        assert (up - down).item() == pytest.approx(2e-2 * slope.norm().item(), rel=5e-3)


def test_equally_likely_tokens_have_the_most_entropy_and_a_certain_one_none() -> None:
    hidden, targets = torch.tensor([[0.0, 0.0], [1e4, 0.0]]), torch.zeros(2, dtype=torch.int64)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    entropy = chunked_logprobs(hidden, weight, targets, entropy=True)[2]
    assert entropy.tolist() == pytest.approx([math.log(3), 0.0], abs=1e-6)
    assert (gradients(entropy, weight)[0] == 0).all()  # neither a NaN of 0 · log 0


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("entropy", [False, True])
def test_all_logits_are_never_held(parts: tuple[Tensor, ...], entropy: bool) -> None:
    hidden, weight, bias, targets = parts
    with Largest() as largest:
        logprobs, _, found = chunked_logprobs(
            hidden, weight, targets, bias, chunk=8, entropy=entropy
        )
        gradients(logprobs if found is None else logprobs + found, hidden, weight, bias)
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
    exact, _, exact_entropy = chunked_logprobs(hidden, weight, targets, entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _, entropy = chunked_logprobs(hidden, weight, targets, entropy=True)
        of_both = gradients(under + entropy, hidden, weight)
    assert torch.equal(under, exact)
    assert torch.equal(entropy, exact_entropy)
    for mine, theirs in zip(of_both, gradients(exact + exact_entropy, hidden, weight), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_in_half_precision_round_their_own_values_alone(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, _, targets = (p.detach() for p in parts)
    factors = hidden.bfloat16(), weight.bfloat16()
    half = chunked_logprobs(*factors, targets, entropy=True)
    exact = chunked_logprobs(*(t.float() for t in factors), targets, entropy=True)
    assert torch.equal(half[0], exact[0])
    assert torch.equal(half[2], exact[2])


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_sums_are_fp32(parts: tuple[Tensor, ...], autocast: bool) -> None:
    hidden, weight, bias, targets = parts
    on_gpu = [t.detach().cuda().requires_grad_(t.is_floating_point()) for t in parts]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        ours, _, entropy = chunked_logprobs(
            on_gpu[0], on_gpu[1], on_gpu[3], on_gpu[2], chunk=7, entropy=True
        )
    assert ours.dtype == entropy.dtype == torch.float32
    ours = ours + entropy
    if autocast:  # the factors are rounded, nothing after them
        hidden, weight = (t.detach().bfloat16().float().requires_grad_() for t in (hidden, weight))
    exact = sum(chunked_logprobs(hidden, weight, targets, bias, entropy=True)[::2])
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
