"""Which prompts are answered, and in what order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.models.policy import Policy
from helpsteer2.models.start import PolicyStart
from helpsteer2.rollouts.prompts import Prompts, read_training_prompts
from tests.rollouts.runs import Run, ToyPrompts


def test_fewer_prompts_than_asked_for_are_refused_before_any_model_loads(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PolicyStart, "build", lambda *_: pytest.fail("built"))
    run = Run(policy, data=ToyPrompts(7), rollouts={"rewarder": lambda: pytest.fail("opened")})
    with pytest.raises(UserError, match=r"there are 7 prompts, fewer than rollouts\.prompts=8"):
        run.train(tmp_path / "run")


def test_long_prompts_are_left_out_counted_and_named(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    chat = Policy.from_pretrained(policy)[2]
    every = list(ToyPrompts().prompts("train", None))
    lengths = {group.id: len(chat.prompt_ids(group.prompt)) for group in every}
    limit = sorted(lengths.values())[15]
    with caplog.at_level(logging.WARNING):
        groups, report = read_training_prompts(ToyPrompts(), chat, limit)
    long = [name for name, length in lengths.items() if length > limit]
    assert [group.id for group in groups] == [name for name in lengths if name not in long]
    assert report.prompts_too_long == len(long) > 0
    assert report.prompts == 24 - len(long)
    assert f"{len(long)} of 24 prompts" in caplog.text
    assert all(name in caplog.text for name in long[:5])
    with pytest.raises(UserError, match=r"none of the 24 prompts .* lengths\.max_prompt_tokens"):
        read_training_prompts(ToyPrompts(), chat, 2)


class Twice(ToyPrompts):
    """The first prompt comes again."""

    def prompts(self, split: str, report: Any) -> Iterator[Group]:
        yield from super().prompts(split, report)
        yield next(super().prompts(split, report))


def test_two_prompts_of_one_id_are_refused(tmp_path: Path, policy: str) -> None:
    with pytest.raises(UserError, match="two prompts have the id 'prompt-0'"):
        Run(policy, data=Twice()).train(tmp_path / "run")


def test_a_pass_has_every_prompt_once_and_each_is_in_another_order() -> None:
    every = list(ToyPrompts(20).prompts("train", None))
    prompts = Prompts(every, 8, seed=3)
    passes = [
        [group.id for number in (first, first + 1) for group in prompts.of_iteration(number)]
        for first in (0, 2, 4)
    ]
    assert prompts.iterations_per_pass == 2
    assert all(len(set(names)) == 16 for names in passes)  # 4 are left over
    assert len({tuple(names) for names in passes}) == 3
    again = Prompts(every, 8, seed=3).of_iteration(3)
    assert [group.id for group in again] == passes[1][8:]
