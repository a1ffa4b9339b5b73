"""What the oracle of the made-up world says of a policy's answers to prompts it has not seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, RATING_MAX, RATING_MIN, AttributeWeights
from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import UserError
from helpsteer2.evaluation.policies import EvaluatedPolicy, label_read
from helpsteer2.evaluation.prompt_means import PromptMeans
from helpsteer2.evaluation.rated_answers import RatedAnswers, best_scores, score
from helpsteer2.evaluation.report import (
    keep_whole,
    named_table,
    percent_with_interval,
    with_interval,
)
from helpsteer2.evaluation.scoring import EvaluationContext, ModelKind, usable_weightings
from helpsteer2.functional.statistics import Interval
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.records import plain
from helpsteer2.world.tasks import Task, parse_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from helpsteer2.generation.sampling import Sample

Array = npt.NDArray[np.float64]

KL_ESTIMATOR = (
    "mean over sampled answers of the log-ratio of policy and reference, summed over the tokens of "
    "an answer (Monte Carlo, unbiased, in nats an answer); each of the two reads the label if it "
    "was trained with labels, so that of a policy with labels and a reference without it is the "
    "mean of log Q(y|a,x) − log P(y|x)"
)

EXAMPLES = 5


@dataclass(frozen=True)
class WorldPolicyEvaluation:
    """Sample answers to unseen prompts of the made-up world and have its oracle rate them.

    Of each weighting the score of an answer is the weighted mean of its ratings. Intervals are 95 %
    and resample prompts; those of differences between policies are paired.

    Args:
        data: Prompts of the world; responses and ratings are not looked at.
        sampling: How the sampled answers are drawn. The greedy ones share its length limit.
        split: Split that the prompts are of.
        reference: Folder of the policy that the KL divergence is measured from; None leaves it out.
        baseline: Folder of the policy that gains are measured from; None leaves them out.
        resamples: Bootstrap draws.
        steering: Ratings by attribute that the answers are asked to have, of every policy that was
            trained with labels; what is left out has its usual value, those of the paper if it is
            None. Policies without labels answer as ever.

    Raises:
        UserError: If the divergence is wanted of a policy that is not sampled as it is, or the
            ratings asked for are no label.
    """

    data: GroupSource
    sampling: SamplingParams
    split: str = "validation"
    reference: str | None = None
    baseline: str | None = None
    resamples: int = 1000
    steering: Mapping[str, int] | None = None
    _answers: dict[tuple[str, bool], RatedAnswers] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    takes: ClassVar[ModelKind] = "policy"

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")
        truncation = (self.sampling.temperature, self.sampling.top_p, self.sampling.top_k)
        if self.reference is not None and truncation != (1, 1, 0):
            raise UserError(
                "the KL divergence is estimated on samples of the policy as it is: with a "
                "reference, set sampling.temperature=1 sampling.top_p=1 sampling.top_k=0"
            )
        _ = self._asked

    @property
    def _asked(self) -> AttributeLabel | None:
        """The label asked for; None for the usual one."""
        return None if self.steering is None else AttributeLabel.of(self.steering)

    @cached_property
    def _prompts(self) -> tuple[list[Group], list[Task]]:
        groups = list(read_all(self.data, self.split))
        return groups, [parse_task(group.prompt) for group in groups]

    def check(self) -> None:
        """Read all prompts, for the policies to come; a ``UserError`` if one is bad."""
        _ = self._prompts

    def evaluate(self, policy: EvaluatedPolicy, /, context: EvaluationContext) -> dict[str, Any]:
        """Sample, rate and compute every figure.

        Args:
            policy: The policy.
            context: Weightings and the seed of the bootstrap.

        Returns:
            ``attributes`` (mean ratings), ``weightings`` (mean scores of sampled and greedy
            answers, of the best of n and of the best answer there is, null where that one is not
            known (``best_scores``), and what is gained on the baseline), ``tokens``,
            ``unfinished``, ``kl``, the label that the policy read (``steering``, null if it reads
            none), the counts and some answers.

        Raises:
            DataError: If a row of the data is bad.
            UserError: If a prompt is not of the world, or a policy cannot be used.
        """
        groups, tasks = self._prompts
        sampled = self._rated(policy, groups, tasks, context.console)
        greedy = self._rated(policy, groups, tasks, context.console, greedy=True)
        usable = usable_weightings(context.weightings, HELPSTEER2_ATTRIBUTES)
        columns = _columns(sampled, greedy, tasks, usable.weightings)
        if self.baseline is not None:
            before = policy.beside(self.baseline)
            rated = self._rated(before, groups, tasks, context.console)
            columns |= _score_columns("baseline", rated.ratings, usable.weightings)
        if self.reference is not None:
            asked = [replace(group, label=self._asked) for group in groups]
            columns["kl"] = _log_ratios(policy, self.reference, asked, sampled.samples).mean(1)
        prompts = [json.dumps(group.prompt) for group in groups]
        label = label_read(self._asked, policy.label_attributes)
        means = PromptMeans(columns, prompts, self.resamples, context.seed)
        return dict(plain({
            "split": self.split,
            "prompts": len(set(prompts)),
            "groups": len(groups),
            "samples": self.sampling.n,
            "fingerprint": self.data.fingerprint(self.split),
            "baseline": self.baseline,
            "reference": self.reference,
            "steering": None if label is None else label.as_dict(),
            "attributes": {
                name: self._figures(means, f"rating {name}") for name in HELPSTEER2_ATTRIBUTES
            },
            "weightings": {
                weights.name: self._score_figures(means, f"score {weights.name}")
                for weights in usable.weightings
            },
            "skipped_weightings": usable.skipped,
            "tokens": {kind: means.of(f"{kind} tokens") for kind in ("sampled", "greedy")},
            "unfinished": {kind: means.of(f"{kind} unfinished") for kind in ("sampled", "greedy")},
            "kl": None if self.reference is None else means.of("kl"),
            "kl_estimator": KL_ESTIMATOR,
            "examples": _examples(groups, sampled.samples, greedy.samples),
        }))  # fmt: skip

    def _rated(
        self,
        policy: EvaluatedPolicy,
        groups: Sequence[Group],
        tasks: Sequence[Task],
        console: Console,
        greedy: bool = False,
    ) -> RatedAnswers:
        """Answers of a policy; those of a baseline serve every policy that is held against it."""
        key = (policy.path, greedy)
        if key not in self._answers:
            params = replace(self.sampling, n=1, temperature=0.0) if greedy else self.sampling
            name = f"{'greedy' if greedy else 'sampled'} answers of {policy.path}"
            label = label_read(self._asked, policy.label_attributes)
            samples = policy.sample(name, groups, params, console, label)
            self._answers[key] = RatedAnswers.of(tasks, samples)
        return self._answers[key]

    def _figures(self, means: PromptMeans, what: str) -> dict[str, Interval]:
        """Mean of a rating or a score under the baseline, sampled and greedy."""
        before = [] if self.baseline is None else ["baseline"]
        return {kind: means.of(f"{kind} {what}") for kind in (*before, "sampled", "greedy")}

    def _score_figures(self, means: PromptMeans, what: str) -> dict[str, Interval]:
        """All that is told of one weighting."""
        own, before, best = f"sampled {what}", f"baseline {what}", f"best {what}"
        figures = self._figures(means, what) | {
            "best_of_n": means.of(f"top {own}"),
            "best_answer": means.of(best),
            "best_of_n_gap_closed": means.share_of_gap(f"top {own}", own, best),
        }
        if self.baseline is not None:
            figures |= {
                "baseline_best_of_n": means.of(f"top {before}"),
                "gain": means.figure(lambda of: of[own] - of[before]),
                "gap_closed": means.share_of_gap(own, before, best),
                "baseline_best_of_n_gap_closed": means.share_of_gap(f"top {before}", before, best),
            }
        return figures

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return [world_policy_table(result)]

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Scores under every weighting, and what a score does not tell."""
        rows = {}
        for name, figures in result["weightings"].items():
            rows[f"{name}, sampled"] = with_interval(figures["sampled"], 2)
            if "gap_closed" in figures and figures["gap_closed"]["value"] is not None:
                rows[f"{name}, gap closed %"] = percent_with_interval(figures["gap_closed"])
        rows["unfinished %"] = percent_with_interval(result["unfinished"]["sampled"])
        rows["tokens"] = with_interval(result["tokens"]["sampled"], 1)
        if result["kl"] is not None:
            rows["KL to reference"] = with_interval(result["kl"], 2)
        return rows

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        """Plots of the results of one or more policies, by file name without suffix."""
        from helpsteer2.plots import bars

        series: dict[str, list[Any]] = {}
        for name, result in results.items():
            of_attributes = result["attributes"].values()
            if result["baseline"] is not None:
                series["baseline"] = [figures["baseline"] for figures in of_attributes]
            series[name] = [figures["sampled"] for figures in of_attributes]
        first = next(iter(results.values()))
        title = f"sampled answers to {first['prompts']:,} prompts: mean rating of the oracle"
        limits = (RATING_MIN, RATING_MAX)
        return {"ratings": bars(series, list(first["attributes"]), title=title, limits=limits)}


def world_policy_table(result: Mapping[str, Any]) -> Table:
    """Ratings and scores of one policy.

    Args:
        result: As made by ``WorldPolicyEvaluation.evaluate``.
    """
    with_baseline = result["baseline"] is not None
    kinds = ("baseline", "sampled", "greedy") if with_baseline else ("sampled", "greedy")
    n = result["samples"]
    names = ["", *kinds, f"best of {n}", "best answer"]
    caption = "scores: weighted mean of the ratings. Second line: 95 % interval over prompts."
    if with_baseline:
        names.append("gap closed %")
        caption += " gap closed: of the way from the baseline's sampled answers to the best ones."
    if result["steering"] is not None:
        caption += f" Asked for {AttributeLabel.of(result['steering']).text}."
    table = named_table(
        f"{result['prompts']:,} prompts of {result['split']!r}, {n} sampled answers and a greedy "
        "one to each, rated 0–4 by the oracle",
        names,
        caption=caption,
    )
    for name, figures in result["attributes"].items():
        table.add_row(name, *(with_interval(figures[kind], 2) for kind in kinds))
    table.add_section()
    for name, figures in result["weightings"].items():
        cells = [figures[kind] for kind in (*kinds, "best_of_n", "best_answer")]
        row = [with_interval(cell, 2) for cell in cells]
        row += [percent_with_interval(figures["gap_closed"])] if with_baseline else []
        table.add_row(name, *row)
    table.add_section()
    pad = [""] if with_baseline else []
    table.add_row("tokens", *pad, *(with_interval(of, 1) for of in result["tokens"].values()))
    table.add_row("unfinished %", *pad, *map(percent_with_interval, result["unfinished"].values()))
    if result["kl"] is not None:
        table.add_row("KL to reference, nats", *pad, with_interval(result["kl"], 2))
    keep_whole(table, [*result["attributes"], *result["weightings"]])
    return table


def _columns(
    sampled: RatedAnswers,
    greedy: RatedAnswers,
    tasks: Sequence[Task],
    weightings: Sequence[AttributeWeights],
) -> dict[str, Array]:
    """A value a prompt of everything that one policy alone is told of."""
    columns = _score_columns("sampled", sampled.ratings, weightings)
    columns |= _score_columns("greedy", greedy.ratings, weightings)
    for kind, answers in (("sampled", sampled), ("greedy", greedy)):
        columns[f"{kind} tokens"] = answers.tokens
        columns[f"{kind} unfinished"] = answers.unfinished
    for weights in weightings:
        columns[f"best score {weights.name}"] = best_scores(tasks, weights)
    return columns


def _score_columns(
    kind: str, ratings: Array, weightings: Sequence[AttributeWeights]
) -> dict[str, Array]:
    """Means over the answers to each prompt, and the best of them under every weighting."""
    columns = {
        f"{kind} rating {name}": ratings[..., i].mean(1)
        for i, name in enumerate(HELPSTEER2_ATTRIBUTES)
    }
    for weights in weightings:
        scores = score(ratings, weights)
        columns[f"{kind} score {weights.name}"] = scores.mean(1)
        columns[f"top {kind} score {weights.name}"] = scores.max(1)
    return columns


def _log_ratios(
    policy: EvaluatedPolicy,
    reference: str,
    groups: Sequence[Group],
    samples: Sequence[Sequence[Sample]],
) -> Array:
    """``(P, n)`` log π − log π_ref of every sampled answer; the groups have the label asked for."""
    sampled = [
        replace(
            group,
            responses=tuple(one.text for one in drawn),
            response_ids=tuple(one.ids for one in drawn),
            finish_reasons=tuple(one.finish_reason for one in drawn),
            tokenizer=policy.sampler.ids_hash,
        )
        for group, drawn in zip(groups, samples, strict=True)
    ]
    own = _own_logprobs(samples)
    if own is None:
        own = np.array(list(policy.logprobs(sampled)), dtype=np.float64)
    return own - np.array(list(policy.beside(reference).logprobs(sampled)), dtype=np.float64)


def _own_logprobs(samples: Sequence[Sequence[Sample]]) -> Array | None:
    """What the sampler said of its samples; None if it says nothing."""
    known = [[one.logprobs for one in drawn] for drawn in samples]
    if any(logprobs is None for drawn in known for logprobs in drawn):
        return None
    return np.array([[np.sum(logprobs or ()) for logprobs in drawn] for drawn in known])


def _examples(
    groups: Sequence[Group],
    sampled: Sequence[Sequence[Sample]],
    greedy: Sequence[Sequence[Sample]],
) -> list[dict[str, str]]:
    """The first prompts with an answer of each kind."""
    return [
        {
            "prompt": group.prompt[-1]["content"],
            "sampled": drawn[0].text,
            "greedy": likeliest[0].text,
        }
        for group, drawn, likeliest in zip(groups[:EXAMPLES], sampled, greedy, strict=False)
    ]
