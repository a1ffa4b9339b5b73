"""Figures of steerability against policies whose obedience is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.config.checked import check
from helpsteer2.data.groups import Group
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import ConfigError, UserError
from helpsteer2.evaluation.steerability import SteerabilityEvaluation, rank_correlations
from helpsteer2.generation.sampling import Sample, SamplingParams, with_labels
from helpsteer2.plots import save
from helpsteer2.world.answers import best_answer, random_answer
from helpsteer2.world.oracle import rate_answer
from helpsteer2.world.sentences import Claim
from helpsteer2.world.source import WorldSource
from helpsteer2.world.tasks import Task, parse_task

N = 2
DATA = WorldSource(groups=1, seed=7, validation_groups=24)
SAMPLING = SamplingParams(n=N, max_tokens=200)
PAPER = {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
OTHERS = {
    name: [other for other in HELPSTEER2_ATTRIBUTES if other != name]
    for name in HELPSTEER2_ATTRIBUTES
}

Writer = Callable[[random.Random, Task, dict[str, int]], str]


def worded(rng: random.Random, task: Task, asked: dict[str, int]) -> str:
    """The best answer, in words whose complexity is the one asked for, exactly."""
    del rng
    noun, verb = asked["complexity"] // 2, (asked["complexity"] + 1) // 2
    sentences = []
    for name, sentence in zip(task.asked, best_answer(task).split(". "), strict=True):
        start, comma, _ = sentence.rpartition(",")
        mark = True if task.marked else None
        claim = Claim(name, task.facts[name], noun, verb, start + comma, mark)
        sentences.append(claim.text)
    return " ".join(sentences)


POOLS: dict[str, tuple[list[str], np.ndarray]] = {}


def pool(task: Task) -> tuple[list[str], np.ndarray]:
    """Answers to a task with their ratings, made once."""
    key = repr(task)
    if key not in POOLS:
        rng = random.Random(key)
        texts = [random_answer(rng, task) for _ in range(80)]
        POOLS[key] = texts, np.array([rate_answer(task, text) for text in texts])
    return POOLS[key]


def nearest(rng: random.Random, task: Task, asked: dict[str, int]) -> str:
    """Of many answers the one whose ratings are nearest to those asked for."""
    texts, ratings = pool(task)
    some = rng.sample(range(len(texts)), 40)
    wanted = np.array([asked[name] for name in HELPSTEER2_ATTRIBUTES])
    return texts[some[np.abs(ratings[some] - wanted).sum(1).argmin()]]


def deaf(rng: random.Random, task: Task, asked: dict[str, int]) -> str:
    """Whatever is asked for."""
    del asked
    return rng.choice(pool(task)[0])


def hard_of_hearing(rng: random.Random, task: Task, asked: dict[str, int]) -> str:
    """What is asked for, one time in two."""
    return (nearest if rng.random() < 0.5 else deaf)(rng, task, asked)


WRITERS: dict[str, Writer] = {
    "worded": worded, "nearest": nearest, "deaf": deaf, "hard of hearing": hard_of_hearing,
    "plain": deaf,
}  # fmt: skip


@dataclass
class FakePolicy:
    """Writes as its path says; a plain one was trained without labels."""

    path: str
    passes: list[tuple[str, list[Group]]] = field(default_factory=list)

    @property
    def label_attributes(self) -> tuple[str, ...]:
        return () if self.path == "plain" else HELPSTEER2_ATTRIBUTES

    def beside(self, path: str) -> FakePolicy:
        return FakePolicy(path, self.passes)

    def sample(
        self, name: str, prompts: Any, params: SamplingParams, console: Any, steering: Any = None
    ) -> list[list[Sample]]:
        labelled = with_labels(prompts, steering, self.label_attributes)
        self.passes.append((self.path, labelled))
        assert len({group.id for group in labelled}) == len(labelled)
        return [[self.answer(group, i) for i in range(params.n)] for group in labelled]

    def answer(self, group: Group, index: int) -> Sample:
        rng = random.Random(f"{self.path} {group.id} {index}")
        asked = {} if group.label is None else group.label.as_dict()
        text = WRITERS[self.path](rng, parse_task(group.prompt), asked)
        return Sample((1, 2), text, "stop", None)


Judge = Callable[..., dict[str, Any]]


@pytest.fixture
def judge(context: Any) -> Judge:
    def call(path: str, policy: FakePolicy | None = None, **settings: Any) -> dict[str, Any]:
        evaluation = SteerabilityEvaluation(
            DATA, **{"sampling": SAMPLING, "resamples": 100, **settings}
        )
        return evaluation.evaluate(policy or FakePolicy(path), context=context)  # type: ignore[arg-type]

    return call


def exact(figure: dict[str, float], value: float) -> bool:
    return all(figure[end] == pytest.approx(value, abs=1e-9) for end in ("value", "low", "high"))


def test_exact_obedience_moves_one_rating_and_no_other(judge: Judge) -> None:
    result = judge("worded", attributes=["complexity"])
    figures = result["attributes"]["complexity"]
    for level, got in figures["got"].items():
        assert exact(got, float(level)), level
    assert exact(figures["spearman"], 1.0)
    assert exact(figures["gap"], 0.0)
    assert exact(figures["slopes"]["complexity"], 1.0)
    for other in OTHERS["complexity"]:
        assert exact(figures["slopes"][other], 0.0), other
    for name in ("cross_talk", "moves"):
        assert exact(figures[name], 0.0)
        assert exact(result[name], 0.0)
    assert exact(result["gap"], 0.0)
    # Asked for something else, it still writes what it likes: of no use where it is not heard.
    whole = judge("worded", attributes=["complexity", "correctness"])
    assert whole["attributes"]["correctness"]["spearman"]["value"] is None
    assert exact(whole["attributes"]["correctness"]["gap"], (4 + 3 + 2 + 1 + 0) / 5)
    assert exact(whole["gap"], 1.0)


def test_figures_are_those_of_a_count_by_hand(judge: Judge) -> None:
    policy = FakePolicy("nearest")
    result = judge("nearest", policy)
    groups = [group for group, _ in DATA.judged("validation")]
    tasks = [parse_task(group.prompt) for group in groups]
    # Every distinct label once: the base, and four other levels of each attribute.
    ((_, prompts),) = policy.passes
    assert len(prompts) == (5 * 4 + 1) * len(groups)
    for name, figures in result["attributes"].items():
        rated = np.empty((5, len(groups), N, 5))
        for level in range(5):
            label = AttributeLabel.of({**PAPER, name: level})
            read = [group for group in prompts if group.label == label]
            assert [group.prompt for group in read] == [group.prompt for group in groups]
            for p, (group, task) in enumerate(zip(read, tasks, strict=True)):
                texts = [policy.answer(group, i).text for i in range(N)]
                rated[level, p] = [rate_answer(task, text) for text in texts]
        own = rated[..., HELPSTEER2_ATTRIBUTES.index(name)]
        levels = np.broadcast_to(np.arange(5.0)[:, None, None], own.shape)
        means = rated.mean((1, 2))
        got = [figures["got"][str(level)]["value"] for level in range(5)]
        np.testing.assert_allclose(got, own.mean((1, 2)))
        assert figures["gap"]["value"] == pytest.approx(np.abs(own - levels).mean())
        correlation = stats.spearmanr(levels.ravel(), own.ravel()).statistic
        assert figures["spearman"]["value"] == pytest.approx(correlation)
        slopes = np.polyfit(np.arange(5), means, 1)[0]
        told = [figures["slopes"][moved]["value"] for moved in HELPSTEER2_ATTRIBUTES]
        np.testing.assert_allclose(told, slopes, atol=1e-9)
        others = [HELPSTEER2_ATTRIBUTES.index(other) for other in OTHERS[name]]
        assert figures["cross_talk"]["value"] == pytest.approx(np.abs(slopes[others]).mean())
        distances = np.abs(means - means[PAPER[name]])[:, others]
        assert figures["moves"]["value"] == pytest.approx(distances.mean())
        for figure in (figures["gap"], figures["spearman"], *figures["slopes"].values()):
            assert figure["low"] <= figure["value"] <= figure["high"]
        assert figures["gap"]["low"] < figures["gap"]["high"]
    for total in ("gap", "cross_talk", "moves"):
        values = [figures[total]["value"] for figures in result["attributes"].values()]
        assert result[total]["value"] == pytest.approx(np.mean(values))


def test_the_better_a_policy_listens_the_better_its_figures(judge: Judge) -> None:
    close, half, none = (judge(path) for path in ("nearest", "hard of hearing", "deaf"))
    assert close["gap"]["high"] < half["gap"]["low"] < half["gap"]["high"] < none["gap"]["low"]
    for name in ("complexity", "verbosity"):
        listening, partly, not_at_all = (
            result["attributes"][name]["spearman"] for result in (close, half, none)
        )
        assert listening["low"] > partly["value"] > not_at_all["high"]
        assert not_at_all["low"] < 0 < not_at_all["high"]
        slope = close["attributes"][name]["slopes"][name]["value"]
        assert 0.3 < slope < 1.2


def test_a_policy_without_labels_is_sampled_once_for_all_requests(judge: Judge) -> None:
    policy = FakePolicy("plain")
    result = judge("plain", policy)
    ((_, prompts),) = policy.passes
    groups = [group for group, _ in DATA.judged("validation")]
    assert [(group.id, group.label) for group in prompts] == [(group.id, None) for group in groups]
    assert result["label_attributes"] == []
    for figures in result["attributes"].values():
        assert len({got["value"] for got in figures["got"].values()}) == 1
        assert exact(figures["spearman"], 0.0)
        for figure in (*figures["slopes"].values(), figures["cross_talk"], figures["moves"]):
            assert figure == {"value": 0.0, "low": 0.0, "high": 0.0}
    mean = result["attributes"]["verbosity"]["got"]["0"]["value"]
    assert (
        result["attributes"]["verbosity"]["gap"]["value"] > abs(mean - np.arange(5)).mean() - 1e-9
    )


def test_differences_from_a_baseline_are_paired_and_below_0_where_it_is_beaten(
    judge: Judge,
) -> None:
    close = judge("nearest", baseline="plain")
    alone, before = judge("nearest"), judge("plain")
    assert close["gap_difference"]["high"] < 0
    assert close["gap"] == alone["gap"]
    assert close["baseline_gap"] == before["gap"]
    for figures in (close, *close["attributes"].values()):
        difference = figures["gap"]["value"] - figures["baseline_gap"]["value"]
        assert figures["gap_difference"]["value"] == pytest.approx(difference)
    assert judge("plain", baseline="nearest")["gap_difference"]["value"] == pytest.approx(
        -close["gap_difference"]["value"]
    )
    same = judge("nearest", baseline="nearest")
    for figures in (same, *same["attributes"].values()):
        assert exact(figures["gap_difference"], 0.0)


def test_a_baseline_is_sampled_once_for_all_policies(context: Any) -> None:
    evaluation = SteerabilityEvaluation(DATA, SAMPLING, baseline="plain", resamples=10)
    passes: list[Any] = []
    for path in ("plain", "deaf", "hard of hearing"):
        evaluation.evaluate(FakePolicy(path, passes), context=context)  # type: ignore[arg-type]
    assert [path for path, _ in passes] == ["plain", "deaf", "hard of hearing"]


def test_intervals_cover_what_is_true_of_all_prompts() -> None:
    """About 95 of 100 samples of prompts have the truth in their interval."""
    rng = np.random.default_rng(0)
    # Answers to one prompt are alike: prompts that follow and prompts that do not.
    follows = rng.random(4000) < 0.5
    levels = np.arange(5.0)[:, None, None]
    noise = rng.normal(0, 0.7, (5, 4000, 2))
    got = np.where(follows[:, None], levels, 2.0) + noise
    truth = stats.spearmanr(np.broadcast_to(levels, got.shape).ravel(), got.ravel()).statistic
    covered = 0
    for seed in range(100):
        drawn = rng.choice(4000, 60, replace=False)
        ratings = np.zeros((1, 5, 60, 2, 5))
        ratings[0, ..., 4] = got[:, drawn]
        (interval,) = rank_correlations(ratings, ["verbosity"], np.arange(60), 100, seed)
        covered += interval.low <= truth <= interval.high
    assert 85 <= covered <= 100


def test_the_base_says_what_is_not_being_asked_about(judge: Judge) -> None:
    policy = FakePolicy("nearest")
    result = judge("nearest", policy, attributes=["verbosity"], base={"helpfulness": 0})
    assert result["base"] == {**PAPER, "helpfulness": 0}
    ((_, prompts),) = policy.passes
    read = {group.label for group in prompts}
    assert read == {
        AttributeLabel.of({**PAPER, "helpfulness": 0, "verbosity": level}) for level in range(5)
    }
    assert set(result["attributes"]) == {"verbosity"}
    moved = judge("nearest", attributes=["verbosity"], base={"verbosity": 0})
    assert moved["attributes"]["verbosity"]["moves"] != result["attributes"]["verbosity"]["moves"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attributes": []}, "one or more of helpfulness"),
        ({"attributes": ["humor"]}, "humor"),
        ({"attributes": ["verbosity", "verbosity"]}, "each once"),
        ({"base": {"verbosity": 5}}, "whole number 0 to 4"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SteerabilityEvaluation(DATA, SAMPLING, **settings)


def test_other_attributes_than_those_of_the_training_are_refused(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakePolicy, "label_attributes", ("helpfulness", "verbosity"))
    with pytest.raises(UserError, match="was not trained with correctness"):
        judge("nearest")
    monkeypatch.setitem(WRITERS, "short", lambda rng, task, asked: best_answer(task))
    result = judge("short", attributes=["verbosity"])
    assert result["base"] == {"helpfulness": 4, "verbosity": 2}


def test_prompts_of_other_data_are_refused_before_a_policy_is_there(fakes: Any) -> None:
    source = fakes.source({"validation": [fakes.group(0, ["x", "y"])]})
    with pytest.raises(UserError, match="made-up world"):
        SteerabilityEvaluation(source, SAMPLING).check()


@pytest.mark.parametrize("baseline", [None, "plain"])
def test_tables_and_headlines_hold_the_figures(
    judge: Judge, as_text: Any, baseline: str | None
) -> None:
    evaluation = SteerabilityEvaluation(DATA, SAMPLING, baseline=baseline)
    for path in ("nearest", "plain"):
        result = judge(path, baseline=baseline)
        text = as_text(evaluation.tables(result))
        assert max(map(len, text.splitlines())) <= 100
        assert ("without labels" in text) == (path == "plain")
        # Every interval stands whole on its line.
        for figures in result["attributes"].values():
            for figure in (*figures["got"].values(), figures["gap"], *figures["slopes"].values()):
                assert f"{figure['low']:.2f}–{figure['high']:.2f}" in text
        headlines = evaluation.headlines(result)
        assert headlines["mean gap"].startswith(f"{result['gap']['value']:.2f}")
        assert ("mean gap, less baseline" in headlines) == (baseline is not None)
        for name in ("complexity", "verbosity"):
            value = result["attributes"][name]["spearman"]["value"]
            assert headlines[f"{name}, Spearman"].startswith(f"{value:.2f}")


def test_plots_show_every_policy(judge: Judge, tmp_path: Path) -> None:
    results = {path: judge(path) for path in ("nearest", "plain")}
    evaluation = SteerabilityEvaluation(DATA, SAMPLING)
    plots = evaluation.figures(results)
    curves = plots["asked_got"]
    assert [axes.get_title() for axes in curves.axes] == list(HELPSTEER2_ATTRIBUTES)
    line = curves.axes[4].containers[0][0]
    wanted = [got["value"] for got in results["nearest"]["attributes"]["verbosity"]["got"].values()]
    np.testing.assert_allclose(line.get_ydata(), wanted)
    first, second = plots["cross_talk"].axes[:2]
    assert [axes.get_title() for axes in (first, second)] == list(results)
    # Row asked, column moved.
    slope = results["nearest"]["attributes"]["verbosity"]["slopes"]["helpfulness"]["value"]
    texts = {text.get_position(): text.get_text() for text in first.texts}
    assert texts[0, 4] == f"{slope:.2f}"
    assert {text.get_text() for text in second.texts} == {"0.00"}
    for name, figure in plots.items():
        save(figure, tmp_path / f"{name}.png")


def test_the_configuration_composes() -> None:
    command = CONFIG_COMMANDS["evaluate"]
    given = ["model=some/export", "evaluator=[steerability,world_policy]"]
    steered = [
        "evaluators.steerability.attributes=[verbosity]",
        "evaluators.steerability.base={helpfulness: 3}",
        "evaluators.steerability.baseline=other/export",
        "evaluators.world_policy.steering={verbosity: 4}",
    ]
    (job,) = check(command, [*given, *steered]).jobs
    assert job["evaluators.steerability.data.seed"] == 1000
    assert job["evaluators.steerability.base"] == {"helpfulness": 3}
    assert job["evaluators.world_policy.steering"] == {"verbosity": 4}
    with pytest.raises(ConfigError, match=r"steerability\.base"):
        check(command, [*given, "evaluators.steerability.base={verbosity: high}"])


def test_every_prompt_counts_as_often_as_it_is_there(judge: Judge, context: Any) -> None:
    result = judge("nearest")
    groups = [group for group, _ in DATA.judged("validation")]
    assert result["groups"] == len(groups) >= result["prompts"]
    assert result["samples"] == N
    assert result["fingerprint"] == DATA.fingerprint("validation")
    assert result["unfinished"]["value"] == 0.0
    example = result["examples"][0]
    assert example["prompt"] == groups[0].prompt[-1]["content"]
    assert set(example["answers"]["verbosity"]) == set("01234")
    again = SteerabilityEvaluation(DATA, SAMPLING, resamples=100).evaluate(
        FakePolicy("nearest"),  # type: ignore[arg-type]
        context=replace(context, seed=context.seed + 1),
    )
    assert again["gap"]["value"] == result["gap"]["value"]
    assert again["gap"]["low"] != result["gap"]["low"]
