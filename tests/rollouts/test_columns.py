"""What stands at each token of an iteration, recomputed response by response."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpsteer2.data.groups import Group
from helpsteer2.functional.kl import KLEstimator
from helpsteer2.losses.kl_penalty import KLPenalty, Reduction
from helpsteer2.models.policy import Policy
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from helpsteer2.rollouts.store import Rollouts
from tests.rollouts.runs import SAMPLING, make

T = TypeVar("T")

ESTIMATES = {
    "k1": lambda x: x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: math.exp(-x) - 1 + x,
    "abs": abs,
}


@dataclass
class Response:
    """One response of an iteration, as its files have it."""

    group: Group
    prompt_ids: np.ndarray
    ids: np.ndarray
    reward: float
    unfinished: bool
    columns: dict[str, np.ndarray]


def responses_of(rollouts: Rollouts) -> list[list[Response]]:
    """The responses to every prompt; rewards from the scores in ``groups.jsonl``."""
    found = []
    for group, tokens in zip(rollouts.groups(), map(rollouts.__getitem__, range(99)), strict=False):
        first, row = 0, []
        for i, ids in enumerate(tokens.response_ids):
            part = slice(first, first + len(ids))
            first = part.stop
            columns = {name: column[part] for name, column in tokens.rollout.items()}
            score = dict(zip(group.score_names, group.scores[i], strict=True))
            reward = score["letters"] - 0.25 * score["length"]
            assert group.rewards[i] == pytest.approx(reward)
            assert tuple(ids) == group.response_ids[i]
            cut = group.finish_reasons[i] == "length"
            row.append(Response(group, tokens.prompt_ids, ids, reward, cut, columns))
        found.append(row)
    assert len(found) == len(rollouts)
    return found


def flat(rows: Iterable[Iterable[T]]) -> list[T]:
    return list(chain.from_iterable(rows))


def plain_logprobs(folder: str, response: Response) -> np.ndarray:
    """Through transformers' own model, one response at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([*response.prompt_ids.tolist(), *response.ids.tolist()])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(response.prompt_ids) - 1 : -1].double()
    return logits.log_softmax(1)[torch.arange(len(response.ids)), ids[-len(response.ids) :]].numpy()


def penalties(response: Response, kl: KLPenalty) -> list[float]:
    """KL penalty of each token, coefficient included."""
    columns = response.columns
    ratios = columns["logprobs"].astype(float) - columns["ref_logprobs"].astype(float)
    each = [kl.coefficient * ESTIMATES[kl.estimator](float(x)) for x in ratios]
    return each if kl.reduction == "sum" else [x / len(each) for x in each]


def by_definition(response: Response, kl: KLPenalty, lam: float, gamma: float = 1.0) -> np.ndarray:
    """``A_t = Σ_l (γλ)^l δ_{t+l}``, every one as a sum of its own."""
    values = [*response.columns["values"].astype(float), 0.0]
    rewards = [-price for price in penalties(response, kl)]
    rewards[-1] += response.reward
    n = len(rewards)
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    sums = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
    return np.array(sums)


def test_log_probabilities_are_those_of_policy_and_reference(
    tmp_path: Path, policy: str, other_policy: str
) -> None:
    rollouts = make(tmp_path, policy, AgainstBaseline(), reference=other_policy)
    for response in [row[i % 4] for i, row in enumerate(responses_of(rollouts))]:
        own, reference = (plain_logprobs(path, response) for path in (policy, other_policy))
        assert response.columns["logprobs"] == pytest.approx(own, abs=1e-4)
        assert response.columns["ref_logprobs"] == pytest.approx(reference, abs=1e-4)
        assert abs(own - reference).max() > 0.01


def test_the_responses_have_all_kinds_of_ends(tmp_path: Path, policy: str) -> None:
    """Without which the other tests here would say little."""
    everything = flat(responses_of(make(tmp_path, policy, AgainstBaseline())))
    lengths = {len(one.ids) for one in everything if not one.unfinished}
    assert {1, 2, 3} <= lengths
    cut = [one for one in everything if one.unfinished]
    assert 0 < len(cut) < len(everything) / 2
    assert {len(one.ids) for one in cut} == {SAMPLING.max_tokens}
    assert len({one.reward for one in everything}) > len(everything) / 2


@pytest.mark.parametrize("lam", [0.95, 1.0])
@pytest.mark.parametrize(
    ("estimator", "reduction"),
    [("k1", "sum"), ("k1", "mean"), ("k2", "sum"), ("k3", "mean"), ("abs", "sum")],
)
def test_advantages_are_those_of_each_response_alone(
    tmp_path: Path,
    policy: str,
    other_policy: str,
    lam: float,
    estimator: KLEstimator,
    reduction: Reduction,
) -> None:
    kl = KLPenalty(0.3, estimator, reduction)
    advantages = GAE(lam=lam, whiten=False)
    rollouts = make(tmp_path, policy, advantages, kl, reference=other_policy)
    for response in flat(responses_of(rollouts)):
        expected = by_definition(response, kl, lam)
        columns = response.columns
        assert columns["advantages"] == pytest.approx(expected, abs=2e-6)
        assert columns["returns"] == pytest.approx(expected + columns["values"], abs=2e-6)
        assert columns["counted"].all()
    if lam == 1.0:  # the return is then what is earned from the token on, whatever the critic says
        last = np.array([one.columns["returns"][-1] for one in flat(responses_of(rollouts))])
        earned = [one.reward - penalties(one, kl)[-1] for one in flat(responses_of(rollouts))]
        assert last == pytest.approx(np.array(earned), abs=2e-6)


def test_a_penalty_in_the_loss_is_not_in_the_rewards(
    tmp_path: Path, policy: str, other_policy: str
) -> None:
    kl = KLPenalty(0.3, "k2", place="loss")
    rollouts = make(tmp_path, policy, GAE(whiten=False), kl, reference=other_policy)
    free = KLPenalty(0.0)
    for response in flat(responses_of(rollouts)):
        expected = by_definition(response, free, 0.95)
        assert response.columns["advantages"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_packing_moves_no_reward(
    tmp_path: Path, policy: str, other_policy: str, tokens: int
) -> None:
    """The same responses in passes of another size: the same columns, but for rounding."""
    whole, cut = (
        make(tmp_path / str(size), policy, GAE(), tokens=size, reference=other_policy)
        for size in (150, tokens)
    )
    assert [a.response_ids for a in whole.groups()] == [b.response_ids for b in cut.groups()]
    for index in range(len(whole)):
        ours, theirs = (dict(x[index].rollout.items()) for x in (cut, whole))
        for name, column in theirs.items():
            assert ours[name] == pytest.approx(column, abs=1e-5), name


def leave_one_out(rewards: list[float]) -> list[float]:
    others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
    return [r - sum(o) / len(o) for r, o in zip(rewards, others, strict=True)]


def grpo(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (spread + 1e-4) for r in rewards]


def against_all(rows: list[list[float]]) -> list[list[float]]:
    mean = sum(map(sum, rows)) / sum(map(len, rows))
    return [[r - mean for r in row] for row in rows]


BASELINES: dict[str, tuple[dict[str, Any], Any]] = {
    "none": ({"baseline": "none"}, lambda rows: rows),
    "batch_mean": ({"baseline": "batch_mean"}, against_all),
    "leave_one_out": ({}, lambda rows: list(map(leave_one_out, rows))),
    "grpo": ({"normalise": True}, lambda rows: list(map(grpo, rows))),
}


def advantages_of(rows: list[list[Response]]) -> Iterator[tuple[Response, float]]:
    """The one advantage of all tokens of a response."""
    for response in flat(rows):
        found = response.columns["advantages"]
        assert (found == found[0]).all()
        yield response, float(found[0])


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_baselines_are_those_of_the_groups_file(
    tmp_path: Path, policy: str, other_policy: str, name: str, reduction: Reduction
) -> None:
    options, expected = BASELINES[name]
    kl = KLPenalty(0.2, reduction=reduction)
    rollouts = make(tmp_path, policy, AgainstBaseline(**options), kl, reference=other_policy)
    rows = responses_of(rollouts)
    totals = [[one.reward - sum(penalties(one, kl)) for one in row] for row in rows]
    wanted = flat(expected(totals))
    for (_, found), value in zip(advantages_of(rows), wanted, strict=True):
        assert found == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("advantages", [GAE(), AgainstBaseline(whiten=True)])
@pytest.mark.parametrize("unfinished", ["keep", "mask"])
def test_whitened_advantages_have_mean_0_and_deviation_1(
    tmp_path: Path, policy: str, advantages: Any, unfinished: str
) -> None:
    rollouts = make(tmp_path, policy, advantages, unfinished=unfinished)
    tokens = [rollouts[i].rollout for i in range(len(rollouts))]
    counted = np.concatenate([one.counted for one in tokens])
    found = np.concatenate([one.advantages for one in tokens])[counted].astype(float)
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std() == pytest.approx(1, abs=1e-6)
    assert counted.all() == (unfinished == "keep")


def test_rewards_are_standardised_by_the_statistics_of_the_reward_model(
    tmp_path: Path, policy: str
) -> None:
    file = tmp_path / "statistics.json"
    content = {
        "model_hash": "toy scorer", "data": "some", "responses": 9,
        "attribute_names": ["letters", "length"], "means": [0.5, 2.0],
        "covariance": [[4.0, 1.0], [1.0, 2.0]], "format_version": 1,
    }  # fmt: skip
    file.write_text(json.dumps(content))
    plain = make(tmp_path / "plain", policy, AgainstBaseline())
    scaled = make(tmp_path / "scaled", policy, AgainstBaseline(), statistics=str(file))
    mean, variance = 0.5 - 0.25 * 2.0, 4.0 - 2 * 0.25 * 1.0 + 0.25**2 * 2.0
    for ours, theirs in zip(scaled.groups(), plain.groups(), strict=True):
        expected = [(r - mean) / math.sqrt(variance) for r in theirs.rewards]
        assert ours.rewards == pytest.approx(expected)
    assert scaled.metrics["rollout/weighted_score"] == plain.metrics["rollout/weighted_score"]


def test_the_files_of_a_policy_are_those_of_its_weights(tmp_path: Path, policy: str) -> None:
    """Sampling says of its tokens what training says, and one seed gives one iteration."""
    rollouts = make(tmp_path / "a", policy, AgainstBaseline())
    again = make(tmp_path / "b", policy, AgainstBaseline())
    for name in ("groups.jsonl", "columns.npy"):
        assert (rollouts.folder / name).read_bytes() == (again.folder / name).read_bytes()
    for row in responses_of(rollouts):
        for i, response in enumerate(row):
            sampled = row[0].group.logprobs[i]
            assert response.columns["logprobs"] == pytest.approx(np.array(sampled), abs=1e-5)
    model, _, _ = Policy.from_pretrained(policy)
    assert {group.tokenizer for group in rollouts.groups()} == {model.spec.chat.ids_hash}
