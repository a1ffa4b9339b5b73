"""Rewards: one look of the reward model at a response, and what becomes of unfinished ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.train import train
from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.kl_penalty import KLPenalty
from helpsteer2.rewards.client import RewardClient
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from helpsteer2.rollouts.store import Rollouts
from tests.rewards.serving import Running, serving
from tests.rewards.tiny import tiny_reward_model
from tests.rollouts.runs import Run, ToyScorer, iteration, make, metrics
from tests.rollouts.test_steps import trained
from tests.training.test_resume import assert_same

FREE = KLPenalty(0.0)


def rewards(rollouts: Rollouts) -> np.ndarray:
    """``(G, k)`` as the file has them."""
    return np.array([group.rewards for group in rollouts.groups()])


def is_cut(rollouts: Rollouts) -> np.ndarray:
    """``(G, k)``, which responses are unfinished."""
    return np.array([[x == "length" for x in g.finish_reasons or ()] for g in rollouts.groups()])


def of_first_tokens(rollouts: Rollouts, name: str) -> np.ndarray:
    """``(G, k)``, a column at the first token of each response."""
    found = []
    for i in range(len(rollouts)):
        lengths = [len(ids) for ids in rollouts[i].response_ids]
        column = dict(rollouts[i].rollout.items())[name]
        found.append(column[np.cumsum(lengths) - lengths])
    return np.array(found)


def test_each_response_of_an_iteration_is_scored_once(tmp_path: Path, policy: str) -> None:
    calls = tmp_path / "calls"
    run = Run(policy, "reinforce", max_steps=8, rollouts={"rewarder": partial(ToyScorer, calls)})
    run.train(tmp_path / "run")
    expected = Counter(
        f"{group.id} {i}"
        for number in (0, 1)
        for group in iteration(tmp_path / "run", number).groups()
        for i in range(4)
    )
    assert Counter(calls.read_text().splitlines()) == expected
    assert expected.total() == 2 * 8 * 4


def test_masked_responses_stand_in_no_mean_and_do_not_count(tmp_path: Path, policy: str) -> None:
    rollouts = make(tmp_path, policy, AgainstBaseline(), FREE, unfinished="mask")
    earned, cut = rewards(rollouts), is_cut(rollouts)
    assert 0 < cut.sum() < cut.size
    advantages = of_first_tokens(rollouts, "advantages")
    assert (of_first_tokens(rollouts, "counted") == ~cut).all()
    for row, left_out, found in zip(earned, cut, advantages, strict=True):
        for i in np.flatnonzero(~left_out):
            others = [row[j] for j in range(4) if j != i and not left_out[j]]
            expected = row[i] - np.mean(others) if others else 0.0
            assert found[i] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("advantages", [AgainstBaseline("none"), GAE(lam=1.0, whiten=False)])
def test_a_penalty_lowers_the_reward_of_unfinished_ones_alone(
    tmp_path: Path, policy: str, advantages: Any
) -> None:
    kept = make(tmp_path / "kept", policy, advantages, FREE, unfinished="keep")
    lowered = make(
        tmp_path / "lowered", policy, advantages, FREE, unfinished="penalise", penalty=0.75
    )
    cut = is_cut(kept)
    assert 0 < cut.sum() < cut.size
    difference = of_first_tokens(kept, "advantages") - of_first_tokens(lowered, "advantages")
    assert difference == pytest.approx(0.75 * cut, abs=1e-5)
    assert of_first_tokens(lowered, "counted").all()
    means = [x.metrics["rollout/reward"] for x in (kept, lowered)]
    assert means[0] - means[1] == pytest.approx(0.75 * cut.mean())
    assert (rewards(kept) == rewards(lowered)).all()  # the files have what the reward model says


def test_empty_responses_are_scored(tmp_path: Path, policy: str) -> None:
    """By a real reward model, one that reads text with another tokenizer."""
    model = tiny_reward_model(tmp_path)
    scorer = RewardScorer.from_pretrained(model)
    rollouts = make(
        tmp_path / "run", policy, AgainstBaseline(), rewarder=partial(FirstTwo, scorer),
        sampling=SamplingParams(n=4, max_tokens=1, stop_token_ids=tuple(range(270))),
    )  # fmt: skip
    assert {text for group in rollouts.groups() for text in group.responses} == {""}
    assert rollouts.metrics["rollout/empty"] == 1
    for group in rollouts.groups():
        [expected] = scorer.score(
            [Group(group.id, "", group.prompt, ("",), finish_reasons=("stop",))]
        )
        for scores in group.scores or ():
            assert scores == pytest.approx(expected[0, :2], abs=1e-5)


def test_the_reward_model_computes_as_everywhere_whatever_training_does(
    tmp_path: Path, policy: str
) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward_model(tmp_path))
    run = Run(
        policy, "reinforce", max_steps=1, precision="bf16-mixed",
        rollouts={"rewarder": partial(FirstTwo, scorer)},
    )  # fmt: skip
    run.train(tmp_path / "run")
    groups = list(iteration(tmp_path / "run").groups())
    for group, expected in zip(groups, scorer.score(groups), strict=True):
        assert np.array(group.scores) == pytest.approx(expected[:, :2], abs=1e-5)


class FirstTwo:
    """The first two scores of a reward model, under the names of the toy scorer."""

    attribute_names = ("letters", "length")
    model_hash = "two of five"

    def __init__(self, scorer: RewardScorer) -> None:
        self.scorer = scorer

    def score(self, groups: Iterable[Group]) -> Iterator[np.ndarray]:
        return (scores[:, :2] for scores in self.scorer.score(groups))


def test_a_reward_that_is_no_number_stops_the_run_which_then_goes_on(
    tmp_path: Path, policy: str
) -> None:
    whole, run_dir, broken = tmp_path / "whole", tmp_path / "run", tmp_path / "broken"
    Run(policy, max_steps=8).train(whole)
    victim = list(iteration(whole, 1).groups())[4].id
    broken.touch()
    scorer = partial(ToyScorer, nan_for=victim, broken=broken)
    run = Run(policy, max_steps=8, rollouts={"rewarder": scorer})
    assert victim not in {group.id for group in iteration(whole).groups()}
    with pytest.raises(UserError, match=f"responses to prompt '{victim}' are not finite"):
        run.train(run_dir)
    assert not (run_dir / "result.json").exists()
    broken.unlink()
    run.train(run_dir)
    assert_same(trained(run_dir), trained(whole))
    assert (run_dir / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


class Vanishing(RewardClient):
    """A client of a server that stops, for once, before a call."""

    def __init__(self, folder: Path, calls: int) -> None:
        super().__init__((folder / "url").read_text(), attempts=2)
        self.calls, self.stop = calls, STOP.get(folder)

    def score(self, groups: Iterable[Group]) -> Iterator[np.ndarray]:
        self.calls -= 1
        if self.calls == 0 and self.stop is not None:
            self.stop.__exit__(None, None, None)
        return super().score(groups)


STOP: dict[Path, AbstractContextManager[Running]] = {}


def test_a_server_that_vanishes_is_told_of_and_the_run_goes_on(tmp_path: Path, policy: str) -> None:
    model = tiny_reward_model(tmp_path)
    run = Run(policy, max_steps=8, rollouts={"rewarder": partial(Vanishing, tmp_path, calls=6)})
    weights = {"weights": AttributeWeights("one", {"helpfulness": 1.0})}

    def go(run_dir: Path) -> None:
        train(**run.arguments(run_dir) | weights)

    STOP[tmp_path] = serving(model)
    (tmp_path / "url").write_text(STOP[tmp_path].__enter__().url)
    with pytest.raises(UserError, match=r"/score gave no answer .* Is `helpsteer2 serve` running"):
        go(tmp_path / "run")
    assert metrics(tmp_path / "run").keys() == {1, 2, 3, 4}  # in the midst of the second iteration
    del STOP[tmp_path]
    with serving(model) as again:
        (tmp_path / "url").write_text(again.url)
        go(tmp_path / "run")
        assert sum(again.scorer.calls) == 2 * 3  # groups of the three blocks that were left
        go(tmp_path / "whole")
    assert_same(trained(tmp_path / "run"), trained(tmp_path / "whole"))
