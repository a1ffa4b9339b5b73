from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from helpsteer2.data.groups import Group, read_all
from helpsteer2.errors import UserError
from helpsteer2.world.generator import FACTS, VALUES, Claim, Notes, WorldSource, rate

SOURCE = WorldSource(groups=300, seed=0, validation_groups=100)


def groups(source: WorldSource, split: str = "train") -> list[Group]:
    return list(read_all(source, split))


def prompts(source: WorldSource, split: str) -> set[str]:
    return {group.prompt[0]["content"] for group in groups(source, split)}


def test_same_arguments_give_the_same_bytes_on_every_machine() -> None:
    made = json.dumps([(g.id, g.prompt, g.responses, g.attributes) for g in groups(SOURCE)[:50]])
    digest = hashlib.sha256(made.encode()).hexdigest()
    # Python's random module and our tables decide this; if the tables change on purpose, so may it.
    assert digest[:16] == "8cb784bdee98ab1a"


def test_more_groups_do_not_change_the_first_ones() -> None:
    assert groups(replace(SOURCE, groups=400))[:300] == groups(SOURCE)


def test_another_seed_gives_other_groups() -> None:
    assert not prompts(SOURCE, "train") <= prompts(replace(SOURCE, seed=1), "train")


def test_splits_share_no_prompt_whatever_the_seed() -> None:
    train = prompts(SOURCE, "train") | prompts(replace(SOURCE, seed=1), "train")
    assert not train & prompts(SOURCE, "validation")
    assert not train & prompts(replace(SOURCE, seed=2), "validation")


@pytest.mark.parametrize("responses", [1, 2, 10])
def test_groups_are_whole(responses: int) -> None:
    source = replace(SOURCE, responses=responses)
    made = groups(source)
    assert len(made) == 300
    assert len({group.id for group in made}) == 300
    for group in made:
        assert [message["role"] for message in group.prompt] == ["user"]
        assert len(set(group.responses)) == len(group.attributes or ()) == responses
        assert all(group.responses)
        for ratings in group.attributes or ():
            assert len(ratings) == len(source.attribute_names)
            assert all(rating in (0.0, 1.0, 2.0, 3.0, 4.0) for rating in ratings)


def test_every_attribute_varies_within_pairs() -> None:
    pairs = [group.attributes for group in groups(SOURCE) if group.attributes]
    for column in range(len(SOURCE.attribute_names)):
        differing = sum(first[column] != second[column] for first, second in pairs)
        assert differing > 0.3 * len(pairs)
        assert len({ratings[column] for pair in pairs for ratings in pair}) == 5


def test_prompts_state_what_is_true() -> None:
    """The same facts about a person everywhere, so that they can be learnt by heart as well."""
    for prompt in prompts(SOURCE, "train"):
        name, _, rest = prompt.removeprefix("Notes on ").partition(": ")
        stated = dict(fact.split() for fact in rest.partition(".")[0].split(", "))
        assert stated.items() <= FACTS[name].items()


def test_a_value_belongs_to_one_property() -> None:
    values = [value for of_property in VALUES.values() for value in of_property]
    assert len(values) == len(set(values))


NOTES = Notes("Ada", {"food": "figs", "job": "pilot", "pet": "cat"}, asked=2, style="")
RIGHT = [Claim("food", "figs", 1), Claim("job", "pilot", 1)]


def ratings(claims: list[Claim], words: int = 18) -> dict[str, float]:
    return dict(zip(SOURCE.attribute_names, rate(NOTES, claims, words), strict=True))


def test_a_right_answer_of_the_right_length_gets_the_best_ratings() -> None:
    assert ratings(RIGHT) == {
        "helpfulness": 4,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 2,
    }


@pytest.mark.parametrize(
    ("claims", "lower", "same"),
    [
        ([RIGHT[0], Claim("job", "judge", 1)], "correctness", "coherence"),
        (RIGHT[:1], "correctness", "coherence"),
        (RIGHT[::-1], "coherence", "correctness"),
        ([RIGHT[0], Claim("job", "pilot", 2)], "coherence", "correctness"),
        ([*RIGHT, RIGHT[0]], "coherence", "complexity"),
        ([Claim(c.key, c.value, 0) for c in RIGHT], "complexity", "correctness"),
    ],
    ids=["wrong", "missing", "disordered", "mixed", "repeated", "plain"],
)
def test_each_fault_lowers_its_own_rating(claims: list[Claim], lower: str, same: str) -> None:
    best, faulty = ratings(RIGHT), ratings(claims)
    assert faulty[lower] < best[lower]
    assert faulty[same] == best[same]
    assert faulty["helpfulness"] <= best["helpfulness"]


def test_verbosity_grows_with_length_and_helpfulness_has_its_best_in_the_middle() -> None:
    rated = [ratings(RIGHT, words) for words in (4, 12, 18, 30, 60)]
    assert [one["verbosity"] for one in rated] == [0, 1, 2, 3, 4]
    helpful = [one["helpfulness"] for one in rated]
    assert helpful[2] == max(helpful)
    assert helpful[0] < helpful[2]
    assert helpful[4] < helpful[2]


def test_fingerprint_follows_what_is_made() -> None:
    same = replace(SOURCE, groups=300)
    assert SOURCE.fingerprint("train") == same.fingerprint("train")
    others = [
        replace(SOURCE, groups=301).fingerprint("train"),
        replace(SOURCE, seed=1).fingerprint("train"),
        replace(SOURCE, responses=3).fingerprint("train"),
        SOURCE.fingerprint("validation"),
    ]
    assert len({SOURCE.fingerprint("train"), *others}) == 5
    # The size of one split says nothing about the other.
    assert replace(SOURCE, validation_groups=7).fingerprint("train") == SOURCE.fingerprint("train")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="train, validation"):
        groups(SOURCE, "test")


@pytest.mark.parametrize("name", ["groups", "validation_groups", "responses"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        replace(SOURCE, **{name: 0})
