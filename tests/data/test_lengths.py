from __future__ import annotations

from itertools import takewhile

import pytest
import sample_tokenizers as sample

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Message
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.errors import UserError


@pytest.fixture(scope="module", params=["trained", "llama3", "plain", "extra_id"])
def chat(request, tmp_path_factory):
    if request.param == "llama3":
        return ChatFormat().bind(sample.llama3_like())
    tokenizer = sample.trained(str(tmp_path_factory.mktemp("trained")))
    return ChatFormat("auto" if request.param == "trained" else request.param).bind(tokenizer)


def say(*texts: str) -> list[Message]:
    """User, assistant, user, …"""
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


SYSTEM: Message = {"role": "system", "content": "Be brief."}


def fit(chat, messages, limit):
    report = CutReport()
    ids = chat.prompt_ids(messages)
    kept = LengthLimits(limit, 10_000).fit_messages(messages, ids, chat, report)
    assert (kept is messages) == (len(ids) <= limit)
    return chat.prompt_ids(kept), report


def common_end(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1], strict=False))
    return "".join(a for a, _ in same)[::-1]


class TestPrompt:
    def test_what_fits_is_left_alone(self, chat):
        messages = [SYSTEM, *say("one", "two", "three")]
        whole = chat.prompt_ids(messages)
        assert fit(chat, messages, len(whole)) == (whole, CutReport())

    def test_oldest_turns_go_first(self, chat):
        messages = [SYSTEM, *say("one " * 5, "two " * 5, "three " * 5, "four " * 5, "five")]
        whole = chat.prompt_ids(messages)
        for dropped in (1, 2):
            wanted = chat.prompt_ids([SYSTEM, *messages[1 + 2 * dropped :]])
            ids, report = fit(chat, messages, len(wanted))
            assert ids == wanted
            assert report == CutReport(1, dropped, 0, len(whole) - len(wanted))
        longer = chat.prompt_ids([SYSTEM, *messages[3:]])
        ids, report = fit(chat, messages, len(longer) - 1)
        assert report.turns_dropped == 2, "one token less than fits: another turn has to go"

    def test_the_last_turn_keeps_its_end(self, chat):
        text = "".join(f"word{i} " for i in range(200)) + "the question?"
        messages = [SYSTEM, *say("old", "older", text)]
        least = len(chat.prompt_ids([SYSTEM, *say("a")]))
        for limit in range(least + 8, least + 60, 7):
            ids, report = fit(chat, messages, limit)
            assert limit - 3 <= len(ids) <= limit, "as much is kept as fits"
            shown = chat.tokenizer.decode(ids)
            kept = common_end(shown[: shown.rindex("?") + 1], text)
            assert "question?" in shown
            assert "Be brief." in shown
            assert "old" not in shown
            assert len(kept) >= len(ids) - least, "each token kept is one character or more"
            assert shown.endswith(chat.render(say("X"), True).split("X")[-1])
            assert report.prompts_cut == report.turns_dropped == 1
            assert report.tokens_cut == len(chat.prompt_ids(messages)) - len(ids)
            if chat.tokenizer.bos_token_id is not None:
                assert ids.index(chat.tokenizer.bos_token_id) == 0

    def test_users_who_write_twice_and_openings_of_the_assistant(self, chat):
        messages: list[Message] = [
            {"role": "assistant", "content": "Welcome! " * 10},
            *say("first " * 10)[:1],
            *say("second"),
        ]
        wanted = chat.prompt_ids(say("second"))
        ids, report = fit(chat, messages, len(wanted))
        assert (ids, report.turns_dropped) == (wanted, 2)

    def test_characters_of_many_tokens_are_not_split(self, chat):
        messages = say("🧿日本" * 50)
        least = len(chat.prompt_ids(say("a")))
        for limit in range(least + 11, least + 16):
            ids, _ = fit(chat, messages, limit)
            assert len(ids) <= limit
            assert "\ufffd" not in chat.tokenizer.decode(ids)

    def test_a_very_long_text_is_cut_quickly(self, chat):
        ids, report = fit(chat, say("lorem ipsum " * 50_000), 200)
        assert 190 <= len(ids) <= 200
        assert report.tokens_cut > 100_000

    def test_a_system_message_that_fills_the_limit_is_refused(self, chat):
        messages: list[Message] = [{"role": "system", "content": "rule " * 300}, *say("Hi there")]
        with pytest.raises(UserError, match="max_prompt_tokens=100 is too small"):
            fit(chat, messages, 100)


class TestResponse:
    @pytest.mark.parametrize("room", [1, 5, 50])
    def test_content_is_cut_and_closed(self, chat, room):
        messages = say("Hi")
        ids, closing = chat.response_ids(messages, "some words. " * 100)
        limits = LengthLimits(1000, len(chat.closing_ids) + room)
        report = CutReport()
        kept = limits.fit_response(ids, chat, report)
        assert kept == ids[:room] + chat.closing_ids
        assert chat.tokenizer.decode(kept).endswith(chat.closing_text)
        assert report == CutReport(0, 0, 1, len(ids) - len(kept))
        assert closing > 0

    def test_what_fits_is_left_alone(self, chat):
        ids, _ = chat.response_ids(say("Hi"), "Fine.")
        report = CutReport()
        assert LengthLimits(1000, len(ids)).fit_response(ids, chat, report) == ids
        assert report == CutReport()
        shorter = LengthLimits(1000, len(ids) - 1).fit_response(ids, chat, report)
        assert len(shorter) == len(ids) - 1
        assert shorter[-len(chat.closing_ids) :] == chat.closing_ids


class TestLimits:
    @pytest.mark.parametrize("limits", [(0, 5), (5, 0), (-1, 5)])
    def test_they_are_positive(self, limits):
        with pytest.raises(UserError, match="at least 1"):
            LengthLimits(*limits)

    def test_the_templates_own_tokens_must_fit(self, chat):
        prompt = len(chat.prompt_ids(say("a")))
        response = len(chat.closing_ids) + 1
        LengthLimits(prompt, response).check(chat)
        with pytest.raises(UserError, match="max_prompt_tokens"):
            LengthLimits(prompt - 1, response).check(chat)
        with pytest.raises(UserError, match="max_response_tokens"):
            LengthLimits(prompt, response - 1).check(chat)
