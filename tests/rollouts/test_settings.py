"""Settings that make sense together, and those that do not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpsteer2.commands.train import train
from helpsteer2.errors import UserError
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.models.start import PolicyStart
from helpsteer2.rollouts.advantages import GAE, AgainstBaseline
from tests.rollouts.runs import Run, ToyPrompts, ToyScorer, iteration, metrics, rollout_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": SamplingParams(temperature=0.9)}, r"sampling\.temperature has to be 1"),
        ({"sampling": SamplingParams(top_p=0.9)}, r"sampling\.top_p has to be 1"),
        ({"sampling": SamplingParams(top_k=5)}, r"sampling\.top_k has to be 0"),
        ({"prompts": 0}, r"rollouts\.prompts has to be 1 or more"),
        ({"epochs": 0}, r"rollouts\.epochs has to be 1 or more"),
        ({"max_kl": 0.0}, r"rollouts\.max_kl has to be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rollout_settings(**changes)


def test_advantages_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"module\.advantages\.lam has to be 0 to 1"):
        GAE(lam=1.5)
    with pytest.raises(UserError, match=r"set module\.advantages\.baseline=leave_one_out"):
        AgainstBaseline("batch_mean", normalise=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 3}, r"rollouts\.prompts=8 are no whole number of steps"),
        ({"rollouts": {"statistics": "nowhere.json"}}, "nowhere.json cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_policy_is_built(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(PolicyStart, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match=message):
        Run(policy, **changes).train(tmp_path / "run")


@pytest.mark.parametrize("names", [("letters",), ("letters", "length")])
def test_several_scores_need_a_weighting_and_one_does_not(
    tmp_path: Path, policy: str, names: tuple[str, ...]
) -> None:
    run = Run(policy, "reinforce", max_steps=1, rollouts={"rewarder": partial(Named, names)})
    given = run.arguments(tmp_path / "run") | {"weights": None}
    if len(names) > 1:
        with pytest.raises(UserError, match=r"scores letters, length: choose weights="):
            train(**given)
        return
    train(**given)
    for group in iteration(tmp_path / "run").groups():
        assert group.rewards == tuple(score for (score,) in group.scores or ())


class Named(ToyScorer):
    """Has the first scores alone."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(attribute_names=names)

    def _of(self, text: str) -> tuple[float, ...]:  # type: ignore[override]
        return super()._of(text)[: len(self.attribute_names)]


def test_passes_over_the_prompts_become_iterations(tmp_path: Path, policy: str) -> None:
    run = Run(policy, "reinforce", data=ToyPrompts(20))
    for passes, iterations in ((1, 2), (1.5, 3)):
        run_dir = tmp_path / str(passes)
        given = run.arguments(run_dir)
        given["batching"] = replace(given["batching"], max_steps=None, epochs=passes)
        train(**given)
        assert len(list((run_dir / "rollouts").iterdir())) == iterations
        assert max(metrics(run_dir)) == iterations * 8 * 2 / 4
    given["batching"] = replace(given["batching"], epochs=0.2)
    with pytest.raises(UserError, match="less than one iteration"):
        train(**given | {"run_dir": str(tmp_path / "none")})


def test_another_iteration_draws_anew(tmp_path: Path, policy: str) -> None:
    """Of the same prompts and the same weights, every time; and so does another seed."""
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    drawn = []
    for seed in (1, 2):
        run = Run(policy, "reinforce", max_steps=8, seed=seed, data=ToyPrompts(8), module=still)
        run.train(tmp_path / str(seed))
        for number in (0, 1):
            groups = iteration(tmp_path / str(seed), number).groups()
            drawn.append({group.id: group.response_ids for group in groups})
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert first.keys() == second.keys()
            assert all(first[name] != second[name] for name in first)
