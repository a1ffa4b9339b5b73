"""From the parts of an iteration to its rewards, advantages and figures, and the final files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import Group
from helpsteer2.data.sources.group_files import write_groups
from helpsteer2.data.token_store import TokenWriter
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.functional.advantages import Whitening
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.records import write_json_atomic
from helpsteer2.rollouts.advantages import Advantages, ResponseRewards, TokenBlock
from helpsteer2.rollouts.figures import Figures
from helpsteer2.rollouts.scoring import RewardFunction
from helpsteer2.rollouts.settings import RolloutSettings
from helpsteer2.rollouts.store import COLUMNS, GROUPS, OF_TOKENS, RECORD, TOKENS

Array = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """What is known of the responses to some prompts; everything is read when it is asked for.

    Attributes:
        n_prompts: Number of prompts.
        groups: The samples.
        tokens: The same as ids.
        scores: ``(R, A)`` of the reward model.
        watched: Likewise of another scorer, by its name.
        logprobs: ``(1, N)`` log-probabilities as training computes them; ``(2, N)`` with values.
        ref_logprobs: ``(N,)`` under the reference.
    """

    n_prompts: int
    groups: Callable[[], list[Group]]
    tokens: Callable[[], list[TokenGroup]]
    scores: Callable[[], Float32]
    watched: Callable[[str], Float32]
    logprobs: Callable[[], Float32]
    ref_logprobs: Callable[[], Float32]


def assemble(
    folder: Path,
    blocks: Sequence[Block],
    *,
    reward: RewardFunction,
    watched: Mapping[str, RewardFunction],
    settings: RolloutSettings,
    advantages: Advantages,
    kl: KLPenalty,
    before: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
) -> None:
    """Write the files of a finished iteration, ``record.json`` last.

    The blocks are read several times, one after the other, so that memory does not grow with their
    number.

    Args:
        folder: Of the iteration.
        blocks: Its blocks.
        reward: What makes rewards of scores.
        watched: Other scorers, by name.
        settings: How rollouts are made.
        advantages: What makes advantages of rewards.
        kl: The penalty on leaving the reference.
        before: Record of the iteration before; None if this is the first.
        seconds: Time of each stage so far; that of this one joins them.
    """
    started = time.perf_counter()
    coefficient = kl.coefficient if before is None else before["next_kl_coefficient"]
    figures = Figures(reward, watched)
    parts = []
    for block in blocks:
        earned = _earned(block, reward, settings, kl, coefficient)
        parts.append(earned)
        figures.add(block, earned)
    everything = ResponseRewards(
        np.concatenate([part.rewards for part in parts]),
        np.concatenate([part.penalties for part in parts]),
        np.concatenate([part.counted for part in parts]),
    )
    work = _Advantages(blocks, everything, advantages, kl, coefficient)
    _write_tokens(folder, blocks, work)
    write_groups(folder / GROUPS, _scored(blocks, reward), ())
    metrics = figures.metrics()
    beyond = settings.max_kl is not None and metrics["rollout/kl"] > settings.max_kl
    rate = 1.0 if before is None else before["rate_factor"]
    if beyond and settings.beyond_max_kl == "shrink":
        rate /= 2
    samples = everything.rewards.size
    metrics["rollout/kl_coefficient"] = coefficient
    metrics["rollout/rate_factor"] = rate
    write_json_atomic(
        folder / RECORD,
        {
            "metrics": metrics,
            "kl_coefficient": coefficient,
            "next_kl_coefficient": kl.next_coefficient(coefficient, metrics["rollout/kl"], samples),
            "rate_factor": rate,
            "stops": beyond and settings.beyond_max_kl == "stop",
            "seconds": {**seconds, "assembling": time.perf_counter() - started},
        },
    )


def _earned(
    block: Block,
    reward: RewardFunction,
    settings: RolloutSettings,
    kl: KLPenalty,
    coefficient: float,
) -> ResponseRewards:
    """Rewards and penalties of the responses of a block."""
    groups = block.groups()
    cut = np.array([[reason == "length" for reason in g.finish_reasons or ()] for g in groups])
    rewards = reward.rewards(block.scores()).reshape(cut.shape)
    if settings.unfinished == "penalise":
        rewards = rewards - settings.penalty * cut
    lengths = _lengths(block)
    penalties = np.zeros(cut.shape)
    if kl.place == "reward":
        of_tokens = coefficient * _penalties(block, kl, lengths)
        penalties = np.add.reduceat(of_tokens, np.cumsum(lengths) - lengths).reshape(cut.shape)
    counted = ~cut if settings.unfinished == "mask" else np.ones_like(cut)
    return ResponseRewards(rewards, penalties, counted)


def _penalties(block: Block, kl: KLPenalty, lengths: npt.NDArray[np.int64]) -> Array:
    """``(N,)`` penalty of each token, without the coefficient."""
    log_ratio = block.logprobs()[0].astype(np.float64) - block.ref_logprobs()
    return np.asarray(kl.token_penalties(log_ratio, lengths))


def _lengths(block: Block) -> npt.NDArray[np.int64]:
    """``(R,)`` tokens of each response."""
    lengths = [len(ids) for group in block.groups() for ids in group.response_ids or ()]
    return np.array(lengths, np.int64)


class _Advantages:
    """Advantages of the tokens of each block, whitened over all of them if asked for."""

    def __init__(
        self,
        blocks: Sequence[Block],
        earned: ResponseRewards,
        advantages: Advantages,
        kl: KLPenalty,
        coefficient: float,
    ) -> None:
        self.blocks, self.earned, self.advantages = blocks, earned, advantages
        self.kl, self.coefficient = kl, coefficient
        self.firsts = np.cumsum([0, *(block.n_prompts for block in blocks)])
        self._whitening = None
        if advantages.whiten:
            self._whitening = Whitening()
            for number in range(len(blocks)):
                raw, _, counted = self._raw(number)
                self._whitening.add(raw[counted])

    def of(self, number: int) -> dict[str, npt.NDArray[Any]]:
        """The columns that advantages bring, each ``(N,)``."""
        raw, returns, counted = self._raw(number)
        columns = {
            "advantages": raw if self._whitening is None else self._whitening(raw),
            "counted": counted,
        }
        return columns if returns is None else {**columns, "returns": returns}

    def _raw(self, number: int) -> tuple[Array, Array | None, npt.NDArray[np.bool_]]:
        block = self.blocks[number]
        own = block.logprobs()
        lengths = _lengths(block)
        penalties = np.zeros(own.shape[1])
        if self.kl.place == "reward":
            penalties = self.coefficient * _penalties(block, self.kl, lengths)
        prompts = slice(int(self.firsts[number]), int(self.firsts[number + 1]))
        values = own[1].astype(np.float64) if len(own) > 1 else None
        tokens = TokenBlock(prompts, lengths, penalties, values)
        raw, returns = self.advantages(self.earned, tokens)
        counted = np.repeat(self.earned.counted[prompts].reshape(-1), lengths)
        return raw, returns, counted


def _write_tokens(folder: Path, blocks: Sequence[Block], work: _Advantages) -> None:
    """Write what training reads: ids, and the columns of their tokens."""
    shutil.rmtree(folder / TOKENS, ignore_errors=True)
    total = sum(block.logprobs().shape[1] for block in blocks)
    n_columns = len(OF_TOKENS) if work.advantages.needs_critic else len(OF_TOKENS) - 2
    columns = np.lib.format.open_memmap(
        folder / COLUMNS, mode="w+", dtype=np.float32, shape=(total, n_columns)
    )
    first = 0
    with TokenWriter(folder / TOKENS, ()) as writer:
        for number, block in enumerate(blocks):
            own = block.logprobs()
            named: dict[str, npt.NDArray[Any]] = {
                "logprobs": own[0],
                "ref_logprobs": block.ref_logprobs(),
                **work.of(number),
            }
            if len(own) > 1:
                named["values"] = own[1]
            rows = slice(first, first + own.shape[1])
            for i, name in enumerate(OF_TOKENS[:n_columns]):
                columns[rows, i] = named[name]
            first = rows.stop
            for group, tokens in zip(block.groups(), block.tokens(), strict=True):
                writer.add(tokens, group.id)
        writer.finish(TOKENS, {})
    columns.flush()


def _scored(blocks: Sequence[Block], reward: RewardFunction) -> Iterator[Group]:
    """The samples with scores and rewards."""
    names = reward.rewarder.attribute_names
    for block in blocks:
        scores = block.scores()
        rewards = reward.rewards(scores)
        first = 0
        for group in block.groups():
            rows = slice(first, first + len(group.responses))
            first = rows.stop
            yield replace(
                group,
                scores=tuple(tuple(row) for row in scores[rows].tolist()),
                score_names=names,
                rewards=tuple(rewards[rows].tolist()),
            )
