"""Log-probabilities of tokens from hidden states, without ever holding all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**27
"""Logits held at a time: 512 MiB in fp32, which are 1,046 tokens of a vocabulary of 128,256."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What a policy says of the N response tokens of a row, response after response.

    Attributes:
        logprobs: ``(N,)`` float32, in nats.
        greedy: ``(N,)`` bool, whether no token was more likely.
        responses: ``(N,)`` int64, the response 0 … R−1 that each token belongs to.
        n_responses: R.
    """

    logprobs: Tensor
    greedy: Tensor
    responses: Tensor
    n_responses: int

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Sum a value of each token over its response, in fp64.

        In fp32 a sum of a thousand nats would be rounded by up to 1e-4 at every token, and losses
        on the difference to a reference would see that.

        Args:
            values: ``(N,)``, the log-probabilities for example.

        Returns:
            ``(R,)`` float32.
        """
        sums = torch.zeros(self.n_responses, dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.responses, values.double()).float()


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token at each of N places: log-softmax of ``hidden @ weight.T``.

    Logits are made a chunk of tokens at a time and made again in the backward pass, so the N×V of
    them are never held. Sums and the log-softmax are fp32: under autocast, and with weights in
    half precision, the factors of the products alone are rounded, the logits are not. On the CPU
    not even the factors are.

    Args:
        hidden: ``(N, H)`` hidden states of the tokens that predict.
        weight: ``(V, H)`` of the LM head.
        targets: ``(N,)`` int64, the tokens predicted.
        bias: ``(V,)`` of the LM head.
        chunk: Tokens at a time; None takes what ``LOGITS_AT_ONCE`` allows. It changes nothing but
            memory and rounding.

    Returns:
        The log-probabilities ``(N,)`` float32 in nats, and ``(N,)`` bool, whether no token was
        more likely.
    """
    device = hidden.device.type
    factors = hidden.dtype
    if torch.is_autocast_enabled(device):
        factors = torch.get_autocast_dtype(device)
    if device == "cpu":  # there it would cost accuracy and gain nothing
        factors = torch.float32
    if chunk is None:
        chunk = max(1, LOGITS_AT_ONCE // len(weight))
    with torch.autocast(device, enabled=False):
        logprobs, greedy = _Logprobs.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, chunk, factors
        )
    return logprobs, greedy


class _Logprobs(torch.autograd.Function):
    """The loop over chunks, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        factors: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        normalisers = torch.empty_like(logprobs)
        greedy = torch.empty_like(targets, dtype=torch.bool)
        head = weight.to(factors)
        for part in _parts(len(targets), chunk):
            logits = _logits(hidden[part].to(factors), head, bias)
            chosen = logits.gather(1, targets[part, None]).squeeze(1)
            greedy[part] = chosen >= logits.amax(dim=1)
            normalisers[part] = logits.logsumexp(dim=1)
            logprobs[part] = chosen - normalisers[part]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.chunk, ctx.factors = chunk, factors
        ctx.mark_non_differentiable(greedy)
        return logprobs, greedy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(ctx.factors)
            for part in _parts(len(targets), ctx.chunk):
                states = hidden[part].to(ctx.factors)
                # d log p(target) / d logits = 1[target] − p.
                of_logits = _logits(states, head, bias)
                of_logits = of_logits.sub_(normalisers[part, None]).exp_().neg_()
                ones = torch.ones_like(of_logits[:, :1])
                of_logits.scatter_add_(1, targets[part, None], ones).mul_(gradient[part, None])
                if of_bias is not None:
                    of_bias += of_logits.sum(dim=0)
                factor = of_logits.to(ctx.factors)
                if of_hidden is not None:
                    of_hidden[part] = _product(factor, head)
                if of_weight is not None:
                    of_weight += _product(factor.T, states)
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None, None, None,
        )  # fmt: skip


def _parts(n: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, n, chunk)]


def _logits(states: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """``(C, V)`` float32 from factors of one dtype."""
    logits = _product(states, head.T)
    return logits if bias is None else logits.add_(bias.float())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with sums and result in fp32, whatever the dtype of the two."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)
