from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.data.groups import Group
from helpsteer2.evaluation.scoring import EvaluationContext


@dataclass
class FakeScorer:
    """Scores by a function of prompt and response; counts its passes."""

    function: object
    attribute_names: tuple[str, ...] = HELPSTEER2_ATTRIBUTES
    scored: int = 0

    def score(self, groups: Iterable[Group]) -> Iterator[np.ndarray]:
        # Reads ahead, as a scorer that batches does.
        for group in list(groups):
            self.scored += 1
            rows = [self.function(group.prompt[-1]["content"], text) for text in group.responses]
            yield np.array(rows, dtype=np.float32).reshape(len(rows), len(self.attribute_names))


@dataclass
class FakeSource:
    """Groups in memory, by split."""

    splits: dict[str, Sequence[Group]]
    attribute_names: tuple[str, ...] = HELPSTEER2_ATTRIBUTES
    reads: list[str] = field(default_factory=list)

    def read(self, split, report):
        self.reads.append(split)
        yield from self.splits[split]

    def fingerprint(self, split):
        return f"{split}-{hash(repr(self.splits[split]))}"


def make_group(index, responses, attributes=None):
    prompt = ({"role": "user", "content": f"prompt {index}"},)
    return Group(str(index), f"file:{index}", prompt, tuple(responses), attributes)


WEIGHTINGS = (
    AttributeWeights("helpfulness_only", {"helpfulness": 1.0}),
    AttributeWeights("uniform", dict.fromkeys(HELPSTEER2_ATTRIBUTES, 0.2)),
    AttributeWeights("brief", {"verbosity": -1.0}),
)


@pytest.fixture
def context(tmp_path):
    return EvaluationContext(
        weightings=WEIGHTINGS,
        scores_dir=tmp_path / "scores",
        model_key="model",
        seed=1,
        console=Console(file=io.StringIO(), width=100),
    )


@pytest.fixture
def fakes():
    return SimpleNamespace(scorer=FakeScorer, source=FakeSource, group=make_group)


@pytest.fixture
def as_text():
    def render(tables) -> str:
        console = Console(file=io.StringIO(), width=100)
        for table in tables:
            console.print(table)
        return console.file.getvalue()

    return render
