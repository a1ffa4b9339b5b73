"""Drawn tokens follow the distribution that is asked for, and depend on their key alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from helpsteer2.functional.sampling import Truncation, draw, stream_key, uniforms

DRAWS = 8_000


def keys(n: int, seed: int = 0) -> npt.NDArray[np.uint64]:
    return np.array([stream_key(seed, f"prompt {i}", 0) for i in range(n)], np.uint64)


def draw_often(logits: Tensor, truncation: Truncation) -> npt.NDArray[np.int64]:
    """Counts of each token in ``DRAWS`` draws."""
    tokens, _ = draw(
        logits.expand(DRAWS, -1).contiguous(), truncation, keys(DRAWS), np.zeros(DRAWS, np.int64)
    )
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1])


def expected(logits: Tensor, truncation: Truncation) -> npt.NDArray[np.float64]:
    """The distribution by its definition: temperature, then top-k, then top-p, by sorting."""
    probabilities = (logits.double() / truncation.temperature).softmax(0).numpy()
    order = np.argsort(-probabilities)
    if truncation.top_k:
        probabilities[order[truncation.top_k :]] = 0
        probabilities /= probabilities.sum()
    above = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[above >= truncation.top_p]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("size", [5, 97])
@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(1.0, 0, 1.0),
        Truncation(0.7, 0, 1.0),
        Truncation(1.8, 0, 1.0),
        Truncation(0.7, 0, 0.9),
        Truncation(1.0, 0, 0.3),
        Truncation(1.0, 4, 1.0),
        Truncation(1.3, 60, 0.8),
        Truncation(1.0, 1000, 0.95),
    ],
)
def test_frequencies_are_those_of_the_distribution(size: int, truncation: Truncation) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1.5
    counts, wanted = draw_often(logits, truncation), expected(logits, truncation)
    assert counts[wanted == 0].sum() == 0
    # χ² wants five expected draws a cell: rare tokens are taken together.
    rare = wanted * DRAWS < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    share = np.append(wanted[~rare], wanted[rare].sum())
    if len(seen[share > 0]) > 1:
        assert chisquare(seen[share > 0], share[share > 0] * DRAWS).pvalue > 1e-3


def test_a_narrow_nucleus_of_a_flat_distribution_is_drawn_exactly() -> None:
    """Rejection alone would need many draws: the last one sorts."""
    logits = torch.linspace(0, 0.5, 256)
    truncation = Truncation(1.0, 0, 0.02)
    counts, wanted = draw_often(logits, truncation), expected(logits, truncation)
    assert counts[wanted == 0].sum() == 0
    assert chisquare(counts[wanted > 0], wanted[wanted > 0] * DRAWS).pvalue > 1e-3


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(50, 97)
    tokens, _ = draw(logits, Truncation(0, 0, 1.0), keys(50), np.arange(50))
    assert torch.equal(tokens, logits.argmax(dim=1))


@pytest.mark.parametrize("truncation", [Truncation(0, 0, 1.0), Truncation(0.5, 10, 0.7)])
def test_logprobs_are_those_of_the_untouched_logits(truncation: Truncation) -> None:
    logits = torch.randn(200, 97) * 4
    tokens, logprobs = draw(logits, truncation, keys(200), np.zeros(200, np.int64))
    wanted = logits.log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-5)


def test_rows_do_not_depend_on_each_other() -> None:
    logits, truncation = torch.randn(64, 97) * 2, Truncation(0.8, 0, 0.6)
    streams, places = keys(64), np.arange(64) % 7
    together, _ = draw(logits, truncation, streams, places)
    order = np.random.default_rng(0).permutation(64)
    shuffled, _ = draw(logits[order], truncation, streams[order], places[order])
    assert torch.equal(together[order], shuffled)
    alone = [
        draw(logits[i : i + 1], truncation, streams[i : i + 1], places[i : i + 1])[0]
        for i in range(64)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_random_numbers_are_uniform_over_keys_and_over_counters() -> None:
    over_keys = uniforms(keys(DRAWS), np.zeros(DRAWS, np.uint64)).numpy()
    over_counters = uniforms(keys(1).repeat(DRAWS), np.arange(DRAWS, dtype=np.uint64)).numpy()
    for numbers in (over_keys, over_counters):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert len(np.unique(np.concatenate([over_keys, over_counters]))) > 2 * DRAWS - 3


def test_streams_differ_by_seed_name_and_index() -> None:
    found = {
        stream_key(seed, name, index)
        for seed in (0, 1, 11)
        for name in ("a", "b", "1/a")
        for index in (0, 1, 11)
    }
    assert len(found) == 27
