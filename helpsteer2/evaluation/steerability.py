"""Whether a policy does what a label asks of it, in the made-up world where ratings are exact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.groups import Group, GroupSource, read_all
from helpsteer2.data.labels import HIGHEST, INFERENCE_VALUES, LOWEST, AttributeLabel
from helpsteer2.errors import UserError
from helpsteer2.evaluation.policies import EvaluatedPolicy, label_read
from helpsteer2.evaluation.prompt_means import PromptMeans
from helpsteer2.evaluation.rated_answers import RatedAnswers
from helpsteer2.evaluation.scoring import EvaluationContext, ModelKind
from helpsteer2.evaluation.steerability_tables import (
    steerability_figures,
    steerability_headlines,
    steerability_tables,
)
from helpsteer2.functional.statistics import (
    Interval,
    cluster_bootstrap,
    percentile_interval,
    spearman,
)
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.records import plain
from helpsteer2.world.tasks import Task, parse_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
Means = Mapping[str, Any]
"""Means over prompts by name, numbers or arrays over bootstrap draws alike."""

LEVELS = tuple(range(LOWEST, HIGHEST + 1))

EXAMPLES = 3


@dataclass(frozen=True)
class SteeredAnswers:
    """Answers of a policy to P prompts, n to each, to every request.

    Attributes:
        ratings: ``(A, L, P, n, K)`` of the oracle, by the attribute asked about, the level asked
            for, and the attribute rated; 0–4.
        unfinished: ``(P,)`` share of the answers that were cut by the limit of their length.
        texts: ``(A, L, P)`` the first answer to each request.
        base: Level of everything that is not being asked about.
        label_attributes: What the labels of the policy's training were of; none if it had none.
    """

    ratings: Array
    unfinished: Array
    texts: npt.NDArray[np.str_]
    base: Mapping[str, int]
    label_attributes: tuple[str, ...]


@dataclass(frozen=True)
class SteerabilityEvaluation:
    """Ask for each level of each attribute in turn, and have the world's oracle rate what came.

    A request is the base with one attribute at one level. Every distinct label is sampled once, the
    base too, though it is a request of each attribute. A policy that was trained without labels is
    sampled once, and its answers count for every request: what it does shows what not listening
    looks like.

    Some requests contradict themselves (no answer is both right and of no help), so a gap of 0 is
    out of reach; compare policies. Intervals are 95 % and resample prompts, with all answers to
    them; those of differences between policies are paired.

    Args:
        data: Prompts of the world; responses and ratings are not looked at.
        sampling: How answers are drawn, n to each prompt and label.
        split: Split that the prompts are of.
        attributes: What is asked about.
        base: Levels of what is not being asked about; what is left out has its usual value, those
            of the paper if it is None.
        baseline: Folder of the policy that gaps are held against; None leaves that out.
        resamples: Bootstrap draws.

    Raises:
        UserError: If an attribute is not rated by the oracle, or the base is no label.
    """

    data: GroupSource
    sampling: SamplingParams
    split: str = "validation"
    attributes: Sequence[str] = HELPSTEER2_ATTRIBUTES
    base: Mapping[str, int] | None = None
    baseline: str | None = None
    resamples: int = 1000
    _answers: dict[str, SteeredAnswers] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    takes: ClassVar[ModelKind] = "policy"

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError("resamples must be at least 1")
        wrong = [name for name in self.attributes if name not in HELPSTEER2_ATTRIBUTES]
        if wrong or not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise UserError(
                f"attributes={list(self.attributes)}: name one or more of "
                f"{', '.join(HELPSTEER2_ATTRIBUTES)}, which the oracle rates, each once"
            )
        _ = self._base

    @cached_property
    def _base(self) -> dict[str, int]:
        """Levels that were given, and the usual ones of what is asked about."""
        usual = {name: INFERENCE_VALUES[name] for name in self.attributes}
        return AttributeLabel.of({**usual, **(self.base or {})}).as_dict()

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
            context: The seed of the bootstrap.

        Returns:
            ``attributes`` (of each what ``_of_attribute`` tells), their means ``gap``,
            ``cross_talk`` and ``moves``, with a baseline ``baseline_gap`` and ``gap_difference``
            (below 0 where the policy follows more closely), ``unfinished``, the counts and some
            answers.

        Raises:
            DataError: If a row of the data is bad.
            UserError: If a prompt is not of the world, or a policy cannot be used or was not
                trained with an attribute that is asked about.
        """
        groups, _ = self._prompts
        answers = self._answered(policy, context.console)
        names = list(self.attributes)
        columns = _columns(answers.ratings, names) | {"unfinished": answers.unfinished}
        if self.baseline is not None:
            before = self._answered(policy.beside(self.baseline), context.console)
            columns |= _gap_columns("baseline gap", before.ratings, names)
        prompts = [json.dumps(group.prompt) for group in groups]
        means = PromptMeans(columns, prompts, self.resamples, context.seed)
        correlations = rank_correlations(
            answers.ratings, names, prompts, self.resamples, context.seed
        )
        return dict(plain({
            "split": self.split,
            "prompts": len(set(prompts)),
            "groups": len(groups),
            "samples": self.sampling.n,
            "fingerprint": self.data.fingerprint(self.split),
            "baseline": self.baseline,
            "label_attributes": answers.label_attributes,
            "base": answers.base,
            "attributes": {
                name: {"spearman": correlation, **self._of_attribute(means, name, answers.base)}
                for name, correlation in zip(names, correlations, strict=True)
            },
            **self._gaps(means, names),
            "cross_talk": means.figure(
                lambda of: np.mean([cross_talk(of, name) for name in names], axis=0)
            ),
            "moves": means.figure(
                lambda of: np.mean([moves(of, name, answers.base[name]) for name in names], axis=0)
            ),
            "unfinished": means.of("unfinished"),
            "examples": _examples(groups, answers, names),
        }))  # fmt: skip

    def _of_attribute(
        self, means: PromptMeans, asked: str, base: Mapping[str, int]
    ) -> dict[str, Any]:
        """What is told of one attribute: ``got``, ``gap``, ``slopes``, ``cross_talk``, ``moves``.

        ``got`` is the mean rating at each level asked for, ``gap`` the mean distance of level and
        rating. ``slopes`` are those of every rating a point asked, its own (1 if all were followed)
        and those of the others (0 if nothing else moved), which the last two sum up.
        """
        return {
            "got": {level: means.of(_cell(asked, level, asked)) for level in LEVELS},
            **self._gaps(means, [asked]),
            "slopes": {
                moved: means.figure(partial(slope, asked=asked, moved=moved))
                for moved in HELPSTEER2_ATTRIBUTES
            },
            "cross_talk": means.figure(lambda of: cross_talk(of, asked)),
            "moves": means.figure(lambda of: moves(of, asked, base[asked])),
        }

    def _gaps(self, means: PromptMeans, asked: Sequence[str]) -> dict[str, Interval]:
        """Mean gap of some attributes, and the paired difference from the baseline's."""

        def gap(of: Means, kind: str) -> Any:
            return np.mean([of[f"{kind} {name}"] for name in asked], axis=0)

        figures = {"gap": means.figure(lambda of: gap(of, "gap"))}
        if self.baseline is not None:
            figures |= {
                "baseline_gap": means.figure(lambda of: gap(of, "baseline gap")),
                "gap_difference": means.figure(lambda of: gap(of, "gap") - gap(of, "baseline gap")),
            }
        return figures

    def _answered(self, policy: EvaluatedPolicy, console: Console) -> SteeredAnswers:
        """Answers of a policy; those of a baseline serve every policy that is held against it."""
        if policy.path not in self._answers:
            self._answers[policy.path] = self._sample(policy, console)
        return self._answers[policy.path]

    def _sample(self, policy: EvaluatedPolicy, console: Console) -> SteeredAnswers:
        """Sample every distinct label once, all in one go."""
        groups, tasks = self._prompts
        known = policy.label_attributes
        requests = [
            [label_read(AttributeLabel.of({**self._base, name: level}), known) for level in LEVELS]
            for name in self.attributes
        ]
        labels = list(dict.fromkeys(label for of_levels in requests for label in of_levels))
        prompts = [
            # Random numbers go by the id: each label draws its own.
            replace(group, id=f"{group.id} {label.text}", label=label) if label else group
            for label in labels
            for group in groups
        ]
        name = f"answers of {policy.path}" + (f" to {len(labels)} labels" if known else "")
        samples = policy.sample(name, prompts, self.sampling, console)
        rated = RatedAnswers.of(tasks * len(labels), samples)
        places = np.array([[labels.index(label) for label in of_levels] for of_levels in requests])
        shape = (len(labels), len(groups))
        texts = np.array([drawn[0].text for drawn in samples]).reshape(shape)
        base = label_read(AttributeLabel.of(self._base), known)
        return SteeredAnswers(
            ratings=rated.ratings.reshape(*shape, *rated.ratings.shape[1:])[places],
            unfinished=rated.unfinished.reshape(shape).mean(0),
            texts=texts[places],
            base=self._base if base is None else base.as_dict(),
            label_attributes=known,
        )

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Show a result of ``evaluate`` within 100 columns."""
        return steerability_tables(result)

    def headlines(self, result: Mapping[str, Any]) -> dict[str, str]:
        """How closely requests are followed, and what moves beside them."""
        return steerability_headlines(result)

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        """Plots of the results of one or more policies, by file name without suffix."""
        return steerability_figures(results)


def _cell(asked: str, level: int, moved: str) -> str:
    """Name of a mean: the rating of an attribute where a level of another, or of it, was asked."""
    return f"{moved} at {asked} {level}"


def _columns(ratings: Array, asked: Sequence[str]) -> dict[str, Array]:
    """A value a prompt of everything that one policy alone is told of."""
    means = ratings.mean(3)
    columns = {
        _cell(name, level, moved): means[i, j, :, k]
        for i, name in enumerate(asked)
        for j, level in enumerate(LEVELS)
        for k, moved in enumerate(HELPSTEER2_ATTRIBUTES)
    }
    return columns | _gap_columns("gap", ratings, asked)


def _gap_columns(kind: str, ratings: Array, asked: Sequence[str]) -> dict[str, Array]:
    """Mean distance of level and rating of each attribute, over levels and answers, by prompt."""
    levels = np.array(LEVELS, dtype=np.float64)[:, None, None]
    return {
        f"{kind} {name}": np.abs(got - levels).mean((0, 2))
        for name, got in zip(asked, _own(ratings, asked), strict=True)
    }


def _own(ratings: Array, asked: Sequence[str]) -> list[Array]:
    """``(L, P, n)`` of each attribute asked about, its own rating."""
    places = [HELPSTEER2_ATTRIBUTES.index(name) for name in asked]
    return [of_attribute[..., place] for of_attribute, place in zip(ratings, places, strict=True)]


def slope(means: Means, asked: str, moved: str) -> Any:
    """Slope of a mean rating a point asked, by least squares over the levels.

    Args:
        means: By ``_cell``.
        asked: What is asked about.
        moved: Whose rating it is.
    """
    middle = (LEVELS[0] + LEVELS[-1]) / 2
    # Less the first rating, so that equal ones give 0 to the last bit.
    first = means[_cell(asked, LEVELS[0], moved)]
    rises = [(level - middle) * (means[_cell(asked, level, moved)] - first) for level in LEVELS]
    return sum(rises) / sum((level - middle) ** 2 for level in LEVELS)


def cross_talk(means: Means, asked: str) -> Any:
    """Mean absolute slope of the attributes that are not asked about.

    Noise adds to a mean of absolute values: with few prompts it lies above 0 even if nothing moves.
    """
    others = [name for name in HELPSTEER2_ATTRIBUTES if name != asked]
    return np.mean([np.abs(slope(means, asked, moved)) for moved in others], axis=0)


def moves(means: Means, asked: str, base_level: int) -> Any:
    """How far the mean ratings of the others are from those at the base: unlike slopes, any way.

    Args:
        means: By ``_cell``.
        asked: What is asked about.
        base_level: Level of it in the base.

    Returns:
        Mean over levels and other attributes of the absolute difference, in points.
    """
    others = [name for name in HELPSTEER2_ATTRIBUTES if name != asked]
    distances = [
        np.abs(means[_cell(asked, level, moved)] - means[_cell(asked, base_level, moved)])
        for moved in others
        for level in LEVELS
    ]
    return np.mean(distances, axis=0)


def rank_correlations(
    ratings: Array, asked: Sequence[str], prompts: npt.ArrayLike, resamples: int, seed: int
) -> list[Interval]:
    """Spearman's correlation of level asked for and rating got, over all answers.

    Args:
        ratings: ``(A, L, P, n, K)``.
        asked: The A attributes asked about.
        prompts: ``(P,)`` the same for equal prompts, which are drawn together.
        resamples: Bootstrap draws, in each of which all answers to the drawn prompts are ranked.
        seed: Seed of the draws.

    Returns:
        One interval an attribute.
    """
    n_prompts, n = ratings.shape[2:4]
    got = [own.transpose(1, 0, 2).reshape(n_prompts, -1) for own in _own(ratings, asked)]
    levels = np.repeat(np.array(LEVELS, dtype=np.float64), n)

    def correlate(rows: npt.NDArray[np.int64]) -> list[float]:
        wanted = np.tile(levels, rows.size)
        return [spearman(wanted, of_attribute[rows].ravel()) for of_attribute in got]

    values = correlate(np.arange(n_prompts))
    draws = cluster_bootstrap(correlate, prompts, resamples=resamples, seed=seed)
    return [percentile_interval(value, of) for value, of in zip(values, draws.T, strict=True)]


def _examples(
    groups: Sequence[Group], answers: SteeredAnswers, asked: Sequence[str]
) -> list[dict[str, Any]]:
    """The first prompts with an answer to each request."""
    return [
        {
            "prompt": group.prompt[-1]["content"],
            "answers": {
                name: dict(zip(map(str, LEVELS), answers.texts[i, :, p].tolist(), strict=True))
                for i, name in enumerate(asked)
            },
        }
        for p, group in enumerate(groups[:EXAMPLES])
    ]
