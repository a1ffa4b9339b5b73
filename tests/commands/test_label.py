"""``helpsteer2 label``: labels of responses and of prompts, as files that the next stage reads."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch
from helpsteer2.config.checked import check
from helpsteer2.data.groups import Group, read_all, read_prompts
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.errors import ConfigError, DataError, UserError
from helpsteer2.world.source import WorldSource
from tests.full_disk import largest_file

Run = Callable[..., dict[str, Any]]

NAMES = ("verbosity", "helpfulness")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])

    def call(*overrides: str) -> dict[str, Any]:
        try:
            given = [f"run_dir={tmp_path / 'run'}", *overrides]
            assert launch(CONFIG_COMMANDS["label"], given) == 0
        finally:
            GlobalHydra.instance().clear()
        result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
        return result

    return call


def written(folder: Path, split: str = "train") -> list[Group]:
    return list(read_all(GroupFiles(str(folder / "run")), split))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "run").iterdir()}


def annotated(folder: Path, n: int = 4, *, scored: bool = True) -> str:
    """A file as ``annotate`` leaves it; the i-th group has two answers of helpfulness i and 4.4."""
    path = folder / "annotated.jsonl"
    groups = [
        Group(
            f"train-{i}", f"data:{i}", ({"role": "user", "content": f"question {i}"},),
            ("one", "two"),
            scores=((2.5, float(i)), (1.0, 4.4)) if scored else None,
            score_names=NAMES if scored else None,
        )
        for i in range(n)
    ]  # fmt: skip
    write_groups(path, groups, ())
    return f"data.path={path}"


def labelled_file(folder: Path) -> str:
    """A file with two labels, three responses to one."""
    path = folder / "labels.jsonl"
    labels = [AttributeLabel.of({"helpfulness": h, "verbosity": v}) for h, v in ((4, 1), (0, 3))]
    groups = [
        Group(str(i), "x:1", ({"role": "user", "content": "?"},), ("r",) * n, label=label)
        for i, (label, n) in enumerate(zip(labels, (3, 1), strict=True))
    ]
    write_groups(path, groups, ())
    return f"labels.path={path}"


def test_responses_get_the_labels_of_their_scores(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(annotated(tmp_path), "splits=[train]", "by=scores")
    groups = written(tmp_path)
    found = [(g.id, g.responses, g.label.text if g.label else "") for g in groups]
    assert found == [
        (f"train-{i}/{k}", (text,), f"helpfulness:{level},verbosity:{verbosity}")
        for i in range(4)
        for k, text, level, verbosity in ((1, "one", i, 2), (2, "two", 4, 1))
    ]
    assert all(g.scores is not None and g.score_names == NAMES for g in groups)
    metrics = result["metrics"]["train"]
    assert metrics["values"] == {"helpfulness": [1, 1, 1, 1, 4], "verbosity": [0, 4, 4, 0, 0]}
    assert metrics["clamped"] == {"helpfulness": 4}
    assert (metrics["groups"], metrics["responses"], metrics["labelled_groups"]) == (4, 8, 8)
    assert (metrics["unknown"], metrics["different_labels"]) == (0, 5)
    assert result["kind"] == "label"
    assert {"packages", "git", "hardware"} <= result["environment"].keys()
    output = capsys.readouterr().out
    assert "labels of 'train' by scores" in output
    assert "8 responses in 8 groups, 5 different labels" in output
    assert "train.jsonl in" in output
    assert max(len(line) for line in output.splitlines() if "wrote" not in line) <= 100


def test_responses_get_the_labels_of_their_ratings(run: Run, tmp_path: Path) -> None:
    overrides = ["data=world", "data.groups=30", "data.ratings=annotators", "by=ratings"]
    result = run(*overrides, "data.validation_groups=20", "names=[verbosity,helpfulness]")
    for split, n in (("train", 30), ("validation", 20)):
        source = WorldSource(groups=30, seed=0, validation_groups=20, ratings="annotators")
        expected = Counter()
        for group in read_all(source, split):
            for text, ratings in zip(group.responses, group.attributes or (), strict=True):
                of = dict(zip(source.attribute_names, ratings, strict=True))
                expected[text, of["helpfulness"], of["verbosity"]] += 1
        found = Counter()
        for group in written(tmp_path, split):
            assert group.label is not None
            assert group.label.names == ("helpfulness", "verbosity")
            assert group.attributes is not None
            found.update((text, *group.label.values) for text in group.responses)
        assert found == expected
        metrics = result["metrics"][split]
        assert (metrics["groups"], metrics["responses"]) == (n, expected.total())
        assert sum(metrics["values"]["verbosity"]) == expected.total()


def test_unknown_ratings_are_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rated.jsonl"
    prompt = ({"role": "user", "content": "?"},)
    rows = (((4.0, None), (3.0, 1.0)), ((None, 2.0), (None, None)))
    groups = [Group(str(i), "x:1", prompt, ("a", "b"), attributes=r) for i, r in enumerate(rows)]  # type: ignore[arg-type]
    write_groups(path, groups, NAMES)
    overrides = [f"data.path={path}", "splits=[train]", "by=ratings"]
    assert run(*overrides)["metrics"]["train"]["unknown"] == 3
    assert [(g.id, g.responses) for g in written(tmp_path)] == [("0", ("b",))]
    assert "3 responses left out: a rating is unknown" in capsys.readouterr().out
    write_groups(path, groups[1:], NAMES)
    with pytest.raises(
        UserError, match=r"no label is left of .*'train': of its 2 responses 2 lack"
    ):
        run(*overrides)
    assert [g.id for g in written(tmp_path)] == ["0"]


def test_prompts_get_labels_of_other_groups(run: Run, tmp_path: Path) -> None:
    overrides = ["data=world", "data.groups=400", "data.validation_groups=40", "by=distribution"]
    labels = ["data@labels=groups", labelled_file(tmp_path)]
    result = run(*overrides, *labels, "seed=3")
    source_of_labels = GroupFiles(str(tmp_path / "labels.jsonl"))
    assert result["labels_fingerprint"] == source_of_labels.fingerprint("train")
    files = GroupFiles(str(tmp_path / "run"))
    source = WorldSource(groups=400, seed=0, validation_groups=40)
    drawn = {}
    for split in ("train", "validation"):
        prompts, given = list(read_prompts(files, split)), list(read_prompts(source, split))
        assert [(g.id, g.prompt) for g in prompts] == [(g.id, g.prompt) for g in given]
        assert {group.responses for group in prompts} == {()}
        drawn |= {group.id: group.label.text for group in prompts if group.label}
    counts = Counter(drawn.values())
    assert set(counts) == {"helpfulness:4,verbosity:1", "helpfulness:0,verbosity:3"}
    assert 290 < counts["helpfulness:4,verbosity:1"] < 370  # 330 ± 9 are expected
    values = [result["metrics"][split]["values"]["verbosity"] for split in ("train", "validation")]
    assert [sum(pair) for pair in zip(*values, strict=True)] == [
        0, counts["helpfulness:4,verbosity:1"], 0, counts["helpfulness:0,verbosity:3"], 0
    ]  # fmt: skip
    # What is no answer to such a prompt is not there to be learned.
    with pytest.raises(DataError, match="`helpsteer2 sample` makes some"):
        list(read_all(files, "train"))
    # A prompt keeps its label when others come or go, and the bytes are the same again.
    before = content(tmp_path)["train.jsonl"]
    run(*overrides, *labels, "seed=3", "data.groups=300")
    again = {g.id: g.label.text for g in read_prompts(files, "train") if g.label}
    assert again.items() <= drawn.items()
    run(*overrides, *labels, "seed=3")
    assert content(tmp_path)["train.jsonl"] == before
    run(*overrides, *labels, "seed=4")
    assert content(tmp_path)["train.jsonl"] != before


def test_labels_of_one_run_are_drawn_by_the_next(run: Run, tmp_path: Path) -> None:
    data = annotated(tmp_path)
    first = tmp_path / "first"
    try:
        given = [f"run_dir={first}", data, "splits=[train]", "names=[helpfulness]"]
        assert launch(CONFIG_COMMANDS["label"], given) == 0
    finally:
        GlobalHydra.instance().clear()
    known = {group.label for group in read_all(GroupFiles(str(first)), "train")}
    run(data, "splits=[train]", "by=distribution", "data@labels=groups", f"labels.path={first}")
    prompts = list(read_prompts(GroupFiles(str(tmp_path / "run")), "train"))
    assert {group.label for group in prompts} <= known
    assert [group.id for group in prompts] == [f"train-{i}" for i in range(4)]


def test_a_fixed_label_is_that_of_every_prompt(run: Run, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"}]
    chats.write_text("".join(json.dumps({"messages": turns[:n]}) + "\n" for n in (1, 2)))
    overrides = ["data=chat", f"data.path={chats}", "by=fixed", "splits=[train]"]
    result = run(*overrides, "steering={verbosity: 2, helpfulness: 4}")
    prompts = list(read_prompts(GroupFiles(str(tmp_path / "run")), "train"))
    assert [g.label and g.label.text for g in prompts] == ["helpfulness:4,verbosity:2"] * 2
    assert [[m["content"] for m in g.prompt] for g in prompts] == [["u1"], ["u1"]]
    assert result["metrics"]["train"]["values"]["verbosity"] == [0, 0, 2, 0, 0]
    assert result["config"]["steering"] == {"verbosity": 2, "helpfulness": 4}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["by=scores", "names=[humor]"], "names asks for humor, but .*are of verbosity, helpfuln"),
        (["by=scores", "names=[]"], "names has to hold at least one attribute"),
        (["by=ratings"], "the ratings of the data are of nothing"),
        (["by=fixed"], "by=fixed needs the label: steering="),
        (["by=fixed", "steering={}"], "by=fixed needs the label: steering="),
        (["by=fixed", "steering={verbosity: 7}"], "steering: .*verbosity is 7"),
        (["by=fixed", "steering={verbosity: 2}", "names=[verbosity]"], "names is for by=scores or"),
        (["by=scores", "steering={verbosity: 2}"], "steering is for by=fixed, and this is by=sc"),
        (["by=distribution"], "by=distribution draws from the labels of other groups: data@lab"),
        (["by=scores", "LABELS"], "labels is for by=distribution, and this is by=scores"),
        (["by=distribution", "DATA AS LABELS"], "labels: none of their groups has a label"),
        (["by=distribution", "LABELS", "names=[humor]"], "names asks for humor, but .*label of gr"),
        (["splits=[]"], "splits is empty"),
    ],
)
def test_what_cannot_be_labelled_leaves_the_older_groups(
    run: Run, tmp_path: Path, overrides: list[str], words: str
) -> None:
    data = annotated(tmp_path)
    run(data, "splits=[train]")
    kept = content(tmp_path)
    placeholders = {
        "LABELS": ["data@labels=groups", labelled_file(tmp_path)],
        "DATA AS LABELS": ["data@labels=groups", data.replace("data.", "labels.")],
    }
    given = [part for one in overrides for part in placeholders.get(one, [one])]
    with pytest.raises(UserError, match=words):
        run(data, "splits=[train]", *given)
    assert content(tmp_path) == kept


def test_missing_scores_bad_rows_and_a_full_disk_leave_the_older_groups(
    run: Run, tmp_path: Path
) -> None:
    data = annotated(tmp_path)
    run(data, "splits=[train]")
    kept = content(tmp_path)
    annotated(tmp_path, scored=False)
    with pytest.raises(UserError, match="group 'train-0' has no scores: `helpsteer2 annotate`"):
        run(data, "splits=[train]")
    annotated(tmp_path, n=200)
    message = r"cannot write .*train\.jsonl: .*; make room"
    with largest_file(10_000), pytest.raises(UserError, match=message):
        run(data, "splits=[train]")
    with (tmp_path / "annotated.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError):
        run(data, "splits=[train]")
    assert content(tmp_path) == kept


def test_no_split_of_other_settings_stays_beside_new_groups(run: Run, tmp_path: Path) -> None:
    overrides = ["data=world", "data.groups=20", "data.validation_groups=20", "by=ratings"]
    run(*overrides)
    assert (tmp_path / "run" / "validation.jsonl").exists()
    run(*overrides, "splits=[train]")
    assert sorted(path.name for path in (tmp_path / "run").glob("*.jsonl")) == ["train.jsonl"]


def test_every_answer_of_a_conversation_can_get_a_label(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.jsonl"
    talk = Group(
        "a", "x:1",
        ({"role": "user", "content": "u1"},
         {"role": "assistant", "content": "a1", "train": True}, {"role": "user", "content": "u2"}),
        ("a2",), scores=((2.0, 3.0),), score_names=NAMES,
    )  # fmt: skip
    write_groups(path, [talk], ())
    run(f"data.path={path}", "splits=[train]")
    said = "1 answers inside prompts are learned without a label"
    assert said in capsys.readouterr().out
    given = ["data=each_answer", "data@data.of=groups", f"data.of.path={path}", "splits=[train]"]
    run(*given, "by=fixed", "steering={verbosity: 1}")
    with pytest.raises(UserError, match="group 'a/turn1' has no scores"):
        run(*given)  # Each has to be scored first.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["by=score"], "did you mean scores"),
        (["steering={verbosity: high}"], "steering.verbosity: expected int"),
        (["steering={verbosity: 2.5}"], "steering.verbosity: expected int"),
        (["names=verbosity"], "names"),
        (["split=train"], "did you mean splits"),
        (["data@labels=groups"], "labels.path"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(CONFIG_COMMANDS["label"], ["data.path=some/file", *overrides])
    assert message in str(error.value)
