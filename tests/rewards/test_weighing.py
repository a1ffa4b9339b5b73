"""Importance weights against their definitions, worked out prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer2.rewards.weighing import FloatArray, ImportanceTerms, collapse_warning

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def made(sizes: Sequence[int], seed: int = 0, scale: float = 2.0) -> ImportanceTerms:
    """Log-probabilities as those of sequences are: far below 0, and near to each other."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    prior = rng.normal(-90, scale, n)
    return ImportanceTerms(
        label=rng.normal(-4, scale, n),
        prior=prior,
        proposal=prior + rng.normal(1, scale, n),
        n_responses=np.array(sizes),
    )


def by_prompt(terms: ImportanceTerms) -> list[dict[str, list[float]]]:
    """The terms of each prompt, cut by hand."""
    found, first = [], 0
    for n in terms.n_responses:
        part = slice(first, first + int(n))
        names = ("label", "prior", "proposal")
        found.append({name: getattr(terms, name)[part].tolist() for name in names})
        first = part.stop
    return found


def weights_of(terms: ImportanceTerms) -> list[list[float]]:
    """w′ by its definition, arXiv 2406.08673, section 4.5: no logarithms of sums."""
    found = []
    for prompt in by_prompt(terms):
        top = max(prompt["prior"])  # e^-90 over itself: any factor a prompt goes out again
        w = [
            math.exp(label) * math.exp(prior - top) / math.exp(proposal - top)
            for label, prior, proposal in zip(*prompt.values(), strict=True)
        ]
        found.append([one / math.fsum(w) for one in w])
    return found


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 9))
def test_weights_are_those_of_the_paper(sizes: list[int], seed: int) -> None:
    terms = made(sizes, seed)
    expected = weights_of(terms)
    flat = [weight for prompt in expected for weight in prompt]
    assert np.exp(terms.log_weights) == pytest.approx(flat, rel=1e-9)
    rows = list(terms.rows())
    assert [row["weights"] for row in rows] == [pytest.approx(of, rel=1e-9) for of in expected]
    for row, prompt in zip(rows, by_prompt(terms), strict=True):
        assert row["log_likelihood"] == prompt["label"]
        assert row["log_prior"] == prompt["prior"]
        assert row["log_proposal"] == prompt["proposal"]
    assert terms.log_targets == pytest.approx(terms.label + terms.prior)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 9))
def test_figures_are_those_of_their_definitions(sizes: list[int], seed: int) -> None:
    terms = made(sizes, seed)
    weights, summary = weights_of(terms), terms.summary()
    effective = [1 / sum(w * w for w in of) for of in weights]
    assert terms.effective_samples == pytest.approx(effective)
    assert summary["samples"] == pytest.approx(sum(sizes) / len(sizes))
    assert summary["effective_samples"] == {
        "mean": pytest.approx(np.mean(effective)),
        "median": pytest.approx(np.median(effective)),
        "p10": pytest.approx(np.percentile(effective, 10)),
    }
    largest = [max(of) for of in weights]
    assert summary["largest_weight"] == pytest.approx(np.mean(largest))
    assert summary["collapsed"] == pytest.approx(np.mean([one > 0.9 for one in largest]))
    distances = [sum(w * math.log(w * len(of)) for w in of if w) for of in weights]
    assert summary["distance"] == pytest.approx(np.mean(distances), abs=1e-12)
    spreads: dict[str, Callable[[dict[str, list[float]]], FloatArray]] = {
        "label": lambda of: np.array(of["label"]),
        "prior_to_proposal": lambda of: np.array(of["prior"]) - of["proposal"],
        "sum": lambda of: np.array(of["label"]) + of["prior"] - of["proposal"],
    }
    for name, values in spreads.items():
        expected = np.mean([np.std(values(of)) for of in by_prompt(terms)])
        assert summary["spread"][name] == pytest.approx(expected, abs=1e-12)
    counted = [0] * 10
    for weight in (w for of in weights for w in of):
        counted[min(int(weight * 10 + 1e-12), 9)] += 1
    assert sum(summary["histogram"]) == sum(sizes)
    # A weight that rounding puts on the other side of an edge is no mistake.
    assert sum(map(abs, np.array(summary["histogram"]) - counted)) <= 2


@pytest.mark.parametrize("term", ["label", "prior", "proposal"])
def test_a_constant_a_prompt_changes_nothing(term: str) -> None:
    terms = made((3, 1, 5))
    shift = np.repeat([1e3, -40.0, 7.0], terms.n_responses)
    moved = replace(terms, **{term: getattr(terms, term) + shift})
    assert moved.log_weights == pytest.approx(terms.log_weights, abs=1e-9)
    ours, theirs = moved.summary(), terms.summary()
    assert ours["effective_samples"] == pytest.approx(theirs["effective_samples"])
    assert ours["distance"] == pytest.approx(theirs["distance"])
    assert ours["spread"] == pytest.approx(theirs["spread"], abs=1e-9)


def test_other_prompts_change_nothing() -> None:
    alone, other = made((4,), 1), made((2, 3), 2)
    names = ("label", "prior", "proposal", "n_responses")
    both = ImportanceTerms(
        **{name: np.concatenate([getattr(of, name) for of in (other, alone)]) for name in names}
    )
    assert both.log_weights[5:] == pytest.approx(alone.log_weights)
    assert both.effective_samples[2:] == pytest.approx(alone.effective_samples)


def test_equal_weights_and_one_that_has_all() -> None:
    zeros = np.zeros(5)
    even = ImportanceTerms(zeros, zeros - 80, zeros - 80, np.array([4, 1])).summary()
    assert even["effective_samples"]["mean"] == pytest.approx(2.5)
    assert even["distance"] == pytest.approx(0.0)
    # A prompt of one response has one weight, of 1: that it has collapsed is so.
    assert even["collapsed"] == 0.5
    label = np.array([0.0, -2000, -2000, -2000, 0])
    one = ImportanceTerms(label, zeros, zeros, np.array([4, 1]))
    summary = one.summary()
    assert np.exp(one.log_weights).tolist() == [1, 0, 0, 0, 1]
    assert summary["effective_samples"] == {"mean": 1, "median": 1, "p10": 1}
    assert summary["distance"] == pytest.approx(math.log(4) / 2)
    assert summary["histogram"] == [3, *[0] * 8, 2]
    assert all(map(math.isfinite, summary["spread"].values()))


class TestWarning:
    SIZES = (10,) * 20

    def test_none_where_many_samples_count(self) -> None:
        summary = made(self.SIZES, scale=0.3).summary()
        assert summary["effective_samples"]["mean"] > 5
        assert collapse_warning(summary) is None

    def test_it_names_the_term_that_decides(self) -> None:
        even = made(self.SIZES, scale=0.1)
        rng = np.random.default_rng(5)
        harsh = replace(even, label=rng.normal(-40, 40, len(even.label)))
        far = replace(even, proposal=even.proposal + rng.normal(0, 40, len(even.label)))
        told = [collapse_warning(of.summary()) or "" for of in (harsh, far)]
        for text in told:
            assert "the weights have collapsed: 1." in text
            assert "of 10 samples a prompt count" in text
        assert "lower likelihood.concentration or likelihood.combine=mean" in told[0]
        assert "prior and proposal are far apart" in told[1]
        assert "lower likelihood.concentration" not in told[1]
