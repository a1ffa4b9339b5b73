"""Numbers are refused by the configuration exactly where their classes refuse them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest

from helpsteer2.attributes import AttributeWeights
from helpsteer2.config.ranges import BY_CLASS, BY_PATH, Range
from helpsteer2.data.pairing import Pairing
from helpsteer2.errors import UserError
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.losses.dpo import DPOLoss, SmoothedDPOLoss
from helpsteer2.losses.rpo import SquaredRPOLoss

NUMBERS = (-1, -0.1, 0, 0.3, 0.5, 0.6, 1, 1.5, 2, 100, 101, 2**63)

GIVEN: dict[str, Any] = {"sampling": SamplingParams()}
"""Arguments that are looked at; the others that a class needs may be anything."""


def with_the_rest(target: str) -> Callable[..., Any]:
    """A class with a value for every argument that it needs."""
    module, _, name = target.rpartition(".")
    made = getattr(import_module(module), name)
    needed = {
        name: GIVEN.get(name, 1)
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    return partial(made, **needed)


@pytest.mark.parametrize(
    ("make", "name", "wanted"),
    [
        *(
            (with_the_rest(target), name, wanted)
            for target, arguments in BY_CLASS.items()
            for name, wanted in arguments.items()
        ),
        (DPOLoss, "beta", BY_PATH["module.loss.beta"]),
        (SquaredRPOLoss, "eta", BY_PATH["module.loss.eta"]),
        (SmoothedDPOLoss, "label_smoothing", BY_PATH["module.loss.label_smoothing"]),
        (
            partial(Pairing, "ratings", AttributeWeights("one", {"helpfulness": 1.0})),
            "min_gap",
            BY_PATH["min_gap"],
        ),
    ],
)
def test_classes_and_ranges_agree(make: Callable[..., Any], name: str, wanted: Range) -> None:
    for number in NUMBERS:
        if wanted.holds(number):
            make(**{name: number})
        else:
            with pytest.raises(UserError):
                make(**{name: number})
