"""Stored log-probabilities: joined to the same ids, whatever else is known, and to no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sample_tokenizers as sample
import torch
from given_groups import GivenGroups

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import Group, Message, Unlabelled
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.reference import Reference, ReferenceInputs, ReferenceSplit, write_reference
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.errors import UserError
from helpsteer2.models.reference import reference_split

LIMITS = LengthLimits(200, 100)
LABEL = AttributeLabel.of({"helpfulness": 4, "verbosity": 1})
GROUPS = tuple(
    Group(
        f"g{i}", f"s:{i}", (Message(role="user", content="Why? " * (i + 1)),),
        tuple(f"{k} egg" * (k + i) for k in range(1, 3 + i)), label=LABEL,
    )
    for i in range(3)
)  # fmt: skip


@cache
def chat(form: str | None = None) -> BoundChat:
    return ChatFormat(label_form=form).bind(sample.llama3_like())


def stored(cache_dir: Path, groups: tuple[Group, ...] = GROUPS, **more: Any) -> TokenisedGroups:
    names = more.pop("names", ())
    source: Any = GivenGroups(groups, names)
    read = source if more.pop("labels", True) else Unlabelled(source)
    return tokenise(read, "train", chat(), LIMITS, names, cache_dir, close_cut=False)


def values_of(groups: TokenisedGroups) -> ReferenceSplit:
    lengths = groups.response_lengths.astype(np.int32)
    rng = np.random.default_rng(0)
    return ReferenceSplit(rng.normal(-3, 1, lengths.sum()).astype(np.float32), lengths)


def inputs(labels: bool = True, form: str | None = None) -> ReferenceInputs:
    return ReferenceInputs.of(chat(form), LIMITS, "float32", "32-true", labels)


Write = Callable[..., Reference]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(
        values: ReferenceSplit | None = None, labels: bool = True, form: str | None = None
    ) -> Reference:
        groups = stored(tmp_path / "cache", labels=labels)
        folder = tmp_path / "reference"
        folder.mkdir(exist_ok=True)
        content = {"train": (groups, values or values_of(groups))}
        write_reference(folder, "weights", inputs(labels, form), content)
        return Reference.open(folder)

    return call


class TestIds:
    def test_sums_are_those_of_the_tokens(self, write: Write, tmp_path: Path) -> None:
        groups = stored(tmp_path / "cache")
        values = values_of(groups)
        ends = np.cumsum(values.lengths)
        parts = np.split(values.logprobs.astype(np.float64), ends[:-1])
        expected = [float(part.sum()) for part in parts]
        reference = write()
        assert reference.sums(groups, "train").tolist() == pytest.approx(expected, rel=1e-6)
        joined = reference.join(groups, "train")
        columns = [joined[i].ref_logprobs for i in range(len(joined))]
        found = np.concatenate([column for column in columns if column is not None]).tolist()
        assert found == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("what", ["attributes", "scores", "rewards", "names"])
    def test_groups_that_differ_in_what_is_known_of_them_fit(
        self, write: Write, tmp_path: Path, what: str
    ) -> None:
        def changed(group: Group) -> Group:
            n = len(group.responses)
            changes: dict[str, dict[str, Any]] = {
                "attributes": {"attributes": tuple((float(k % 5),) for k in range(n))},
                "scores": {"scores": ((1.5,),) * n, "score_names": ("wit",)},
                "rewards": {"rewards": tuple(range(n))},
                "names": {"id": f"other {group.id}", "source": "elsewhere"},
            }
            return replace(group, **changes[what])

        names = ("helpfulness",) if what == "attributes" else ()
        groups = stored(tmp_path / "cache", tuple(map(changed, GROUPS)), names=names)
        assert groups.fingerprint != stored(tmp_path / "cache").fingerprint
        reference = write()
        expected = reference.sums(stored(tmp_path / "cache"), "train")
        assert np.array_equal(reference.sums(groups, "train"), expected)

    @pytest.mark.parametrize(
        "change",
        [
            {"label": AttributeLabel.of({"helpfulness": 3, "verbosity": 1})},
            {"label": None},
            {"prompt": (Message(role="user", content="Why. "),)},
            {"responses": GROUPS[0].responses[::-1]},
            {"responses": ("1 egG", *GROUPS[0].responses[1:])},
            {"responses": GROUPS[0].responses[:1]},
        ],
    )
    def test_other_ids_do_not_fit(
        self, write: Write, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        groups = stored(tmp_path / "cache", (replace(GROUPS[0], **change), *GROUPS[1:]))
        with pytest.raises(UserError, match="is of other train data than this run"):
            write().sums(groups, "train")

    def test_groups_in_another_order_do_not_fit(self, write: Write, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is of other train data"):
            write().sums(stored(tmp_path / "cache", GROUPS[::-1]), "train")


class TestLabels:
    def test_those_without_labels_fit_the_groups_without(
        self, write: Write, tmp_path: Path
    ) -> None:
        reference = write(labels=False)
        reference.require(inputs(labels=False))
        bare = tuple(replace(group, label=None) for group in GROUPS)
        assert len(reference.sums(stored(tmp_path / "cache", bare), "train")) == 9
        with pytest.raises(UserError, match="is of other train data"):
            reference.sums(stored(tmp_path / "cache"), "train")

    @pytest.mark.parametrize("made", [True, False])
    def test_the_other_kind_is_refused_with_the_command(self, write: Write, made: bool) -> None:
        with pytest.raises(UserError) as caught:
            write(labels=made).require(inputs(labels=not made))
        told = str(caught.value)
        assert f"labels of helpsteer2 reference: {made} there, {not made} here" in told
        assert "helpsteer2 reference model=POLICY dtype=float32" in told
        assert ("labels=false run_dir=DIR" in told) == made

    def test_the_form_of_labels_counts_where_they_are_read(self, write: Write) -> None:
        with pytest.raises(UserError, match=r"chat\.label_form: '<\{label\}>' there"):
            write(form="<{label}>").require(inputs())
        write(form="<{label}>", labels=False).require(inputs(labels=False))


class TestBrokenOnes:
    @pytest.mark.parametrize("value", [float("-inf"), float("nan")])
    def test_what_is_not_finite_is_refused(
        self, write: Write, tmp_path: Path, value: float
    ) -> None:
        groups = stored(tmp_path / "cache")
        values = values_of(groups)
        values.logprobs[7] = value
        with pytest.raises(UserError, match=r"train\.safetensors has log-prob.* not finite"):
            write(values).sums(groups, "train")

        def broken(batch: Any) -> SimpleNamespace:
            n = sum(sum(lengths) for lengths in batch.layout.response_lengths)
            logprobs = torch.full((n,), -1.0)
            logprobs[-1] = value
            return SimpleNamespace(logprobs=logprobs)

        weight = torch.zeros(1)
        policy: Any = SimpleNamespace(
            lm_head=SimpleNamespace(weight=weight), response_logprobs=broken
        )
        with pytest.raises(UserError, match=r"not finite, in groups 'g0' … 'g2': its weights are"):
            reference_split(policy, groups, 100_000)

    def test_one_of_an_older_version_is_refused(self, write: Write, tmp_path: Path) -> None:
        write()
        path = tmp_path / "reference/reference.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"format": 1}))
        with pytest.raises(UserError, match="written by another version of helpsteer2: make it ag"):
            Reference.open(path.parent)
