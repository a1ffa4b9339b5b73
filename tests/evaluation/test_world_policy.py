from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.data.labels import INFERENCE_VALUES, AttributeLabel
from helpsteer2.errors import UserError
from helpsteer2.evaluation.prompt_means import PromptMeans
from helpsteer2.evaluation.rated_answers import best_scores, score
from helpsteer2.evaluation.world_policy import WorldPolicyEvaluation
from helpsteer2.generation.sampling import Sample, SamplingParams, with_labels
from helpsteer2.plots import save
from helpsteer2.world.answers import best_answer, random_answer
from helpsteer2.world.oracle import rate_answer
from helpsteer2.world.source import WorldSource
from helpsteer2.world.tasks import Task, parse_task

N = 4
RLHF = AttributeWeights("rlhf", {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45})
WORDY = AttributeWeights("wordy", {"complexity": 0.5, "verbosity": -1.5})
DATA = WorldSource(groups=1, seed=7, validation_groups=60)
SAMPLING = SamplingParams(n=N, max_tokens=40)


@dataclass
class FakePolicy:
    """Answers as well as its path says, with log-probabilities that it says too.

    A steered one was trained with labels, and answers in the wording that they ask for.
    """

    path: str
    opened: list[str]

    writers: ClassVar[dict[str, Any]] = {
        "best": lambda rng, task: best_answer(task),
        "random": random_answer,
        "half": lambda rng, task: (
            best_answer(task) if rng.random() < 0.5 else random_answer(rng, task)
        ),
    }

    @property
    def label_attributes(self) -> tuple[str, ...]:
        return HELPSTEER2_ATTRIBUTES if self.path == "steered" else ()

    @property
    def sampler(self) -> Any:
        return SimpleNamespace(ids_hash="hash")

    def beside(self, path: str) -> FakePolicy:
        return FakePolicy(path, self.opened)

    def sample(
        self, name: str, prompts: Any, params: SamplingParams, console: Any, steering: Any = None
    ) -> Any:
        prompts = with_labels(prompts, steering, self.label_attributes)
        if self.path == "steered":
            level = prompts[0].label.as_dict()["complexity"] // 2
            self.writers["steered"] = lambda rng, task: best_answer(task, level)
        self.opened.append(f"{self.path} {params.temperature:g}")
        rng = random.Random(f"{self.path} {params.temperature}")
        return [
            [self.answer(rng, parse_task(group.prompt), params) for _ in range(params.n)]
            for group in prompts
        ]

    def answer(self, rng: random.Random, task: Task, params: SamplingParams) -> Sample:
        text = self.writers[self.path](rng, task)
        ids = tuple(range(len(text.split()) + 1))
        if len(ids) > params.max_tokens:
            cut = " ".join(text.split()[: params.max_tokens])
            return Sample(ids[: params.max_tokens], cut, "length", (-1.0,) * params.max_tokens)
        return Sample(ids, text, "stop", (-1.0,) * len(ids))

    def logprobs(self, sampled: list[Group]) -> Any:
        for group in sampled:
            assert group.tokenizer == "hash"
            # A token is half a nat less likely than under the sampler.
            yield np.array([-1.5 * len(ids) for ids in group.response_ids or ()], dtype=np.float32)


Judge = Callable[..., dict[str, Any]]


@pytest.fixture
def opened() -> list[str]:
    return []


@pytest.fixture
def judge(context: Any, opened: list[str]) -> Judge:
    def call(path: str, *weightings: AttributeWeights, **settings: Any) -> dict[str, Any]:
        evaluation = WorldPolicyEvaluation(
            DATA, **{"sampling": SAMPLING, "resamples": 200, **settings}
        )
        own = replace(context, weightings=weightings or (RLHF,))
        return evaluation.evaluate(FakePolicy(path, opened), context=own)  # type: ignore[arg-type]

    return call


def tasks() -> list[Task]:
    return [parse_task(group.prompt) for group, _ in DATA.judged("validation")]


def test_the_best_policy_has_closed_the_gap_and_the_baseline_none_of_it(judge: Judge) -> None:
    best, same = judge("best", baseline="random"), judge("random", baseline="random")
    figures = best["weightings"]["rlhf"]
    assert figures["sampled"]["value"] == figures["best_answer"]["value"] == pytest.approx(4.0)
    assert figures["gap_closed"]["value"] == pytest.approx(1.0)
    assert figures["gain"]["low"] > 0.5
    nothing = same["weightings"]["rlhf"]
    for name in ("gain", "gap_closed"):
        assert nothing[name]["value"] == nothing[name]["low"] == nothing[name]["high"] == 0.0
    assert nothing["baseline_best_of_n"] == nothing["best_of_n"]
    assert nothing["baseline_best_of_n_gap_closed"] == nothing["best_of_n_gap_closed"]


def test_figures_are_those_of_a_count_by_hand(judge: Judge) -> None:
    result = judge("half", baseline="random")
    fakes = {
        path: FakePolicy(path, []).sample(
            "", [g for g, _ in DATA.judged("validation")], SAMPLING, 0
        )
        for path in ("half", "random")
    }
    ratings = {
        path: np.array([
            [rate_answer(task, one.text) for one in drawn]
            for task, drawn in zip(tasks(), answers, strict=True)
        ])
        for path, answers in fakes.items()
    }  # fmt: skip
    for i, name in enumerate(HELPSTEER2_ATTRIBUTES):
        assert result["attributes"][name]["sampled"]["value"] == pytest.approx(
            ratings["half"][..., i].mean()
        )
        assert result["attributes"][name]["baseline"]["value"] == pytest.approx(
            ratings["random"][..., i].mean()
        )
    scores = {
        path: rows @ np.array([0.65, 0.8, 0.45, 0, 0]) / 1.9 for path, rows in ratings.items()
    }
    own, before = scores["half"].mean(), scores["random"].mean()
    figures = result["weightings"]["rlhf"]
    assert figures["best_of_n"]["value"] == pytest.approx(scores["half"].max(1).mean())
    assert figures["gain"]["value"] == pytest.approx(own - before)
    assert figures["gap_closed"]["value"] == pytest.approx((own - before) / (4.0 - before))
    assert figures["gap_closed"]["low"] < figures["gap_closed"]["value"]
    lengths = [len(one.ids) for drawn in fakes["half"] for one in drawn]
    assert result["tokens"]["sampled"]["value"] == pytest.approx(np.mean(lengths))
    assert result["prompts"] <= result["groups"] == 60
    assert result["samples"] == N


def test_the_divergence_is_the_mean_log_ratio_of_an_answer(judge: Judge) -> None:
    result = judge("random", reference="best")
    assert result["kl"]["value"] == pytest.approx(0.5 * result["tokens"]["sampled"]["value"])
    assert result["kl"]["low"] < result["kl"]["value"] < result["kl"]["high"]
    assert "nats" in result["kl_estimator"]
    assert judge("random")["kl"] is None


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_no_divergence_of_a_policy_that_is_sampled_otherwise_than_it_is(change: Any) -> None:
    sampling = SamplingParams(n=N, **change)
    WorldPolicyEvaluation(DATA, sampling)
    with pytest.raises(UserError, match="temperature=1"):
        WorldPolicyEvaluation(DATA, sampling, reference="x")


def test_policies_with_labels_answer_as_asked_beside_others_that_cannot_be_asked(
    judge: Judge,
) -> None:
    result = judge("steered", baseline="random")
    # arXiv 2406.08673, section 4.5.
    assert result["steering"] == {
        "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2,
    }  # fmt: skip
    assert {name: INFERENCE_VALUES[name] for name in HELPSTEER2_ATTRIBUTES} == result["steering"]
    assert result["attributes"]["complexity"]["sampled"]["value"] == pytest.approx(2.0)
    learned = judge("steered", steering={"complexity": 4})
    assert learned["steering"] == {**result["steering"], "complexity": 4}
    assert learned["attributes"]["complexity"]["greedy"]["value"] == pytest.approx(4.0)
    assert judge("random", steering={"complexity": 4})["steering"] is None
    with pytest.raises(UserError, match="whole number 0 to 4"):
        judge("steered", steering={"complexity": 7})
    with pytest.raises(UserError, match="was not trained with humor"):
        judge("steered", steering={"humor": 1})


def test_both_policies_of_a_divergence_are_told_what_was_asked_for(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    plain = FakePolicy.logprobs

    def logprobs(self: FakePolicy, sampled: list[Group]) -> Any:
        read.extend((self.path, group.label) for group in sampled)
        return plain(self, sampled)

    monkeypatch.setattr(FakePolicy, "logprobs", logprobs)
    result = judge("steered", reference="random", steering={"complexity": 0})
    # The policy's own are known from the sampling, so the reference alone is run.
    assert set(read) == {("random", AttributeLabel.of({"complexity": 0}))}
    assert result["kl"]["value"] == pytest.approx(0.5 * result["tokens"]["sampled"]["value"])


def test_unfinished_answers_are_counted(judge: Judge) -> None:
    result = judge("best", sampling=SamplingParams(n=N, max_tokens=8))
    long = [len(best_answer(task).split()) + 1 > 8 for task in tasks()]
    assert 0 < np.mean(long) < 1
    assert result["unfinished"]["sampled"]["value"] == pytest.approx(np.mean(long))
    assert result["unfinished"]["greedy"] == result["unfinished"]["sampled"]


def test_policies_are_sampled_once_however_many_are_held_against_a_baseline(
    context: Any, opened: list[str]
) -> None:
    evaluation = WorldPolicyEvaluation(DATA, SAMPLING, baseline="random", resamples=10)
    for path in ("random", "half", "best"):
        evaluation.evaluate(FakePolicy(path, opened), context=context)  # type: ignore[arg-type]
    assert sorted(opened) == ["best 0", "best 1", "half 0", "half 1", "random 0", "random 1"]


def test_a_score_is_a_weighted_mean_and_the_best_wording_counts(judge: Judge) -> None:
    ratings = np.array([[4.0, 3.0, 2.0, 1.0, 0.0]])
    assert score(ratings, RLHF) == pytest.approx([(2.6 + 2.4 + 0.9) / 1.9])
    assert score(ratings, WORDY) == pytest.approx([0.25])
    (learned,) = best_scores(tasks()[:1], AttributeWeights("w", {"complexity": 1.0}))
    assert learned == 4.0
    # Weightings that name the same attribute as a rating, or each other's, stay apart.
    named = AttributeWeights("helpfulness", {"verbosity": 1.0})
    result = judge("best", named)
    assert result["weightings"]["helpfulness"]["sampled"]["value"] == pytest.approx(2.0)
    assert result["attributes"]["helpfulness"]["sampled"]["value"] == pytest.approx(4.0)
    with pytest.raises(UserError, match="two weightings"):
        judge("best", RLHF, RLHF)


@pytest.mark.parametrize(
    "values",
    [
        {"complexity": 1.0, "verbosity": 0.5},
        {"helpfulness": 1.0, "verbosity": -0.4},
        {"helpfulness": 1.0, "correctness": -0.1},
    ],
)
def test_no_gap_where_another_answer_may_be_better(judge: Judge, values: Any) -> None:
    result = judge("half", AttributeWeights("other", values), baseline="random")
    figures = result["weightings"]["other"]
    for name in ("best_answer", "gap_closed", "best_of_n_gap_closed"):
        assert figures[name] == {"value": None, "low": None, "high": None}
    assert figures["best_of_n"]["value"] >= figures["sampled"]["value"]
    evaluation = WorldPolicyEvaluation(DATA, SAMPLING, baseline="random")
    assert set(evaluation.headlines(result)) == {"other, sampled", "unfinished %", "tokens"}


@pytest.mark.parametrize("complexity", [-1.0, 0.0, 1.0])
def test_no_answer_scores_above_the_best(complexity: float) -> None:
    weights = AttributeWeights("w", {**RLHF.values, "complexity": complexity})
    rng = random.Random(0)
    for task, best in zip(tasks(), best_scores(tasks(), weights), strict=True):
        answers = [random_answer(rng, task) for _ in range(20)]
        others = score(np.array([rate_answer(task, answer) for answer in answers]), weights)
        assert others.max() <= best + 1e-9


def test_prompts_of_other_data_are_refused(judge: Judge, fakes: Any) -> None:
    source = fakes.source({"validation": [fakes.group(0, ["x", "y"])]})
    evaluation = WorldPolicyEvaluation(source, SAMPLING)
    with pytest.raises(UserError, match="made-up world"):
        evaluation.evaluate(FakePolicy("best", []), context=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("baseline", [None, "random"])
def test_tables_and_headlines_hold_the_figures(
    judge: Judge, as_text: Any, baseline: str | None, tmp_path: Path
) -> None:
    result = judge("half", RLHF, WORDY, baseline=baseline, reference="random")
    evaluation = WorldPolicyEvaluation(DATA, SAMPLING, baseline=baseline)
    text = as_text(evaluation.tables(result))
    assert max(map(len, text.splitlines())) <= 100
    figures = result["weightings"]["rlhf"]
    assert f"{figures['sampled']['value']:.2f}" in text
    assert f"{result['kl']['value']:.2f}" in text
    asked = {"helpfulness": 3}
    assert "Asked for helpfulness:3." in as_text(evaluation.tables({**result, "steering": asked}))
    headlines = evaluation.headlines(result)
    assert headlines["rlhf, sampled"].startswith(f"{figures['sampled']['value']:.2f}")
    assert ("rlhf, gap closed %" in headlines) == (baseline is not None)
    plots = evaluation.figures({"half": result, "other": result})
    save(plots["ratings"], tmp_path / "a.png")
    (axes,) = plots["ratings"].axes
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == (["baseline"] if baseline else []) + ["half", "other"]
    heights = [bar.get_height() for bar in axes.patches]
    values = [of["sampled"]["value"] for of in result["attributes"].values()]
    assert heights[-5:] == pytest.approx(values)


def test_equal_prompts_are_drawn_together() -> None:
    values = np.array([0.0, 0.0, 1.0, 1.0])
    columns = {"a": values, "b": values + 1}
    together = PromptMeans(columns, ["x", "x", "y", "y"], 500, 0)
    apart = PromptMeans(columns, list("wxyz"), 500, 0)
    assert together.of("a").low == 0.0
    assert apart.of("a").high - apart.of("a").low <= together.of("a").high - together.of("a").low
    difference = together.figure(lambda of: of["b"] - of["a"])
    assert (difference.low, difference.high) == (1.0, 1.0)
    nothing = together.figure(lambda of: of["a"] / (of["b"] - of["a"] - 1))
    assert np.isnan(nothing.value) or np.isinf(nothing.value)
