"""Exact optimizer steps: which groups, in which micro-batches, on which rank.

A step is a fixed number of groups whatever the hardware. The stream of groups is concatenated
seeded permutations of the data set, and step s takes groups [sB, (s+1)B) of it, across epoch
borders. So a run is a pure function of (lengths, seed, step), and resuming needs only the step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from helpsteer2.errors import UserError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Groups that go through the model in one packed row.

    Attributes:
        groups: Positions in the data set, at least one.
        counted: False for a filler that keeps ranks in step: its labels are blanked.
    """

    groups: tuple[int, ...]
    counted: bool = True


class StepPlan:
    """The whole schedule of a training run, computed step by step.

    Args:
        lengths: ``(G,)`` tokens of each group as packed; may be memory-mapped.
        global_batch: B, groups of one optimizer step over all ranks.
        tokens_per_microbatch: A micro-batch holds at most so many tokens; a longer group gets a
            micro-batch of its own.
        total_steps: Number of optimizer steps.
        seed: Seed of the permutations.
        world_size: Number of ranks.

    Raises:
        UserError: If there are fewer groups than a batch, or a batch has fewer groups than ranks.
    """

    def __init__(
        self,
        lengths: Indices,
        *,
        global_batch: int,
        tokens_per_microbatch: int,
        total_steps: int,
        seed: int,
        world_size: int = 1,
    ) -> None:
        if len(lengths) < global_batch:
            raise UserError(
                f"the training data holds {len(lengths)} groups, fewer than one step of "
                f"batching.global_batch={global_batch}: lower it"
            )
        if global_batch < world_size:
            raise UserError(
                f"batching.global_batch={global_batch} is less than one group for each of the "
                f"{world_size} ranks: raise it or use fewer devices"
            )
        self.lengths = lengths
        self.global_batch = global_batch
        self.tokens_per_microbatch = tokens_per_microbatch
        self.total_steps = total_steps
        self.world_size = world_size
        # The permutation of an epoch is needed for many steps in a row, and by no one else.
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(lengths))
        )

    def groups(self, step: int) -> Indices:
        """The ``(B,)`` groups of a step, in stream order.

        Args:
            step: 0 … total_steps − 1.
        """
        size = len(self.lengths)
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        epochs, offsets = positions // size, positions % size
        first = self._permutation(int(epochs[0]))
        if epochs[0] == epochs[-1]:
            return first[offsets]
        second = self._permutation(int(epochs[-1]))
        return np.where(epochs == epochs[0], first[offsets], second[offsets])

    def step(self, step: int) -> list[list[MicroBatch]]:
        """Cut a step into micro-batches, the same number on every rank.

        Args:
            step: 0 … total_steps − 1.

        Returns:
            A list of micro-batches for each rank.
        """
        groups = self.groups(step)
        bins = pack_bins(
            np.asarray(self.lengths[groups]), self.tokens_per_microbatch, self.world_size
        )
        batches = [MicroBatch(tuple(int(groups[i]) for i in members)) for members in bins]
        while len(batches) % self.world_size:
            shortest = int(groups[np.argmin(self.lengths[groups])])
            batches.append(MicroBatch((shortest,), counted=False))
        return [batches[rank :: self.world_size] for rank in range(self.world_size)]


def steps_for_epochs(n_groups: int, global_batch: int, epochs: float) -> tuple[int, int]:
    """Full steps in some passes over the data.

    Args:
        n_groups: Groups in the data set.
        global_batch: Groups of a step.
        epochs: Passes over the data.

    Returns:
        The number of full steps, and the groups of the last partial step, which is dropped:
        10,162 pairs × 2 epochs at 64 give 317 steps (arXiv 2406.08673) and 36 dropped.
    """
    total = int(n_groups * epochs)
    return total // global_batch, total % global_batch


def pack_bins(lengths: Indices, budget: int, ranks: int = 1) -> list[list[int]]:
    """Cut items into as few bins as first-fit decreasing finds, then level them.

    Args:
        lengths: ``(B,)`` tokens of each item.
        budget: Tokens a bin may hold; an item above it gets a bin of its own.
        ranks: The number of bins is rounded up to a multiple of this, as far as there are items.

    Returns:
        Item numbers of each bin, no bin empty, every item once; longest bin first.
    """
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = []
    room: list[int] = []
    for item in order:
        length = int(lengths[item])
        target = next((b for b, free in enumerate(room) if length <= free), None)
        if target is None:
            bins.append([int(item)])
            room.append(budget - length)
        else:
            bins[target].append(int(item))
            room[target] -= length
    wanted = min(-(-len(bins) // ranks) * ranks, len(lengths))
    levelled = _level(lengths, order, wanted)
    fits = all(len(b) == 1 or lengths[b].sum() <= budget for b in levelled)
    chosen = levelled if fits else bins
    return sorted(chosen, key=lambda b: -int(lengths[b].sum()))


def consecutive_bins(lengths: Iterable[int], budget: int) -> Iterator[range]:
    """Cut a sequence into runs that fit a budget, in order: with no padding, order costs nothing.

    Args:
        lengths: Tokens of each item.
        budget: Tokens of a run; a longer item is a run of its own.

    Yields:
        The item numbers of each run.
    """
    start, total, item = 0, 0, -1
    for item, length in enumerate(lengths):
        if item > start and total + length > budget:
            yield range(start, item)
            start, total = item, 0
        total += int(length)
    if item >= start:
        yield range(start, item + 1)


def _level(lengths: Indices, order: Indices, n_bins: int) -> list[list[int]]:
    """Longest item to the emptiest bin: even bins, which may overrun a budget."""
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    heap = [(0, b) for b in range(n_bins)]
    for item in order:
        load, b = heapq.heappop(heap)
        bins[b].append(int(item))
        heapq.heappush(heap, (load + int(lengths[item]), b))
    return bins
