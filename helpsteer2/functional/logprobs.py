"""Log-probabilities of tokens from hidden states, without ever holding all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**27
"""Logits held at a time: 512 MiB in fp32, which are 1,046 tokens of a vocabulary of 128,256."""

CPU_TOKENS_AT_ONCE = 512
"""Fewer logits stay in the caches from one pass over them to the next, more tokens make use of
weights that were read once."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What a policy says of the N response tokens of a row, response after response.

    Attributes:
        logprobs: ``(N,)`` float32, in nats.
        greedy: ``(N,)`` bool, whether no token was more likely.
        responses: ``(N,)`` int64, the response 0 … R−1 that each token belongs to.
        n_responses: R.
        entropy: ``(N,)`` float32 nats, entropy of the distribution that each token was chosen from;
            None where it was not asked for.
    """

    logprobs: Tensor
    greedy: Tensor
    responses: Tensor
    n_responses: int
    entropy: Tensor | None = None

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
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
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
        chunk: Tokens at a time; None chooses. It changes nothing but memory, speed and rounding.
        entropy: Whether to compute the entropy at each place as well, which takes one more pass
            over the logits.

    Returns:
        The log-probabilities ``(N,)`` float32 in nats; ``(N,)`` bool, whether no token was more
        likely; and the entropies ``(N,)`` float32 in nats, or None. Log-probabilities and
        entropies can be differentiated once.
    """
    device = hidden.device.type
    factors = hidden.dtype
    if torch.is_autocast_enabled(device):
        factors = torch.get_autocast_dtype(device)
    if device == "cpu":  # there it would cost accuracy and gain nothing
        factors = torch.float32
    if chunk is None:
        chunk = max(1, LOGITS_AT_ONCE // len(weight))
        if device == "cpu":
            chunk = min(chunk, CPU_TOKENS_AT_ONCE)
    with torch.autocast(device, enabled=False):
        found: tuple[Tensor, Tensor, Tensor | None] = _Logprobs.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, chunk, factors, entropy
        )
    return found


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
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        normalisers = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if wants_entropy else None
        greedy = torch.empty_like(targets, dtype=torch.bool)
        head = weight.to(factors)
        for part in _parts(len(targets), chunk):
            logits = _logits(hidden[part].to(factors), head, bias)
            chosen = logits.gather(1, targets[part, None]).squeeze(1)
            greedy[part] = chosen >= logits.amax(dim=1)
            normalisers[part] = logits.logsumexp(dim=1)
            logprobs[part] = chosen - normalisers[part]
            if entropy is not None:
                log_p = logits.sub_(normalisers[part, None])
                entropy[part] = log_p.exp().mul_(log_p).sum(dim=1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropy)
        ctx.chunk, ctx.factors = chunk, factors
        ctx.mark_non_differentiable(greedy)
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing here
        return logprobs, greedy, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logprobs: Tensor | None, _: None, of_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(normalisers)
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(ctx.factors)
            for part in _parts(len(targets), ctx.chunk):
                states = hidden[part].to(ctx.factors)
                log_p = _logits(states, head, bias).sub_(normalisers[part, None])
                pull = None
                if of_entropy is not None:
                    pull = entropy[part, None], of_entropy[part, None]
                of_logits = _of_logits(log_p, targets[part, None], of_logprobs[part, None], pull)
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
            None, None, None, None,
        )  # fmt: skip


def _of_logits(
    log_p: Tensor, targets: Tensor, of_logprobs: Tensor, pull: tuple[Tensor, Tensor] | None
) -> Tensor:
    """``(C, V)`` gradient of the logits, in place of their log-softmax.

    d log p(target) / d logits = 1[target] − p, and dH / d logits = −p (log p + H).

    Args:
        log_p: ``(C, V)``, is overwritten.
        targets: ``(C, 1)``.
        of_logprobs: ``(C, 1)`` gradient of the log-probabilities of the targets.
        pull: Entropies ``(C, 1)`` and their gradient ``(C, 1)``, if they have one.
    """
    if pull is None:
        of_logits, of_entropy = log_p.exp_().neg_(), None
    else:
        entropy, gradient = pull
        of_logits = log_p.exp().neg_()
        of_entropy = log_p.add_(entropy).mul_(of_logits).mul_(gradient)
    of_logits.scatter_add_(1, targets, torch.ones_like(of_logprobs)).mul_(of_logprobs)
    return of_logits if of_entropy is None else of_logits.add_(of_entropy)


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
