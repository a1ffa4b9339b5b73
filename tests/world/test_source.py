from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import helpsteer2.world
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.world.lexicon import FILLERS, NAMES, NOUNS, VALUES
from helpsteer2.world.oracle import rate
from helpsteer2.world.source import WorldSource
from helpsteer2.world.tasks import parse_task

SOURCE = WorldSource(groups=300, seed=0, validation_groups=100)


def groups(source: WorldSource, split: str = "train") -> list[Group]:
    return list(read_all(source, split))


def prompts(source: WorldSource, split: str) -> set[str]:
    return {str(group.prompt) for group in groups(source, split)}


def digest(made: list[Group]) -> str:
    plain: Any = [
        (g.id, g.prompt, g.responses, g.attributes, g.annotations, g.preference_strength)
        for g in made
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def test_same_arguments_give_the_same_bytes_on_every_machine() -> None:
    # Python's random module and our code decide this; if the world changes on purpose, so may it.
    assert digest(groups(SOURCE)[:50])[:16] == "21a17853edb48d89"


def test_the_bytes_do_not_depend_on_the_process() -> None:
    code = (
        "from tests.world.test_source import *\n"
        "print(digest(groups(SOURCE)[:20]), SOURCE.fingerprint('train'))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    )  # fmt: skip
    assert made.stdout.split() == [digest(groups(SOURCE)[:20]), SOURCE.fingerprint("train")]


def test_more_groups_do_not_change_the_first_ones() -> None:
    assert groups(replace(SOURCE, groups=400))[:300] == groups(SOURCE)


def test_another_seed_gives_other_groups() -> None:
    others = groups(replace(SOURCE, seed=1))
    same = sum(a.responses == b.responses for a, b in zip(groups(SOURCE), others, strict=True))
    assert same < 3


def test_splits_share_no_prompt_whatever_the_seed() -> None:
    train = prompts(SOURCE, "train") | prompts(replace(SOURCE, seed=1), "train")
    assert not train & prompts(SOURCE, "validation")
    assert not train & prompts(replace(SOURCE, seed=2), "validation")


@pytest.mark.parametrize("responses", [1, 2, 10])
def test_groups_are_whole(responses: int) -> None:
    made = groups(replace(SOURCE, groups=100, responses=responses))
    assert len({group.id for group in made}) == len(made) == 100
    for group in made:
        assert len(set(group.responses)) == len(group.attributes or ()) == responses
        assert all(response.strip() for response in group.responses)
        for ratings in group.attributes or ():
            assert all(rating in (0.0, 1.0, 2.0, 3.0, 4.0) for rating in ratings)
            assert len(ratings) == len(SOURCE.attribute_names)
        assert (group.preference_strength is not None) == (responses == 2)
        assert {len(raters) for one in group.annotations or () for raters in one} <= {3, 4, 5}


def test_oracle_ratings_are_those_of_the_same_texts() -> None:
    by_people, exact = groups(SOURCE), groups(replace(SOURCE, ratings="oracle"))
    for rated, true in zip(by_people, exact, strict=True):
        assert true.responses == rated.responses
        assert true.annotations == rated.annotations
        assert true.attributes == tuple(rate(true.prompt, text) for text in true.responses)
    assert [g.attributes for g in exact] != [g.attributes for g in by_people]


def test_every_attribute_differs_within_pairs() -> None:
    pairs = [group.attributes for group in groups(SOURCE) if group.attributes]
    for column in range(len(SOURCE.attribute_names)):
        differing = sum(first[column] != second[column] for first, second in pairs)
        assert differing > 0.3 * len(pairs)
        assert len({ratings[column] for pair in pairs for ratings in pair}) == 5


def test_prompts_vary() -> None:
    tasks = [parse_task(group.prompt) for group in groups(replace(SOURCE, groups=1000))]
    assert {task.entity for task in tasks} == set(NAMES)
    assert {len(task.asked) for task in tasks} == {1, 2, 3}
    # HelpSteer2: 29 % of the prompts have more than one turn.
    assert 0.2 < sum(len(task.requests) > 1 for task in tasks) / len(tasks) < 0.4
    assert not any(task.marked for task in tasks)


def test_the_share_asked_for_is_marked() -> None:
    made = groups(replace(SOURCE, groups=1000, marked=0.4))
    assert 0.35 < sum(parse_task(group.prompt).marked for group in made) / 1000 < 0.45


def test_fingerprint_follows_what_is_made(tmp_path: Path) -> None:
    assert SOURCE.fingerprint("train") == replace(SOURCE, groups=300).fingerprint("train")
    others = [
        replace(SOURCE, groups=301).fingerprint("train"),
        replace(SOURCE, seed=1).fingerprint("train"),
        replace(SOURCE, responses=3).fingerprint("train"),
        replace(SOURCE, ratings="oracle").fingerprint("train"),
        replace(SOURCE, marked=0.5).fingerprint("train"),
        SOURCE.fingerprint("validation"),
    ]
    assert len({SOURCE.fingerprint("train"), *others}) == 7
    # The size of one split says nothing about the other.
    assert replace(SOURCE, validation_groups=7).fingerprint("train") == SOURCE.fingerprint("train")


@pytest.mark.parametrize(
    "name", [path.name for path in sorted(Path(helpsteer2.world.__path__[0]).glob("*.py"))]
)
def test_fingerprint_follows_every_file_of_the_world(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpsteer2.world import source

    copy = tmp_path / "world"
    shutil.copytree(Path(source.__file__).parent, copy)
    before = SOURCE.fingerprint("train")
    monkeypatch.setattr(source, "__file__", str(copy / "source.py"))
    assert SOURCE.fingerprint("train") == before
    with (copy / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert SOURCE.fingerprint("train") != before


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="train, validation"):
        groups(SOURCE, "test")


@pytest.mark.parametrize("name", ["groups", "validation_groups", "responses"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        replace(SOURCE, **{name: 0})


def test_a_small_vocabulary_has_a_token_for_nearly_every_word(tmp_path: Path) -> None:
    def texts() -> Any:
        for group in groups(replace(SOURCE, groups=1000)):
            yield from (message["content"] for message in group.prompt)
            yield from group.responses

    tokenizer = TrainedTokenizer(1024).build(texts, tmp_path)

    def whole(words: Any) -> float:
        words = list(words)
        ids = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
        return sum(len(one) == 1 for one in ids) / len(words)

    assert whole(value for values in VALUES.values() for value in values) == 1
    assert whole(noun for nouns in NOUNS.values() for noun in nouns) == 1
    assert whole(NAMES) > 0.9
    text = " ".join(random.Random(0).choice(FILLERS) for _ in range(20))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(UserError, match="marked"):
        replace(SOURCE, marked=1.5)
