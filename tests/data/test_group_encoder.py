"""Sampled ids stay as they are, and learned answers of a prompt have the ids of responses."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sample_tokenizers as sample
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.group_encoder import GroupEncoder
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import pack
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError

AMPLE = LengthLimits(10_000, 10_000)


@cache
def chat(name: str) -> BoundChat:
    """Templates that write an answer in a prompt as they write a response, but for qwen3's."""
    tokenizer, template = {
        "llama3": (sample.llama3_like, "auto"),
        "chatml": (sample.chatml, "auto"),
        "plain": (sample.llama3_like, "plain"),
        "metaspace": (sample.metaspace, "plain"),
        "qwen3": (sample.qwen3_like, "auto"),
        "extra_id": (sample.llama3_like, "extra_id"),
    }[name]
    return ChatFormat(template).bind(tokenizer())


AGREEING = ("llama3", "chatml", "plain", "metaspace")


def encoder(name: str = "llama3", limits: LengthLimits = AMPLE, policy: bool = True):
    return GroupEncoder(chat(name), limits, (), policy)


def encode(encoder: GroupEncoder, group: Group) -> TokenGroup:
    (encoded,) = encoder.encode([group], 0)
    assert isinstance(encoded, TokenGroup), encoded
    return encoded


def conversation(contents: list[str], marks: list[bool]) -> tuple[Message, ...]:
    """Turns of the user's and, some of them marked, the assistant's; the user's is the last."""
    turns: list[Message] = []
    for i, content in enumerate(contents):
        if i % 2 == 0:
            turns.append(Message(role="user", content=content))
        else:
            turns.append(Message(role="assistant", content=content, train=marks[i // 2]))
    return tuple(turns)


def group(prompt: tuple[Message, ...], *responses: str, **more) -> Group:
    return Group("a", "a:1", prompt, responses, **more)


ASK = (Message(role="user", content="How do I boil an egg?"),)
# Spaces, newlines and control tokens inside, for they are what a tokenizer may join.
WORDS = st.sampled_from(["egg", " egg", "\n", "\n\n", "  ", "é", "<|im_end|>", "<|eot_id|>", "No."])
CONTENT = st.lists(WORDS, min_size=1, max_size=4).map("".join).filter(lambda text: text.strip())
TURNS = st.integers(0, 3).flatmap(
    lambda n: st.tuples(
        st.lists(CONTENT, min_size=2 * n + 1, max_size=2 * n + 1),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


class TestTrainedTurns:
    @pytest.mark.parametrize("name", AGREEING)
    @settings(max_examples=60, deadline=None)
    @given(turns=TURNS, answer=CONTENT)
    def test_a_marked_prompt_has_the_ids_of_a_group_a_turn(self, name, turns, answer):
        prompt = conversation(*turns)
        many = encoder(name)
        whole = encode(many, group(prompt, answer))
        marked = [i for i, message in enumerate(prompt) if message.get("train")]
        learned = np.zeros(len(whole.prompt_ids), dtype=bool)
        for i in marked:
            single = encode(encoder(name), group(prompt[:i], prompt[i]["content"]))
            start = len(single.prompt_ids)
            end = start + len(single.response_ids[0])
            expected = np.concatenate([single.prompt_ids, single.response_ids[0]])
            assert np.array_equal(whole.prompt_ids[:end], expected)
            learned[start:end] = True
        if marked:
            assert np.array_equal(whole.prompt_mask, learned)
        else:
            assert whole.prompt_mask is None
        assert many.report.turns_trained == len(marked)
        assert many.report.turns_not_trained == 0

    @pytest.mark.parametrize("name", ["llama3", "chatml"])
    def test_marks_change_no_ids_where_special_tokens_part_the_turns(self, name):
        prompt = conversation(["a", "b", "c", "d", "e"], [True, True])
        unmarked = conversation(["a", "b", "c", "d", "e"], [False, False])
        one, other = (encode(encoder(name), group(p, "f")) for p in (prompt, unmarked))
        assert np.array_equal(one.prompt_ids, other.prompt_ids)
        assert other.prompt_mask is None

    def test_no_space_is_put_before_what_follows_an_answer(self):
        # This tokenizer begins every text with a space, and so each answer that is encoded apart.
        bound = chat("metaspace")
        prompt = conversation(["a", "b", "c"], [True])
        tokens = bound.tokenizer.convert_ids_to_tokens(bound.prompt_ids(prompt))
        assert tokens[tokens.index("</s>") + 1].startswith("\n")

    @pytest.mark.parametrize("name", ["qwen3", "extra_id"])
    def test_a_turn_that_is_written_otherwise_in_a_prompt_is_counted_and_not_learned(self, name):
        prompt = conversation(["a", "b", "c", "d", "e"], [True, True])
        one = encoder(name)
        encoded = encode(one, group(prompt, "f"))
        unmarked = conversation(["a", "b", "c", "d", "e"], [False, False])
        assert encoded.prompt_mask is None
        assert encoded.prompt_ids.tolist() == chat(name).prompt_ids(unmarked)
        assert (one.report.turns_trained, one.report.turns_not_trained) == (0, 2)

    def test_an_answer_that_nothing_asks_for_is_not_learned(self):
        first = Message(role="assistant", content="Hello!", train=True)
        one = encoder()
        assert encode(one, group((first, *ASK), "f")).prompt_mask is None
        assert one.report.turns_not_trained == 1

    def test_a_system_prompt_goes_before_every_turn(self):
        bound = ChatFormat(system_prompt="Be brief.").bind(sample.llama3_like())
        prompt = conversation(["a", "b", "c"], [True])
        ids, mask = bound.join_prompt(
            bound.encode(bound.prompt_pieces(prompt, bound.split_texts(prompt, ())[0]))
        )
        assert mask is not None
        learned = bound.tokenizer.decode(np.array(ids)[mask])
        assert learned == "b<|eot_id|>"

    @pytest.mark.parametrize("name", AGREEING)
    def test_masks_follow_a_cut(self, name):
        contents = [f"{i} {'egg ' * (i % 3 + 1)}." for i in range(9)]
        prompt = conversation(contents, [True] * 4)
        full = len(chat(name).prompt_ids(prompt))
        seen = set()
        for limit in range(len(chat(name).prompt_ids(prompt[-1:])), full + 1):
            one = encoder(name, LengthLimits(limit, 1000))
            encoded = encode(one, group(prompt, "f"))
            dropped = one.cuts.turns_dropped
            expected = encode(encoder(name), group(prompt[2 * dropped :], "f"))
            assert len(encoded.prompt_ids) <= limit
            assert np.array_equal(encoded.prompt_ids, expected.prompt_ids)
            masks = (encoded.prompt_mask, expected.prompt_mask)
            assert masks == (None, None) if dropped == 4 else np.array_equal(*masks)
            assert one.report.turns_trained == 4 - dropped
            seen.add(dropped)
        assert seen == {0, 1, 2, 3, 4}

    def test_packed_indices_point_at_the_answers(self):
        prompts = [
            conversation(["a", "b", "c", "long answer", "e"], [True, True]),
            conversation(["a", "b", "c"], [False]),
            conversation(["a", "last", "c"], [True]),
        ]
        groups = [encode(encoder(), group(prompt, "f", "g")) for prompt in prompts]
        batch = pack(groups, 64)
        tokens = batch.layout.trained_tokens
        text = chat("llama3").tokenizer.decode(batch.input_ids[tokens.positions])
        assert text == "b<|eot_id|>long answer<|eot_id|>last<|eot_id|>"
        assert tokens.positions.dtype == tokens.predictors.dtype == np.int64
        same = batch.group_ids[tokens.positions] == batch.group_ids[tokens.predictors]
        assert same.all()
        assert (batch.segment_ids[tokens.positions] == 0).all()
        before = batch.position_ids[tokens.positions] - batch.position_ids[tokens.predictors]
        assert (before == 1).all()


class TestRewardModels:
    @pytest.mark.parametrize("name", [*AGREEING, "qwen3", "extra_id"])
    @settings(max_examples=40, deadline=None)
    @given(turns=TURNS, answer=CONTENT, room=st.integers(0, 40))
    def test_marks_are_not_looked_at(self, name, turns, answer, room):
        contents, marks = turns
        plain = conversation(contents, [False] * len(marks))
        limits = LengthLimits(len(chat(name).prompt_ids(plain[-1:])) + room, 1000)
        one, other = (encoder(name, limits, policy=False) for _ in range(2))
        ours = encode(one, group(conversation(contents, marks), answer))
        theirs = encode(other, group(plain, answer))
        assert np.array_equal(ours.prompt_ids, theirs.prompt_ids)
        assert np.array_equal(ours.response_ids[0], theirs.response_ids[0])
        assert ours.prompt_mask is None
        assert one.report == other.report
        assert one.cuts == other.cuts


def sampled(*responses: str, ids: tuple[tuple[int, ...], ...], name: str = "llama3") -> Group:
    stops = tuple("stop" if i[-1] in chat(name).closing_ids else "length" for i in ids)
    return group(
        ASK, *responses, response_ids=ids, tokenizer=chat(name).ids_hash, finish_reasons=stops
    )


class TestSampledIds:
    @settings(max_examples=50, deadline=None)
    @given(
        ids=st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=20), min_size=1, max_size=4)
    )
    def test_they_survive_untouched(self, ids):
        given_ids = tuple(map(tuple, ids))
        one = encoder()
        encoded = encode(one, sampled(*("any text",) * len(ids), ids=given_ids))
        assert [tuple(kept) for kept in encoded.response_ids] == list(given_ids)
        assert encoded.prompt_ids.tolist() == chat("llama3").prompt_ids(ASK)
        assert one.report.responses_by_ids == len(ids)
        assert one.report.responses_by_text == one.cuts.responses_cut == 0

    def test_a_long_one_loses_its_end(self):
        stop = chat("llama3").closing_ids[-1]
        one = encoder(limits=LengthLimits(1000, 3))
        encoded = encode(one, sampled("x", "y", ids=((5, 6, 7, 8), (5, 6, 7, stop))))
        assert [list(ids) for ids in encoded.response_ids] == [[5, 6, 7], [5, 6, 7]]
        assert one.cuts.responses_cut == 2

    def test_those_of_another_chat_are_encoded_from_text(self):
        foreign = replace(sampled("Six.", "Two.", ids=((5,), (6,))), tokenizer="another")
        foreign = replace(foreign, finish_reasons=("stop", "length"))
        one = encoder()
        finished, unfinished = encode(one, foreign).response_ids
        decode = chat("llama3").tokenizer.decode
        assert (decode(finished), decode(unfinished)) == ("Six.<|eot_id|>", "Two.")
        assert one.report.responses_by_text == one.report.responses_of_other_ids == 2

    def test_a_reward_model_reads_the_text_and_its_closing(self):
        stop = chat("llama3").closing_ids[-1]
        one = encoder(policy=False)
        group = sampled("Six.", "Two.", ids=((5, stop), (6, 7)))
        encoded = encode(one, group)
        unsampled = replace(group, response_ids=None, tokenizer=None, finish_reasons=None)
        plain = encode(encoder(policy=False), unsampled)
        for ours, theirs in zip(encoded.response_ids, plain.response_ids, strict=True):
            assert np.array_equal(ours, theirs)
            assert ours[-1] == stop
        assert one.report.responses_of_other_ids == 0

    @pytest.mark.parametrize("policy", [True, False])
    @pytest.mark.parametrize("name", ["llama3", "chatml", "qwen3", "extra_id", "metaspace"])
    def test_an_empty_one_is_its_closing(self, name, policy):
        one = encoder(name, policy=policy)
        empty = group(ASK, "", " \n", finish_reasons=("stop", "length"))
        encoded = encode(one, empty)
        assert all(len(ids) > 0 for ids in encoded.response_ids)
        closing = chat(name).closing_ids
        assert encoded.response_ids[0].tolist()[-len(closing) :] == closing
        assert one.report.responses_empty == 2
        (refused,) = one.encode([replace(empty, finish_reasons=None)], 0)
        assert isinstance(refused, UserError)

    def test_an_empty_one_of_a_policy_is_its_end_of_turn(self):
        stop = chat("llama3").closing_ids[-1]
        assert encode(encoder(), sampled("", ids=((stop,),))).response_ids[0].tolist() == [stop]

    def test_rewards_keep_their_places(self):
        encoded = encode(encoder(), group(ASK, "a", "b", rewards=(-7.5, 1e9)))
        assert encoded.rewards is not None
        assert encoded.rewards.dtype == np.float32
        assert encoded.rewards.tolist() == [-7.5, 1e9]


def test_a_bad_group_does_not_shift_the_ids_of_the_others() -> None:
    prompt = conversation(["a", "b", "c"], [True])
    good, bad = group(prompt, "x", "y", "z"), group(prompt, "x", "")
    mixed = [good, bad, sampled("t", ids=((9, 8),)), bad, good]
    results = list(encoder().encode(mixed, 10))
    assert [isinstance(result, UserError) for result in results] == [0, 1, 0, 1, 0]
    for i in (0, 2, 4):
        result, alone = results[i], encode(encoder(), mixed[i])
        assert isinstance(result, TokenGroup)
        assert result.index == 10 + i
        assert np.array_equal(result.prompt_ids, alone.prompt_ids)
        for ours, theirs in zip(result.response_ids, alone.response_ids, strict=True):
            assert np.array_equal(ours, theirs)


def test_the_hash_of_ids_tells_tokenizers_and_templates_apart() -> None:
    names = ("llama3", "plain", "chatml", "qwen3", "metaspace", "extra_id")
    assert len({chat(name).ids_hash for name in names}) == len(names)
    assert ChatFormat("plain").bind(sample.llama3_like()).ids_hash == chat("plain").ids_hash


@pytest.mark.parametrize("name", ["llama3", "plain", "chatml", "qwen3", "metaspace"])
def test_an_export_keeps_the_hash_of_its_ids(name: str, tmp_path: Path) -> None:
    # It writes the template into the tokenizer, which had none or another.
    tokenizer = copy.deepcopy(chat(name).tokenizer)
    tokenizer.chat_template = chat(name).template_text
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded(["a b c d e"], truncation=True, max_length=3)  # leaves a trace in the backend
    assert ChatFormat("auto").bind(loaded).ids_hash == chat(name).ids_hash
