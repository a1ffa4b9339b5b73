"""Validation groups that are learned from: refused with their rows, or told where a prompt is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.commands.train import train
from helpsteer2.data.groups import Group
from helpsteer2.data.sources.folds import PromptFolds
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.errors import DataError
from helpsteer2.models.start import RewardStart
from helpsteer2.world.source import WorldSource
from tests.training.runs import ToyGroups, arguments

OPTIONS: dict[str, Any] = {"module": "preference", "max_steps": 2, "validate_every": 2}


@dataclass(frozen=True)
class Leaky(ToyGroups):
    """Toy pairs of which the first of validation also stand in train."""

    repeated: int = 0
    prompts_alone: int = 0
    reads: list[str] = field(default_factory=list)

    def read(self, split: str, report: Any) -> Iterator[Group]:
        self.reads.append(split)
        learned = list(super().read("train", report))
        pairs = [pair for pair in learned if pair.preference_strength]
        for i, pair in enumerate(learned if split == "train" else super().read(split, report)):
            if split == "validation" and i < self.repeated:
                yield replace(pairs[i], id=pair.id, source=f"held_out.jsonl:{i + 1}")
            elif split == "validation" and i < self.repeated + self.prompts_alone:
                yield replace(pair, prompt=pairs[i].prompt, preference_strength=1)
            else:
                yield pair

    def fingerprint(self, split: str) -> str:
        return f"{super().fingerprint(split)} {self.repeated} {self.prompts_alone}"


def recorded(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())["data"]["validation_prompts_in_train"]


def test_validation_rows_of_train_are_refused_with_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardStart, "build", lambda *_: pytest.fail("built"))
    rows = [
        {
            "split": "train",
            "prompt": f"say {i}",
            "response_1": f"no {i}",
            "response_2": f"yes {i}",
            "preference_strength": i % 3 + 1,
        }
        for i in range(20)
    ]
    # Without a winner: no step learns it, and the same row of validation measures nothing.
    rows[1]["preference_strength"] = rows[4]["preference_strength"] = 0
    held_out = [{**row, "split": "validation"} for row in rows[4:12]]
    turned = {"response_1": "yes 12", "response_2": "no 12", "preference_strength": -1}
    held_out.append({**rows[12], **turned, "split": "validation"})
    file = tmp_path / "preference.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + held_out))
    data = {"data": HelpSteer2(str(tmp_path), config="preference")}
    for _ in range(2):  # what is cached by then changes nothing
        with pytest.raises(DataError) as raised:
            train(**arguments(tmp_path / "run", **OPTIONS) | data)
        summary, *lines = str(raised.value).splitlines()
        assert summary.startswith(f"{tmp_path}: 8 of 8 validation groups also stand in train")
        for way_out in ("Delete these rows", "data=folds", "schedule.validate_every=null"):
            assert way_out in summary
        expected = [f"{file}:{i + 17}: stands in train too ({file}:{i + 1})" for i in range(5, 13)]
        assert lines == expected


def test_without_validation_nothing_is_compared(tmp_path: Path) -> None:
    options = OPTIONS | {"validate_every": None, "optimized_metric": None}
    train(**arguments(tmp_path / "run", **options) | {"data": Leaky(repeated=3)})
    assert recorded(tmp_path / "run") is None


def test_prompts_alone_are_told_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Leaky(prompts_alone=6)
    with pytest.raises(DataError, match="2 of 8 validation groups also stand in train"):
        train(**arguments(tmp_path / "both", **OPTIONS) | {"data": replace(data, repeated=2)})
    for name in ("first", "second"):
        data.reads.clear()
        train(**arguments(tmp_path / name, **OPTIONS) | {"data": data})
        assert recorded(tmp_path / name) == 6
        said = "validation groups have a prompt that also stands in train"
        log = " ".join((tmp_path / name / "run.log").read_text().split())
        assert said in log
        assert "(validation-0, validation-1, validation-2, validation-3, validation-4, …)" in log
        assert "prompts of 6 validation groups also stand in train" in capsys.readouterr().out
    # Texts of train are read for the tokenizer that is trained on them, and else ids are enough.
    assert data.reads.count("train") == 1


def test_folds_mend_what_is_refused(tmp_path: Path) -> None:
    cut = PromptFolds(Leaky(repeated=3), ["train", "validation"], folds=4, fold=1)
    train(**arguments(tmp_path / "run", **OPTIONS) | {"data": cut})
    assert recorded(tmp_path / "run") == 0


def test_the_world_is_not_refused(tmp_path: Path) -> None:
    world = WorldSource(groups=60, seed=0, validation_groups=20)
    train(**arguments(tmp_path / "run", **OPTIONS) | {"data": world})
    assert recorded(tmp_path / "run") == 0


@pytest.mark.slow
def test_real_rows_are_not_refused_however_they_are_cut(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "helpsteer2_slice"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    options = {"max_steps": 1, "validate_every": 1}
    data = {"data": HelpSteer2(str(folder))}
    train(**arguments(tmp_path / "run", **options) | data)
    # Prompts cut to 64 tokens are sometimes the same, and so are their responses, cut to 128.
    assert recorded(tmp_path / "run") > 0
