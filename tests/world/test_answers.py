from __future__ import annotations

import random

import numpy as np
import pytest

from helpsteer2.functional.statistics import r2
from helpsteer2.world.answers import random_answer
from helpsteer2.world.oracle import rate_answer
from helpsteer2.world.sentences import Claim, read_text
from helpsteer2.world.source import draw_task


def test_a_claim_is_read_as_it_was_written() -> None:
    claims = [
        Claim("pet", "cat"),
        Claim("job", "baker", 1, 2, "To be exact,"),
        Claim("drink", "tea", 2, 1, "If you ask,"),
    ]
    texts = [claim.text for claim in claims]
    assert texts == [
        "We have pet cat.",
        "To be exact, we observe work baker.",
        "If you ask, we note beverage tea.",
    ]
    reading = read_text(" ".join(texts))
    assert reading.claims == tuple(claims)
    assert (reading.broken, reading.unfinished, reading.words) == (0, False, 18)
    assert [claim.level for claim in claims] == [0, 1.5, 1.5]


@pytest.mark.parametrize(
    ("text", "claims", "fillers", "broken", "unfinished"),
    [
        ("We have pet cat.\nThat is all.", 1, 1, 0, False),
        ("We have pet cat. The pet is", 1, 0, 1, True),
        ("we have pet cat. THE PET IS CAT. The  pet is cat.", 0, 0, 3, False),
        ("We have pet cat! We have pet cat?", 0, 0, 2, False),
        ("The pet was cat. The dragon is cat. We have pet dragon.", 0, 0, 3, False),
        ("We have pet not cat.", 0, 0, 1, False),
        ("As you asked, We have pet cat.", 0, 0, 1, False),
        ("For Ada, we have pet cat.", 0, 0, 1, False),
        ("We have pet cat right. We have pet cat maybe.", 1, 0, 1, False),
        ("\ud800 é 你好.", 0, 0, 1, False),
        (" \n ", 0, 0, 0, False),
    ],
)
def test_any_text_is_read(
    text: str, claims: int, fillers: int, broken: int, unfinished: bool
) -> None:
    reading = read_text(text)
    found = (len(reading.claims), len(reading.fillers), reading.broken, reading.unfinished)
    assert found == (claims, fillers, broken, unfinished)


def test_a_long_text_is_read_in_no_time() -> None:
    assert read_text("a" * 1_000_000).broken == 1
    assert read_text("a, " * 300_000).broken == 1
    assert read_text(". " * 300_000).broken == 300_000


def test_answers_have_every_fault_and_length_tells_little_of_truth() -> None:
    truth, words, readings = [], [], []
    for i in range(4000):
        rng = random.Random(i)
        task = draw_task(rng)
        text = random_answer(rng, task)
        assert text.strip()
        readings.append(read_text(text))
        truth.append(rate_answer(task, text)[1])
        words.append(len(text.split()))
    assert 0.05 < np.mean([reading.broken > 0 for reading in readings]) < 0.2
    assert 0.01 < np.mean([reading.unfinished for reading in readings]) < 0.05
    assert 0.2 < np.mean([len(reading.fillers) > 0 for reading in readings]) < 0.4
    assert len({len(reading.claims) for reading in readings}) >= 5
    assert np.mean(np.array(truth) == 4) > 0.2
    assert np.mean(np.array(truth) == 0) > 0.1
    features = np.stack([np.ones(len(words)), words, np.log(words)], axis=1)
    coefficients = np.linalg.lstsq(features, np.array(truth), rcond=None)[0]
    assert r2(features @ coefficients, truth) < 0.1


def test_marks_are_right_whatever_the_writer_states() -> None:
    stated = set()
    for i in range(500):
        rng = random.Random(i)
        task = draw_task(rng, marked=1.0)
        for claim in read_text(random_answer(rng, task)).claims:
            # A sentence that was cut or broken can lose its mark.
            if claim.mark is not None:
                assert claim.mark == (task.facts[claim.topic] == claim.value)
                stated.add(claim.mark)
    assert stated == {True, False}
