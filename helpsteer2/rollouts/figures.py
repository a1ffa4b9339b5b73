"""What an iteration of rollouts is like, in figures for the dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from helpsteer2.data.groups import Group
from helpsteer2.functional.kl import kl_estimate
from helpsteer2.functional.running import PairwiseMoments
from helpsteer2.rollouts.advantages import ResponseRewards
from helpsteer2.rollouts.scoring import RewardFunction

if TYPE_CHECKING:
    from helpsteer2.rollouts.assemble import Block

Array = npt.NDArray[np.float64]

WINDOW = 3
"""Tokens of the pieces that ``repetition`` looks for."""


class Figures:
    """Sums over the blocks of an iteration.

    Args:
        reward: What makes rewards of scores.
        watched: Other scorers, by name.
    """

    def __init__(self, reward: RewardFunction, watched: Mapping[str, RewardFunction]) -> None:
        self._reward, self._watched = reward, watched
        names = [f"score/{name}" for name in reward.rewarder.attribute_names]
        self._names = ["reward", "weighted_score", *names, "kl", "kl_k3", "tokens", "unfinished"]
        self._names += ["empty", "repetition", "logprob", *(f"watch/{name}" for name in watched)]
        self._moments = PairwiseMoments(len(self._names))
        self._gap_sum, self._gap_max, self._gaps = 0.0, 0.0, 0
        self._spread: list[Array] = []

    def add(self, block: Block, earned: ResponseRewards) -> None:
        """Take a block in.

        Args:
            block: The block.
            earned: What its responses have earned.
        """
        groups, own, scores = block.groups(), block.logprobs()[0].astype(np.float64), block.scores()
        lengths = np.array([len(ids) for group in groups for ids in group.response_ids or ()])
        starts = np.cumsum(lengths) - lengths
        log_ratio = own - block.ref_logprobs()
        columns = [
            earned.rewards.reshape(-1),
            self._reward.plain(scores),
            *scores.astype(np.float64).T,
            np.add.reduceat(log_ratio, starts),
            np.add.reduceat(kl_estimate(log_ratio, "k3"), starts),
            lengths.astype(np.float64),
            *_text_columns(groups),
            np.add.reduceat(own, starts),
        ]
        columns += [by.plain(block.watched(name)) for name, by in self._watched.items()]
        self._moments.add(np.stack(columns, axis=1))
        self._spread.append(earned.rewards.std(axis=1))
        sampled = [row for group in groups for row in group.logprobs or ()]
        if len(sampled) == len(lengths):
            gaps = np.abs(own - np.concatenate([np.asarray(row) for row in sampled]))
            self._gap_sum, self._gaps = self._gap_sum + float(gaps.sum()), self._gaps + len(gaps)
            self._gap_max = max(self._gap_max, float(gaps.max(initial=0.0)))

    def metrics(self) -> dict[str, float]:
        """The figures by name.

        Returns:
            Means over responses of ``rollout/reward`` (with what unfinished ones lose),
            ``weighted_score`` (not standardised), ``score/…``, ``kl`` (log-ratio to the reference
            summed over a response, nats: the unbiased estimate of the divergence), ``kl_k3`` (the
            same by k3), ``tokens``, ``unfinished``, ``empty`` and ``repetition`` (shares);
            ``reward_std`` over all of them, ``reward_std_in_prompt`` between those to one prompt;
            ``entropy`` (nats a token, estimated by −log π of what was sampled);
            ``sampler_gap_mean`` and ``sampler_gap_max`` (how far the sampler's log-probabilities
            are from those of training, nats a token); and of each watcher ``watch/NAME`` and
            ``watch/NAME_correlation`` with the reward.
        """
        means = dict(zip(self._names, self._moments.means().tolist(), strict=True))
        stds = dict(zip(self._names, self._moments.stds().tolist(), strict=True))
        logprob = means.pop("logprob")
        figures = {f"rollout/{name}": value for name, value in means.items()}
        figures["rollout/entropy"] = -logprob / means["tokens"]
        figures["rollout/reward_std"] = _known(stds["reward"])
        figures["rollout/reward_std_in_prompt"] = float(np.concatenate(self._spread).mean())
        if self._gaps:
            figures["rollout/sampler_gap_mean"] = self._gap_sum / self._gaps
            figures["rollout/sampler_gap_max"] = self._gap_max
        if self._watched:
            correlations = self._moments.correlations()[0]
            for name in self._watched:
                found = float(correlations[self._names.index(f"watch/{name}")])
                figures[f"rollout/watch/{name}_correlation"] = _known(found)
        return figures


def _known(value: float) -> float:
    """0 in place of NaN: of one response, or of equal rewards, there is no spread."""
    return 0.0 if np.isnan(value) else value


def _text_columns(groups: list[Group]) -> list[Array]:
    """Of each response, whether it is unfinished, whether it is empty, and its repetition."""
    cut = [reason == "length" for group in groups for reason in group.finish_reasons or ()]
    empty = [not text.strip() for group in groups for text in group.responses]
    repeated = [repetition(ids) for group in groups for ids in group.response_ids or ()]
    return [np.array(column, np.float64) for column in (cut, empty, repeated)]


def repetition(ids: tuple[int, ...]) -> float:
    """Share of the pieces of three tokens that a response has had before.

    Args:
        ids: Its tokens.

    Returns:
        0 (none) to 1; 0 for a response too short to repeat anything.
    """
    pieces = list(zip(*(ids[start:] for start in range(WINDOW)), strict=False))
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0
