"""How biased the gradient of few responses is, against the gradient of KL(P ‖ Q)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.benchmarks.steerlm2_exact.world import World, drawn, log_probabilities, pushes

AT_ONCE = 2000
"""Groups of each prompt in one call of the loss."""


def jacobian(tables: Tensor) -> Tensor:
    """``(K, 64, S·V)`` gradient of each outcome's log-probability by the prompt's own table."""
    one = torch.func.jacrev(lambda table: log_probabilities(table[None])[0])
    return torch.func.vmap(one)(tables).flatten(start_dim=2)


@dataclass(frozen=True)
class Moments:
    """First and second moments of pushes, over independent groups of each prompt.

    Attributes:
        mean: ``(K, 64)``.
        covariance: ``(K, 64, 64)`` of one group.
        groups: How many of each prompt.
    """

    mean: Tensor
    covariance: Tensor
    groups: int

    @classmethod
    def of(cls, world: World, tables: Tensor, n: int, groups: int, seed: int) -> Moments:
        """Draw groups of n responses of the world's proposal, for a policy."""
        rng = np.random.default_rng([seed, n])
        own, proposal = log_probabilities(tables), log_probabilities(world.proposal)
        total, squares = torch.zeros_like(own), 0.0
        for first in range(0, groups, AT_ONCE):
            counts = drawn(rng, proposal, n, min(AT_ONCE, groups - first))
            found = pushes(counts, own, proposal, world.log_targets)
            total = total + found.sum(dim=0)
            squares = squares + torch.einsum("gka,gkb->kab", found, found)
        mean = total / groups
        return cls(mean, squares / groups - mean[:, :, None] * mean[:, None], groups)


def bias(world: World, tables: Tensor, n: int, groups: int, seed: int) -> dict[str, float]:
    """How far the mean gradient of groups is from that of KL(P ‖ Q), by the norm of the latter.

    Args:
        world: What is known.
        tables: The policy that learns.
        n: Responses of a group.
        groups: How many are drawn of each prompt.
        seed: Of the draws.

    Returns:
        ``bias`` (its square freed of the noise of a mean), ``standard_error``, ``predicted`` (the
        term in 1/n, exact) and ``noise`` (root mean square of one group about the mean).
    """
    moments, directions = Moments.of(world, tables, n, groups, seed), jacobian(tables)
    p, q = world.posterior.exp(), log_probabilities(tables).exp()
    sampled = log_probabilities(world.proposal).exp()

    def gradient(push: Tensor) -> Tensor:
        return torch.einsum("ka,kad->kd", push, directions)

    norm = gradient(q - p).norm()
    error = gradient(moments.mean - (q - p))
    spread = torch.einsum("kab,kad,kbd->", moments.covariance, directions, directions)
    along = torch.einsum("kd,kad->ka", error / error.norm(), directions)
    variance = torch.einsum("ka,kab,kb->", along, moments.covariance, along) / groups
    # A self-normalised mean of f is off by −E_Q′ r² (f − E f) / n, r the ratio to Q′.
    bent = [r**2 / sampled - r * (r**2 / sampled).sum(dim=1, keepdim=True) for r in (p, q)]
    unbiased = float(error.square().sum() - spread / groups)
    return {
        "bias": max(unbiased, 0.0) ** 0.5 / float(norm),
        "standard_error": float(variance.sqrt() / norm),
        "predicted": float(gradient(bent[0] - bent[1]).norm() / norm / n),
        "noise": float(spread.sqrt() / norm),
    }


def slope(rows: list[dict[str, Any]], first: int) -> dict[str, float]:
    """Exponent s of bias ≈ c·n^s by weighted least squares of logarithms.

    Args:
        rows: Biases; those below two standard errors are left out.
        first: Responses a prompt from which on they are fitted.

    Returns:
        ``slope`` and its ``standard_error``; NaN of fewer than two rows.
    """
    used = [row for row in rows if row["n"] >= first and row["bias"] > 2 * row["standard_error"]]
    if len(used) < 2:
        return {"slope": float("nan"), "standard_error": float("nan")}
    x, y = (np.log([row[name] for row in used]) for name in ("n", "bias"))
    weights = np.array([(row["bias"] / row["standard_error"]) ** 2 for row in used])
    centred = x - (weights @ x) / weights.sum()
    information = weights @ centred**2
    return {
        "slope": float(weights * centred @ y / information),
        "standard_error": float(information**-0.5),
    }


def largest_push_at_the_posterior(world: World, seed: int) -> float:
    """Largest gradient by log Q where Q is the posterior, over groups of 2 and of 10 responses.

    Proposals are any: random ones of their own.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found = []
    for n in (2, 10):
        for _ in range(10):
            tables = 2 * torch.randn(world.proposal.shape, generator=generator).double()
            proposal = log_probabilities(tables)
            counts = drawn(rng, proposal, n, 100)
            found.append(pushes(counts, world.posterior, proposal, world.log_targets).abs().max())
    return float(torch.stack(found).max())
