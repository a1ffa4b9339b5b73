"""Where training arrives: tables of logits on the world, and a real Llama."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.benchmarks.exact_optima.runs import start
from experiments.benchmarks.exact_optima.world import Responses
from experiments.benchmarks.steerlm2_exact.world import (
    LONGEST,
    POSITIONS,
    PROMPTS,
    STATES,
    VOCABULARY,
    World,
    divergence,
    drawn,
    log_probabilities,
    weighed,
)
from helpsteer2.data.packing import pack
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.losses.steerlm2 import SteerLM2Loss
from helpsteer2.modules.steerlm2 import SteerLM2Module

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Training:
    """A training of tables by Adam, its rate falling to 0.

    Args:
        name: What it is called.
        n: Responses a prompt; None lists all with their probabilities.
        steps: Of one iteration.
        groups: Of each prompt in a step.
        fixed: Whether all steps see the same groups.
        iterations: In each the policy so far is the proposal.
        restricted: Whether the policy cannot look at the tokens before.
        lr: Rate of Adam at the start of an iteration.
    """

    name: str
    n: int | None
    steps: int
    groups: int = 16
    fixed: bool = False
    iterations: int = 1
    restricted: bool = False
    lr: float = 0.05

    def run(self, world: World, seed: int) -> list[float]:
        """KL(P ‖ Q) in nats at the start and after each iteration, mean over prompts."""
        rng = np.random.default_rng(seed)
        states = POSITIONS if self.restricted else STATES
        shape = (PROMPTS, LONGEST, VOCABULARY)
        tables = torch.zeros(shape).double() if self.restricted else world.proposal
        proposal = log_probabilities(world.proposal)
        found = [float(divergence(world.posterior, log_probabilities(tables, states)))]
        for _ in range(self.iterations):
            tables = self._iteration(world, tables.clone(), proposal, rng)
            proposal = log_probabilities(tables, states)
            found.append(float(divergence(world.posterior, proposal)))
        return found

    def _iteration(
        self, world: World, tables: Tensor, proposal: Tensor, rng: np.random.Generator
    ) -> Tensor:
        tables.requires_grad_()
        optimizer = torch.optim.Adam([tables], lr=self.lr)
        loss = SteerLM2Loss()
        counts = None
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.lr * (1 - step / self.steps)
            if self.n is None:
                counts = proposal.exp()[None]
            elif counts is None or not self.fixed:
                counts = drawn(rng, proposal, self.n, self.groups)
            logprobs = log_probabilities(tables, POSITIONS if self.restricted else STATES)
            responses, _ = weighed(counts, logprobs, proposal, world.log_targets)
            value, sums = loss(responses)
            optimizer.zero_grad()
            (value / sums["groups"]).backward()
            optimizer.step()
        return tables.detach()


def trainings(steps: int) -> list[Training]:
    """All trainings of tables."""
    fresh = partial(Training, steps=4 * steps)
    return [
        Training("exact groups", None, steps),
        fresh("n = 10, new groups in every step", 10, iterations=2),
        fresh("n = 2, new groups in every step", 2, iterations=2),
        Training("n = 10, one group a prompt", 10, steps, 1, fixed=True, iterations=4),
        Training("n = 10, 30 groups a prompt", 10, steps, 30, fixed=True, iterations=4),
        Training("restricted, exact groups", None, steps, restricted=True, iterations=2),
        fresh("restricted, n = 10", 10, restricted=True, iterations=4),
        fresh("restricted, n = 100", 100, restricted=True, iterations=4),
    ]


def llama(steps: int, n: int | None, seed: int) -> list[float]:
    """KL(P ‖ Q) of a Llama of one layer before and after training, over 91 responses.

    Args:
        steps: Of the training.
        n: Responses of each of 32 groups a step; None lists all responses.
        seed: Of weights, likelihoods and samples.
    """
    responses, rng = Responses(2), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        policy = start(Path(folder), seed)
    module = SteerLM2Module(policy, loss=SteerLM2Loss(), optimizer=torch.optim.AdamW)
    group = responses.group(policy)
    proposal = responses.logprobs(responses.table(policy))
    targets = proposal - rng.exponential(1.0, len(proposal))
    posterior = torch.from_numpy(targets).log_softmax(dim=0)[None]

    def distance() -> float:
        own = responses.logprobs(responses.table(policy))
        return float(divergence(posterior, torch.from_numpy(own)[None]))

    def part(which: npt.NDArray[np.int64], reference: Array) -> TokenGroup:
        return replace(
            group,
            response_ids=tuple(group.response_ids[i] for i in which),
            attributes=group.attributes[which],
            rewards=targets[which].astype(np.float32),
            ref_logprobs=reference[which].astype(np.float32),
        )

    found = [distance()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    everything, chances = np.arange(len(proposal)), np.exp(proposal) / np.exp(proposal).sum()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        groups = [part(everything, np.zeros_like(proposal))]
        if n is not None:
            groups = [part(rng.choice(len(proposal), n, p=chances), proposal) for _ in range(32)]
        batch = pack(groups)
        loss, _ = module.loss_sums(batch)
        optimizer.zero_grad()
        (loss / module.count(batch)).sum().backward()
        optimizer.step()
    return [*found, distance()]
