from __future__ import annotations

import time

import numpy as np
import pytest

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import UserError
from helpsteer2.functional.beta_ratings import READINGS, log_masses
from helpsteer2.rewards.likelihood import BetaLikelihood, outside

NAMES = HELPSTEER2_ATTRIBUTES
LABEL = AttributeLabel.of({"helpfulness": 4, "correctness": 3, "verbosity": 1})
COLUMNS = [0, 1, 4]
LEVELS = [4, 3, 1]


@pytest.fixture
def scores():
    return np.random.default_rng(0).uniform(0.0, 4.0, (7, 5))


def of_attributes(scores, reading="C", concentration=24.0):
    """``(R, 3)`` logs of the label's three attributes."""
    logs = log_masses(scores, concentration, READINGS[reading])
    return np.stack([logs[:, c, n] for c, n in zip(COLUMNS, LEVELS, strict=True)], axis=1)


def test_independent_attributes_add_their_logs(scores):
    logs = BetaLikelihood().log_probability(scores, NAMES, LABEL)
    assert (logs.shape, logs.dtype) == ((7,), np.float64)
    assert logs == pytest.approx(of_attributes(scores).sum(axis=1), rel=1e-13)


def test_all_labels_together_have_probability_one():
    every = [
        AttributeLabel.of({"helpfulness": first, "verbosity": second})
        for first in range(5)
        for second in range(5)
    ]
    score = np.array([[1.3, 0.0, 0.0, 0.0, 3.6]])
    logs = BetaLikelihood().log_probabilities([score] * 25, NAMES, every)
    assert np.exp(np.concatenate(logs)).sum() == pytest.approx(1.0, abs=1e-12)


def test_the_mean_divides_by_the_attributes_that_count(scores):
    logs = BetaLikelihood(combine="mean").log_probability(scores, NAMES, LABEL)
    assert logs == pytest.approx(of_attributes(scores).mean(axis=1), rel=1e-13)


@pytest.mark.parametrize("name", READINGS)
def test_every_reading_can_be_chosen(scores, name):
    reading = READINGS[name]
    likelihood = BetaLikelihood(9.0, reading.scaling, reading.edges)
    logs = likelihood.log_probability(scores, NAMES, LABEL)
    assert logs == pytest.approx(of_attributes(scores, name, 9.0).sum(axis=1), rel=1e-13)


def test_scores_nearer_to_the_label_are_more_probable():
    logs = BetaLikelihood().log_probability(
        [[4.0, 3.0, 0.0, 0.0, 1.0], [3.5, 3.0, 0.0, 0.0, 1.5], [1.0, 1.0, 0.0, 0.0, 3.0]],
        NAMES,
        LABEL,
    )
    assert logs[0] > logs[1] > logs[2]


def test_neither_the_order_of_a_label_nor_that_of_the_scores_matters(scores):
    plain = BetaLikelihood().log_probability(scores, NAMES, LABEL)
    turned = AttributeLabel.of(dict(reversed(LABEL.as_dict().items())))
    assert np.array_equal(plain, BetaLikelihood().log_probability(scores, NAMES, turned))
    assert np.array_equal(
        plain, BetaLikelihood().log_probability(scores[:, ::-1], NAMES[::-1], LABEL)
    )
    chosen = [BetaLikelihood(attributes=order) for order in (LABEL.names, LABEL.names[::-1])]
    for likelihood in chosen:
        assert np.array_equal(plain, likelihood.log_probability(scores, NAMES, LABEL))


def test_attributes_that_do_not_count_change_nothing(scores):
    only = BetaLikelihood(attributes=("correctness",))
    logs = only.log_probability(scores, NAMES, LABEL)
    assert logs == pytest.approx(of_attributes(scores)[:, 1], rel=1e-13)
    scores[:, [0, 2, 3, 4]] = np.nan
    assert np.array_equal(logs, only.log_probability(scores, NAMES, LABEL))


def test_groups_at_once_are_as_each_alone(scores):
    labels = [LABEL, AttributeLabel.of({"coherence": 0}), LABEL]
    groups = [scores[:2], scores[2:6], scores[6:]]
    likelihood = BetaLikelihood()
    together = likelihood.log_probabilities(groups, NAMES, labels)
    assert [len(logs) for logs in together] == [2, 4, 1]
    for of_group, label, logs in zip(groups, labels, together, strict=True):
        assert np.array_equal(logs, likelihood.log_probability(of_group, NAMES, label))
    assert likelihood.log_probabilities([], NAMES, []) == []


def test_two_hundred_thousand_responses_take_seconds():
    random = np.random.default_rng(1)
    scores = list(random.uniform(0.0, 4.0, (20_000, 10, 5)))
    few = [AttributeLabel(NAMES, tuple(row)) for row in random.integers(0, 5, (50, 5)).tolist()]
    start = time.process_time()
    logs = BetaLikelihood().log_probabilities(scores, NAMES, few * 400)
    assert time.process_time() - start < 20.0
    assert np.isfinite(np.concatenate(logs)).all()


def test_scores_outside_the_scale_count_as_its_ends_and_are_counted():
    wild = np.array([[-0.3, 4.2, 2.0, 0.0, 9.0], [0.0, 4.0, 4.5, 4.0, 5.0]])
    likelihood = BetaLikelihood()
    assert np.array_equal(
        likelihood.log_probability(wild, NAMES, LABEL),
        likelihood.log_probability(wild.clip(0.0, 4.0), NAMES, LABEL),
    )
    assert outside(wild).tolist() == [1, 1, 1, 0, 2]


def test_the_floor_is_of_one_attribute_and_touches_nothing_at_the_papers_concentration():
    worst = np.array([[0.0, 4.0, 0.0, 0.0, 4.0]])
    label = AttributeLabel.of({"helpfulness": 4, "correctness": 0, "verbosity": 4})
    floored = BetaLikelihood(concentration=2000.0).log_probability(worst, NAMES, label)
    assert floored == pytest.approx(-200.0, abs=1e-6)
    for reading in READINGS.values():
        options = {"scaling": reading.scaling, "edges": reading.edges}
        plain, deep = BetaLikelihood(**options), BetaLikelihood(**options, floor=-700.0)
        assert plain.log_probability(worst, NAMES, label) > -2 * 54.0
        assert plain.log_probability(worst, NAMES, label) == (
            deep.log_probability(worst, NAMES, label)
        )


def test_an_attribute_without_a_score_is_named(scores):
    label = AttributeLabel.of({"humor": 2, "helpfulness": 4})
    with pytest.raises(UserError, match=r"by humor, which.*does not score.*likelihood\.attributes"):
        BetaLikelihood().log_probability(scores, NAMES, label)
    assert BetaLikelihood(attributes=["helpfulness"]).counted(NAMES, label) == ("helpfulness",)


def test_an_attribute_that_the_label_lacks_is_named(scores):
    with pytest.raises(UserError, match=r"asks for coherence, which the label helpfulness:4,"):
        BetaLikelihood(attributes=["coherence"]).log_probability(scores, NAMES, LABEL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(scores, bad):
    scores[3, 0] = bad
    with pytest.raises(UserError, match="1 of 21 scores are not finite"):
        BetaLikelihood().log_probability(scores, NAMES, LABEL)


def test_scores_need_a_column_a_name(scores):
    with pytest.raises(ValueError, match="5 names"):
        BetaLikelihood().log_probability(scores[:, :4], NAMES, LABEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concentration": 0.0}, "concentration=0.0 has to be 0.5 to 2000"),
        ({"concentration": float("nan")}, "concentration=nan"),
        ({"scaling": "centred", "edges": "nearest"}, "choose edges=fifths"),
        ({"scaling": "thirds"}, "'thirds' is none of quarter, centred"),
        ({"edges": "halves"}, "'halves' is none of nearest, fifths"),
        ({"clamp": 0.0}, "clamp=0.0"),
        ({"clamp": 0.2}, "clamp=0.2"),
        ({"floor": 0.0}, "floor=0.0 has to be below 0"),
        ({"floor": float("-inf")}, "floor=-inf"),
        ({"combine": "sum"}, "combine=sum is none of product, mean"),
        ({"attributes": []}, "has to name some"),
        ({"attributes": ["verbosity", "verbosity"]}, "each once"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=f"likelihood: .*{message}"):
        BetaLikelihood(**options)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UserError, match=r"clamp=2.*concentration=-1.*floor=1.*combine=sum"):
        BetaLikelihood(concentration=-1, clamp=2, floor=1, combine="sum")
