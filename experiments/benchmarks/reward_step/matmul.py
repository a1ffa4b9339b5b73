"""The yardstick: how fast this machine multiplies matrices right now."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from experiments.benchmarks.reward_step.job import Job
from experiments.benchmarks.reward_step.turns import Turns

SQUARE = 2048


def run(turns: Turns, job: Job) -> None:
    """Measure both rates, once a turn, until the driver ends the process."""
    dtype = torch.float32 if job.dtype == "fp32" else torch.bfloat16
    square = [_linear(SQUARE, SQUARE, SQUARE, dtype)[0]] * 3
    layer = [
        product
        for (a, b), count in job.size.linear_shapes.items()
        for product in _linear(job.tokens_per_microbatch, a, b, dtype) * (count // job.size.layers)
    ]
    turns.wait_first()
    while True:
        rates = {"square": _rate(square), "layers": _rate(layer)}
        turns.end(lambda rates=rates: rates)  # type: ignore[misc]


def _linear(tokens: int, a: int, b: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The products of a linear layer: forward, gradient of the input, gradient of the weights."""
    x, weight, gradient = (
        torch.randn(*shape).to(dtype) for shape in ((tokens, a), (b, a), (tokens, b))
    )
    return [(x, weight.t()), (gradient, weight), (gradient.t(), x)]


def _rate(products: list[tuple[Tensor, Tensor]]) -> float:
    """FLOP/s over some products; each runs once before it counts."""
    flops, seconds = 0.0, 0.0
    for left, right in products:
        out = torch.mm(left, right)
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds += time.perf_counter() - started
        flops += 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
    return flops / seconds
