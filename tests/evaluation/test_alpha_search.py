from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

import pytest

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.errors import DataError, UserError
from helpsteer2.evaluation.alpha_search import (
    CHOOSING,
    REPORTING,
    AlphaSearch,
    DataPairs,
    FilePairs,
    in_halves,
)
from helpsteer2.evaluation.comparisons import Comparison

QUICK = 100


def pair(number, good="good", bad="bad!"):
    prompt = ({"role": "user", "content": f"prompt {number}"},)
    return Comparison("any", Group(str(number), f"file:{number}", prompt, (good, bad)))


@dataclass(frozen=True)
class InMemory:
    pairs: list[Comparison]

    def load(self):
        return self.pairs


@pytest.fixture
def search(fakes, context):
    """Run a search in which ``right(alpha, prompt number)`` tells who wins."""
    asked = []

    def run(right, pairs, grid, seed=1, keys=None):
        def candidate(alpha):
            def score(prompt, response):
                wins = right(alpha, int(prompt.split()[1]))
                return [float((response == "good") == wins), 0, 0, 0, 0]

            scorer = fakes.scorer(score)
            asked.append((alpha, scorer))
            return scorer, None if keys is None else keys(alpha)

        one = replace(context, seed=seed, weightings=(AttributeWeights("h", {"helpfulness": 1.0}),))
        found = AlphaSearch(InMemory(pairs), grid, resamples=QUICK).run(candidate, one)
        return found, asked

    return run


def test_halves_share_no_prompt_and_are_equal():
    pairs = [pair(number) for number in [*range(21), *range(10)]]  # ten prompts have two pairs
    halved = in_halves(pairs, seed=1)
    prompts = {
        half: {p.group.prompt[0]["content"] for p in halved if p.subset == half}
        for half in (CHOOSING, REPORTING)
    }
    assert not prompts[CHOOSING] & prompts[REPORTING]
    assert [len(prompts[CHOOSING]), len(prompts[REPORTING])] == [11, 10]
    assert [p.group for p in halved] == [p.group for p in pairs]
    assert in_halves(pairs, seed=1) == halved
    assert in_halves(pairs, seed=2) != halved
    # The half of a prompt does not depend on where the file has it.
    other = in_halves(pairs[::-1], seed=1)[::-1]
    assert other == halved


def test_one_prompt_cannot_be_halved():
    with pytest.raises(UserError, match="two prompts"):
        in_halves([pair(1), pair(1)], seed=1)


def test_the_best_alpha_is_found_and_every_one_is_told(search):
    quality = {1.0: 5, 1.2: 7, 1.4: 9, 1.6: 6}
    pairs = [pair(number) for number in range(200)]
    found, asked = search(lambda alpha, number: number % 10 < quality[alpha], pairs, list(quality))
    assert found["alpha"] == 1.4
    assert found["pairs"] == {CHOOSING: 100, REPORTING: 100}
    assert [figures["alpha"] for figures in found["alphas"]] == sorted(quality)
    for figures in found["alphas"]:
        both = (figures[CHOOSING]["value"] + figures[REPORTING]["value"]) / 2
        assert both == pytest.approx(quality[figures["alpha"]] / 10)
        for half in (CHOOSING, REPORTING):
            assert figures[half]["low"] <= figures[half]["value"] <= figures[half]["high"]
        assert figures["ties"] == 0
    # One pass an α.
    assert [(alpha, scorer.scored) for alpha, scorer in asked] == [(a, 200) for a in quality]


def test_the_reporting_half_has_no_say(search):
    pairs = [pair(number) for number in range(40)]
    halves = {int(p.group.id): p.subset for p in in_halves(pairs, seed=1)}

    def right(alpha, number):
        return halves[number] == (CHOOSING if alpha == 1.3 else REPORTING)

    found, _ = search(right, pairs, [1.3, 1.7])
    assert found["alpha"] == 1.3
    chosen = next(figures for figures in found["alphas"] if figures["alpha"] == 1.3)
    assert (chosen[CHOOSING]["value"], chosen[REPORTING]["value"]) == (1.0, 0.0)
    assert chosen["gain"]["value"] == -1.0


def test_of_equal_alphas_the_least_extrapolated_is_chosen(search):
    pairs = [pair(number) for number in range(10)]
    found, _ = search(lambda alpha, number: True, pairs, [1.8, 1.2])
    assert found["alpha"] == 1.0
    found, _ = search(lambda alpha, number: alpha != 1.0, pairs, [1.8, 0.7, 1.2])
    assert found["alpha"] == 1.2


def test_gains_are_paired_with_the_strong_model(search):
    pairs = [pair(number) for number in range(100)]
    found, _ = search(lambda alpha, number: number % 2 == 0, pairs, [1.0, 1.5])
    for figures in found["alphas"]:
        # Right on the very same pairs: no doubt about the difference, whatever the accuracy.
        assert [figures["gain"][end] for end in ("value", "low", "high")] == [0.0, 0.0, 0.0]
        assert figures[REPORTING]["low"] < figures[REPORTING]["high"]


def test_a_search_that_was_killed_goes_on(search):
    pairs = [pair(number) for number in range(10)]
    search(lambda alpha, number: True, pairs, [1.0, 1.5], keys=lambda alpha: f"key {alpha}")
    _, asked = search(
        lambda alpha, number: True, pairs, [1.0, 1.5, 2.0], keys=lambda alpha: f"key {alpha}"
    )
    assert [(alpha, scorer.scored) for alpha, scorer in asked[2:]] == [
        (1.0, 0),
        (1.5, 0),
        (2.0, 10),
    ]


@pytest.mark.parametrize("grid", [[], [1.5, float("nan")], [float("inf")]])
def test_a_grid_of_no_numbers_is_refused(grid):
    with pytest.raises(UserError, match="grid"):
        AlphaSearch(InMemory([]), grid)


def test_the_table_fits_100_columns_and_marks_the_choice(search, as_text):
    pairs = [pair(number) for number in range(2000)]
    grid = [1.0 + step / 10 for step in range(11)]
    found, _ = search(lambda alpha, number: number % 97 < 60 + 10 * alpha, pairs, grid)
    text = as_text([AlphaSearch(InMemory(pairs), grid).table(found)])
    assert max(map(len, text.splitlines())) <= 100
    assert len(re.findall("←", text)) == 1
    assert "2 ←" in text


# ---- where pairs come from


def rated(fakes, *groups):
    return DataPairs(fakes.source({"validation": groups}))


def texts(pairs):
    return [p.group.responses for p in pairs]


def test_preferences_put_the_better_response_first(fakes):
    groups = [
        replace(fakes.group(i, ["one", "two"]), preference_strength=strength)
        for i, strength in enumerate((-3, 2, 0))
    ]
    assert texts(rated(fakes, *groups).load()) == [("one", "two"), ("two", "one")]


def test_without_preference_the_rating_decides(fakes):
    def rows(*helpfulness):
        return tuple((value, 0.0, 0.0, 0.0, 4.0 - (value or 0)) for value in helpfulness)

    groups = [
        fakes.group(0, ["a", "b"], rows(1.0, 3.0)),
        fakes.group(1, ["a", "b"], rows(2.0, 2.0)),
        fakes.group(2, ["a", "b", "c"], rows(4.0, None, 1.0)),
        fakes.group(3, ["a", "b"]),
    ]
    assert texts(rated(fakes, *groups).load()) == [("b", "a"), ("a", "c")]
    by_verbosity = replace(rated(fakes, *groups), attribute="verbosity")
    assert texts(by_verbosity.load()) == [("a", "b"), ("b", "a"), ("b", "c"), ("c", "a")]


def test_preferences_go_before_ratings(fakes):
    group = fakes.group(0, ["a", "b"], ((4.0,) * 5, (0.0,) * 5))
    assert texts(rated(fakes, replace(group, preference_strength=1)).load()) == [("b", "a")]
    with pytest.raises(UserError, match="differ in preference_strength"):
        rated(fakes, replace(group, preference_strength=0)).load()


def test_pairs_of_a_file_need_no_subset(tmp_path):
    rows = [{"prompt": f"p {i}", "chosen": "good", "rejected": "bad!"} for i in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert texts(FilePairs(str(path)).load()) == [("good", "bad!")] * 3
    rows[1]["chosen"] = 3
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: chosen"):
        FilePairs(str(path)).load()
    with pytest.raises(UserError, match=r"search\.pairs\.path|no such file"):
        FilePairs(str(tmp_path / "missing.jsonl")).load()
