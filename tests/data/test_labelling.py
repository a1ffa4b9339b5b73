"""Giving labels to responses by what is known of them, and to prompts by other labels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from helpsteer2.data.groups import Group, Message
from helpsteer2.data.labelling import LabelCounts, LabelDistribution, ResponseLabels
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import UserError

NAMES = ("helpfulness", "verbosity")
QUESTION = Message(role="user", content="why?")


def rated(
    *ratings: tuple[float | None, float | None], identity: str = "a", **columns: Any
) -> Group:
    responses = tuple(f"answer {i}" for i in range(len(ratings)))
    return Group(identity, "file:1", (QUESTION,), responses, attributes=ratings, **columns)


def scored(*scores: Sequence[float], names: Sequence[str] = NAMES, identity: str = "a") -> Group:
    responses = tuple(f"answer {i}" for i in range(len(scores)))
    rows = tuple(map(tuple, scores))
    return Group(identity, "file:1", (QUESTION,), responses, scores=rows, score_names=tuple(names))


def labelled(
    *groups: Group, by: Any = "ratings", names: Sequence[str] | None = None
) -> tuple[list[Group], LabelCounts]:
    counts = LabelCounts()
    return list(ResponseLabels(by, names).labelled(groups, NAMES, counts)), counts


def texts(groups: Sequence[Group]) -> list[tuple[str, tuple[str, ...], str]]:
    return [(g.id, g.responses, g.label.text if g.label else "") for g in groups]


def test_responses_of_one_label_stay_together() -> None:
    groups, counts = labelled(rated((4, 2), (1, 2), (4, 2)), rated((0, 0), (0, 0), identity="b"))
    assert texts(groups) == [
        ("a/1", ("answer 0", "answer 2"), "helpfulness:4,verbosity:2"),
        ("a/2", ("answer 1",), "helpfulness:1,verbosity:2"),
        ("b", ("answer 0", "answer 1"), "helpfulness:0,verbosity:0"),
    ]
    assert (counts.groups, counts.responses, counts.labelled_groups) == (2, 5, 3)
    assert counts.values() == {"helpfulness": [2, 1, 0, 0, 2], "verbosity": [2, 0, 3, 0, 0]}
    assert counts.record()["different_labels"] == 3


def test_what_is_known_of_a_response_goes_with_it() -> None:
    group = rated(
        (4, 2), (1, 2), preference_strength=-2, rewards=(3.0, 1.0),
        response_ids=((5, 2), (6, 7, 2)), tokenizer="hash", finish_reasons=("stop", "length"),
        logprobs=((-1.0, -2.0), (-3.0, -4.0, -5.0)), annotations=(((4, 4), (2,)), ((1,), (2,))),
        scores=((3.5, 1.0), (0.5, 1.0)), score_names=NAMES,
    )  # fmt: skip
    (first, second), _ = labelled(group)
    assert (first.attributes, second.attributes) == (((4, 2),), ((1, 2),))
    assert (first.rewards, second.rewards) == ((3.0,), (1.0,))
    assert (first.response_ids, second.response_ids) == (((5, 2),), ((6, 7, 2),))
    assert (first.finish_reasons, second.finish_reasons) == (("stop",), ("length",))
    assert (first.logprobs, second.logprobs) == (((-1.0, -2.0),), ((-3.0, -4.0, -5.0),))
    assert (first.annotations, second.annotations) == ((((4, 4), (2,)),), (((1,), (2,)),))
    assert (first.scores, second.scores) == (((3.5, 1.0),), ((0.5, 1.0),))
    for part in (first, second):
        assert (part.tokenizer, part.score_names, part.source) == ("hash", NAMES, "file:1")
        assert part.preference_strength is None


def test_unknown_ratings_are_left_out_and_counted() -> None:
    group = rated((4, None), (None, 1), (3, 1))
    groups, counts = labelled(group, rated((None, None), identity="b"))
    assert texts(groups) == [("a", ("answer 2",), "helpfulness:3,verbosity:1")]
    assert (counts.groups, counts.responses, counts.unknown) == (2, 4, 3)
    # What the label does not need may be unknown.
    groups, counts = labelled(group, names=["helpfulness"])
    assert texts(groups) == [
        ("a/1", ("answer 0",), "helpfulness:4"),
        ("a/2", ("answer 2",), "helpfulness:3"),
    ]
    assert counts.unknown == 1
    unrated = Group("c", "file:1", (QUESTION,), ("x", "y"))
    assert labelled(unrated)[1].unknown == 2


def test_scores_are_clipped_rounded_and_counted() -> None:
    group = scored((4.01, 2.5), (-0.3, 1.5), (4.0, 0.0), (-9.0, 9.0))
    groups, counts = labelled(group, by="scores")
    assert texts(groups) == [
        ("a/1", ("answer 0",), "helpfulness:4,verbosity:2"),
        ("a/2", ("answer 1",), "helpfulness:0,verbosity:2"),
        ("a/3", ("answer 2",), "helpfulness:4,verbosity:0"),
        ("a/4", ("answer 3",), "helpfulness:0,verbosity:4"),
    ]
    assert counts.clamped == {"helpfulness": 3, "verbosity": 1}
    _, counts = labelled(group, by="scores", names=["verbosity"])
    assert counts.clamped == {"verbosity": 1}


def test_names_choose_and_need_not_be_in_order() -> None:
    group = scored((1.0, 2.0, 3.0), names=("verbosity", "humor", "helpfulness"))
    groups, _ = labelled(group, by="scores", names=["verbosity", "helpfulness"])
    assert [g.label and g.label.text for g in groups] == ["helpfulness:3,verbosity:1"]


def test_what_is_not_there_is_named_beside_what_is() -> None:
    with pytest.raises(UserError, match=r"humor, zeal, but .*group 'a' are of helpfulness, verbos"):
        labelled(scored((1, 1)), by="scores", names=["humor", "verbosity", "zeal"])
    with pytest.raises(UserError, match="group 'a' has no scores: `helpsteer2 annotate`"):
        labelled(rated((1, 1)), by="scores")
    counts = LabelCounts()
    with pytest.raises(UserError, match="humor, but the ratings of the data are of helpf"):
        list(ResponseLabels("ratings", ["humor"]).labelled([rated((1, 1))], NAMES, counts))
    assert counts.groups == 0  # Told before anything is read.
    with pytest.raises(UserError, match="ratings of the data are of nothing"):
        list(ResponseLabels("ratings").labelled([], (), counts))
    for names in ([], ["verbosity", "verbosity"]):
        with pytest.raises(UserError, match="at least one attribute, each once"):
            ResponseLabels("scores", names)


def test_answers_inside_a_prompt_are_learned_once() -> None:
    answer = Message(role="assistant", content="because", train=True)
    prompt = (QUESTION, answer, QUESTION)
    group = Group("a", "file:1", prompt, ("x", "y"), attributes=((1, 1), (2, 2)))
    groups, counts = labelled(group)
    assert [sum("train" in m for m in g.prompt) for g in groups] == [1, 0]
    assert [[m["content"] for m in g.prompt] for g in groups] == [["why?", "because", "why?"]] * 2
    assert counts.unlabelled_answers == 1


A, B, C = (
    AttributeLabel.of({"helpfulness": h, "verbosity": v}) for h, v in ((4, 2), (1, 0), (0, 3))
)


def with_label(label: AttributeLabel | None, responses: int = 1, identity: str = "x") -> Group:
    return Group(identity, "file:1", (QUESTION,), ("r",) * responses, label=label)


def prompts(n: int) -> list[Group]:
    return [Group(f"train-{i}", f"file:{i}", (QUESTION,), ("r",)) for i in range(n)]


def test_labels_are_drawn_whole_and_as_often_as_they_have_responses() -> None:
    given = [with_label(A, 3), with_label(B, 2), with_label(A, 3), with_label(None), with_label(C)]
    distribution = LabelDistribution.of(given)
    counts = LabelCounts()
    n = 9000
    groups = list(distribution.labelled(prompts(n), 5, counts))
    for label, share in ((A, 6 / 9), (B, 2 / 9), (C, 1 / 9)):
        deviation = (share * (1 - share) / n) ** 0.5
        assert counts.labels[label] / n == pytest.approx(share, abs=4 * deviation)
    # Nothing but whole labels: helpfulness 4 never goes with verbosity 0.
    assert {group.label for group in groups} == {A, B, C}
    assert counts.labels == Counter(group.label for group in groups)
    assert (counts.groups, counts.labelled_groups, counts.responses) == (n, n, 0)
    assert {group.responses for group in groups} == {()}


def test_a_draw_depends_on_the_seed_and_the_id_alone() -> None:
    given = [with_label(label, n) for label, n in ((A, 2), (B, 1), (C, 2), (A, 1))]
    groups = prompts(300)

    def drawn(given: list[Group], groups: list[Group], seed: int) -> dict[str, AttributeLabel]:
        made = LabelDistribution.of(given).labelled(groups, seed, LabelCounts())
        return {group.id: group.label for group in made if group.label is not None}

    first = drawn(given, groups, 1)
    shuffled = random.Random(0).sample(groups, len(groups))
    assert drawn(given[::-1], shuffled, 1) == first
    assert drawn(given, groups[100:150], 1) == {g.id: first[g.id] for g in groups[100:150]}
    other = drawn(given, groups, 2)
    agreeing = sum(other[key] == first[key] for key in first) / len(first)
    assert 0.2 < agreeing < 0.6  # Independent draws agree in 1/4 + 1/36 + 1/9 = 39 %.


def test_some_attributes_of_the_labels() -> None:
    distribution = LabelDistribution.of([with_label(A), with_label(B, 2)], ["verbosity"])
    assert [label.text for label in distribution.labels] == ["verbosity:0", "verbosity:2"]
    assert distribution.numbers == (2, 1)
    with pytest.raises(UserError, match=r"names asks for humor, but .*'x' is of helpfulness, verb"):
        LabelDistribution.of([with_label(A)], ["humor", "verbosity"])
    for groups in ([], [with_label(None)]):
        with pytest.raises(UserError, match="none of their groups has a label"):
            LabelDistribution.of(groups)
