"""The ids of a label stand between those of prompt and response, and change neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_tokenizers as sample
from given_groups import GivenGroups
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.group_encoder import GroupEncoder
from helpsteer2.data.groups import Group, Message, Unlabelled
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import DataError, UserError

AMPLE = LengthLimits(10_000, 10_000)
TOKENIZERS = {
    "llama3": sample.llama3_like,
    "qwen3": sample.qwen3_like,
    "chatml": sample.chatml,
    "metaspace": sample.metaspace,
}
CHATS = [
    (family, template)
    for family in TOKENIZERS
    for template in ("auto", "plain", "extra_id")
    if (family, template) != ("metaspace", "auto")  # it has no template of its own: plain
]
NAMES = ("helpfulness", "correctness", "verbosity")
LABELS = st.tuples(*[st.integers(0, 4)] * 3).map(lambda values: AttributeLabel(NAMES, values))
LABEL = AttributeLabel(NAMES, (4, 3, 1))
ASK = (Message(role="user", content="How do I boil an egg?"),)
ANSWERS = ("Six minutes.", " leading space", "1. First\n2. Second\n", "4", ",verbosity:2")


@cache
def chat(family: str, template: str = "auto", form: str | None = None) -> BoundChat:
    return ChatFormat(template, label_form=form).bind(TOKENIZERS[family]())


def encode(bound: BoundChat, group: Group, limits: LengthLimits = AMPLE, **more: Any) -> TokenGroup:
    (encoded,) = GroupEncoder(bound, limits, (), more.pop("policy", True), **more).encode(
        [group], 0
    )
    assert isinstance(encoded, TokenGroup), encoded
    return encoded


def group(prompt: Sequence[Message] = ASK, label: AttributeLabel | None = LABEL) -> Group:
    return Group("a", "a:1", tuple(prompt), ANSWERS, label=label)


class TestIds:
    @pytest.mark.parametrize(("family", "template"), CHATS)
    def test_a_label_stands_between_prompt_and_response_and_changes_neither(
        self, family: str, template: str
    ) -> None:
        bound = chat(family, template)
        with_label, without = (encode(bound, group(label=label)) for label in (LABEL, None))
        n = len(without.prompt_ids)
        assert np.array_equal(with_label.prompt_ids[:n], without.prompt_ids)
        for ours, theirs in zip(with_label.response_ids, without.response_ids, strict=True):
            assert np.array_equal(ours, theirs)
        mark = "<extra_id_2>" if template == "extra_id" else ""
        expected = f"{mark}helpfulness:4,correctness:3,verbosity:1\n"
        ids = with_label.prompt_ids[n:].tolist()
        assert bound.tokenizer.decode(ids).lstrip(" ") == expected
        # Encoded as a text of its own, whatever stands around it.
        assert ids == bound.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert bound.prompt_ids(ASK, LABEL) == with_label.prompt_ids.tolist()
        assert bound.prompt_ids(ASK) == without.prompt_ids.tolist()

    @pytest.mark.parametrize(("family", "template"), CHATS)
    @settings(max_examples=30, deadline=None)
    @given(one=LABELS, other=LABELS)
    def test_labels_that_differ_have_ids_that_differ(
        self, family: str, template: str, one: AttributeLabel, other: AttributeLabel
    ) -> None:
        labels = chat(family, template).labels
        assert (labels.ids(one) == labels.ids(other)) == (one == other)

    def test_extra_id_is_nemo_aligners_prompt(self) -> None:
        tokens = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "</s>", "<pad>"]
        tokenizer = sample.byte_level(tokens, eos_token="</s>", pad_token="<pad>")
        bound = ChatFormat("extra_id").bind(tokenizer)
        label = AttributeLabel.of(
            {"verbosity": 2, "helpfulness": 4, "coherence": 4, "complexity": 2, "correctness": 4}
        )
        ids = bound.prompt_ids([Message(role="user", content="Hi")], label)
        # NVIDIA/NeMo-Aligner at af2b3bd9, docs/user-guide/steerlm.rst.
        assert tokenizer.decode(ids) == (
            "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>"
            "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2\n"
        )
        assert tokenizer.convert_tokens_to_ids("<extra_id_2>") in ids  # not its letters

    def test_a_form_of_ones_own(self) -> None:
        bound = chat("llama3", form="[{label}] ")
        ids = bound.prompt_ids(ASK, LABEL)[len(bound.prompt_ids(ASK)) :]
        expected = "[helpfulness:4,correctness:3,verbosity:1] "
        assert bound.tokenizer.decode(ids) == bound.labels.text(LABEL) == expected
        assert bound.ids_hash == chat("llama3").ids_hash  # prompts and responses are the same
        for wrong in ("", "label", "{label}{label}"):
            with pytest.raises(UserError, match=r"chat\.label_form=.* \{label\} once"):
                ChatFormat(label_form=wrong)


def template_file(folder: Path, answer: str) -> str:
    """A template that writes answers in its own way."""
    path = folder / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n"
        "{{ m.content }}<|im_end|>{% else %}<|im_start|>assistant\n"
        + answer
        + "<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return str(path)


class TestRefusals:
    @pytest.mark.parametrize(
        "answer",
        [
            "<<{{ m.content }}>>",
            "<answer>\n{{ m.content }}",
            "{{ m.content | replace('help', 'HELP') }}",
            "{{ m.content | replace(':', ' is ') }}",
        ],
    )
    def test_a_template_that_writes_answers_otherwise(self, tmp_path: Path, answer: str) -> None:
        bound = ChatFormat(template_file(tmp_path, answer)).bind(sample.chatml())
        assert encode(bound, group(label=None)).response_ids  # without labels it is good
        with pytest.raises(
            UserError, match=r"'own' cannot carry .* chat\.template=plain and extra"
        ):
            bound.prompt_ids(ASK, LABEL)
        (refused,) = GroupEncoder(bound, AMPLE, (), True).encode([group()], 0)
        assert isinstance(refused, UserError)

    @pytest.mark.parametrize(
        ("known", "label"),
        [("", "helpfulness:2"), ("024", "helpfulness:1"), ("123", "helpfulness:0"),
         ("01234", None)],
    )  # fmt: skip
    def test_a_tokenizer_that_cannot_tell_ratings_apart(
        self, known: str, label: str | None
    ) -> None:
        words = ["<unk>", "</s>", "<pad>", "helpfulness", "verbosity", ":", ",", "\n", *known]
        backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+|."), "isolated")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
        )
        bound = ChatFormat("plain").bind(tokenizer)
        if label is None:
            texts = ["helpfulness:0", "helpfulness:4"]
            assert len({str(bound.labels.ids(AttributeLabel.parse(text))) for text in texts}) == 2
            return
        with pytest.raises(UserError, match=r"labels that differ in helpfulness the same ids"):
            bound.labels.ids(AttributeLabel.parse(label))


class TestGroups:
    @settings(max_examples=60, deadline=None)
    @given(
        words=st.lists(st.integers(1, 30), min_size=1, max_size=7).filter(lambda w: len(w) % 2),
        marks=st.lists(st.booleans(), min_size=3, max_size=3),
        room=st.integers(0, 60),
        label=LABELS,
    )
    def test_limits_cut_the_same_and_learned_answers_stay(
        self, words: list[int], marks: list[bool], room: int, label: AttributeLabel
    ) -> None:
        prompt: list[Message] = []
        for i, n in enumerate(words):
            content = f"{i} " + "egg " * n
            if i % 2:
                prompt.append(Message(role="assistant", content=content, train=marks[i // 2]))
            else:
                prompt.append(Message(role="user", content=content))
        bound = chat("llama3")
        limits = LengthLimits(len(bound.prompt_ids([Message(role="user", content="a")])) + room, 4)
        one, other = (GroupEncoder(bound, limits, (), True) for _ in range(2))
        ((labelled,), (plain,)) = (
            list(by.encode([group(prompt, of)], 0)) for by, of in ((one, label), (other, None))
        )
        assert isinstance(labelled, TokenGroup)
        assert isinstance(plain, TokenGroup)
        added = bound.labels.ids(label)
        assert labelled.prompt_ids.tolist() == [*plain.prompt_ids.tolist(), *added]
        assert one.cuts == other.cuts
        assert replace(one.report, groups_labelled=0) == other.report
        if plain.prompt_mask is None:
            assert labelled.prompt_mask is None
        else:
            assert labelled.prompt_mask is not None
            expected = [*plain.prompt_mask.tolist(), *[False] * len(added)]
            assert labelled.prompt_mask.tolist() == expected

    def test_a_reward_model_never_sees_it(self) -> None:
        by = GroupEncoder(chat("chatml"), AMPLE, (), False)
        ours, theirs = by.encode([group(), group(label=None)], 0)
        assert isinstance(ours, TokenGroup)
        assert isinstance(theirs, TokenGroup)
        assert np.array_equal(ours.prompt_ids, theirs.prompt_ids)
        assert (by.report.groups_labelled, by.label_attributes) == (0, ())


def stored(folder: Path, *groups: Group, policy: bool = True) -> TokenisedGroups:
    numbered = tuple(replace(one, id=str(i), source=f"rows:{i}") for i, one in enumerate(groups))
    names = ("helpfulness",) if groups[0].attributes else ()
    source = GivenGroups(numbered, names)
    return tokenise(source, "train", chat("llama3"), AMPLE, names, folder, close_cut=not policy)


class TestStore:
    def test_it_knows_what_the_labels_are_of(self, tmp_path: Path) -> None:
        groups = [group(label=None), group(), group(label=AttributeLabel(NAMES, (0, 0, 0)))]
        for _ in range(2):  # made, and read back
            found = stored(tmp_path, *groups)
            assert found.label_attributes == NAMES
            assert found.report["groups_labelled"] == 2
        assert stored(tmp_path, *groups, policy=False).label_attributes == ()
        assert stored(tmp_path, groups[0]).label_attributes == ()

    def test_labels_of_other_attributes_are_told_with_their_rows(self, tmp_path: Path) -> None:
        other = AttributeLabel.of({"helpfulness": 4})
        with pytest.raises(DataError) as caught:
            stored(tmp_path, group(), group(label=other), group(), group(label=other))
        told = [(problem.line, problem.message) for problem in caught.value.problems]
        assert [line for line, _ in told] == [1, 3]
        assert "is of helpfulness, those before it of helpfulness, correctness, verb" in told[0][1]
        # A reward model does not care.
        assert len(stored(tmp_path, group(), group(label=other), policy=False)) == 2

    def test_the_hash_of_ids_is_of_nothing_else(self, tmp_path: Path) -> None:
        n = len(ANSWERS)
        base = stored(tmp_path, group(), group())
        rated = replace(group(), attributes=((4.0,),) * n, rewards=(0.5,) * n)
        again = stored(tmp_path, rated, rated)
        assert again.fingerprint != base.fingerprint
        assert again.ids_hash == base.ids_hash
        others = [
            (group(), group(label=None)),
            (group(), group(label=AttributeLabel(NAMES, (4, 3, 2)))),
            (group(),),
            (group(), replace(group(), responses=ANSWERS[::-1])),
            (group(), replace(group(), responses=ANSWERS[:-1])),
            # The same ids in the same order, cut into groups in another way.
            (replace(group(), responses=ANSWERS[:-1]), group()),
        ]
        hashes = [stored(tmp_path, *groups).ids_hash for groups in others]
        assert len({base.ids_hash, *hashes}) == 7

    def test_without_labels_a_source_gives_the_ids_of_one_that_has_none(
        self, tmp_path: Path
    ) -> None:
        labelled, plain = GivenGroups((group(),)), GivenGroups((group(label=None),))
        assert Unlabelled(labelled).fingerprint("train") != labelled.fingerprint("train")
        hashes = {
            tokenise(of, "train", chat("llama3"), AMPLE, (), tmp_path, close_cut=False).ids_hash
            for of in (Unlabelled(labelled), plain)
        }
        assert len(hashes) == 1
