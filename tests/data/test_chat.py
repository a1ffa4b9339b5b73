from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
import sample_tokenizers as sample

from helpsteer2.data.boundary import boundary_difference
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.templates import DATE_FREEZE, freeze_date
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError

FAMILIES = ("llama3", "qwen3", "chatml", "trained")
TEMPLATES = ("auto", "plain", "extra_id")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "llama3": sample.llama3_like(),
        "qwen3": sample.qwen3_like(),
        "chatml": sample.chatml(),
        "trained": sample.trained(str(tmp_path_factory.mktemp("trained"))),
    }


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


SYSTEM: Message = {"role": "system", "content": "Be brief."}
CONVERSATIONS = [
    [user("How do I boil an egg?")],
    [SYSTEM, user("Hi")],
    [user("Hi"), assistant("Hello there!"), user("  indented\n\nand é日本🧿 more \n")],
    [SYSTEM, user("a"), assistant("b\n"), user("c"), assistant("d"), user("\n")],
]
ANSWERS = ["Six minutes.", "1. First\n2. Second\n", " leading space", "日本 🧿", "x"]


def groups(answers=ANSWERS) -> list[Group]:
    return [
        Group(id=str(i), source="here", prompt=tuple(messages), responses=tuple(answers))
        for i, messages in enumerate(CONVERSATIONS)
    ]


def bytes_only(folder) -> BoundChat:
    """No merges: ids can be counted by hand. ASCII c from '!' on is 6 + ord(c) - 33."""
    tokenizer = TrainedTokenizer(262).build(lambda: iter(["a"]), folder)
    return ChatFormat().bind(tokenizer)


class TestGolden:
    def test_trained(self, tmp_path):
        chat = bytes_only(tmp_path)
        messages = [SYSTEM, user("Hi")]
        assert (
            chat.render(messages, True)
            == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
        )
        assert chat.prompt_ids([user("Hi")]) == [1, 4, 45, 78, 2, 5]
        assert chat.response_ids([user("Hi")], "Hi!") == ([45, 78, 6, 2], 1)

    def test_plain(self, tmp_path):
        chat = ChatFormat("plain").bind(bytes_only(tmp_path).tokenizer)
        messages = [SYSTEM, user("Hi"), assistant("Yes"), user("Ok")]
        assert chat.render(messages, True) == (
            "System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nYes<|end|>\n\nUser:\nOk\n\nAssistant:\n"
        )
        assert chat.response_text(messages, "Fine") == "Fine<|end|>"
        newline = 204
        user_ids = [58, 88, 74, 87, 31]  # User:
        assistant_ids = [38, 88, 88, 78, 88, 89, 70, 83, 89, 31]  # Assistant:
        assert chat.prompt_ids([user("Hi")]) == [
            *[1, *user_ids, newline, 45, 78, newline, newline],
            *[*assistant_ids, newline],
        ]
        assert chat.response_ids([user("Hi")], "Hi") == ([45, 78, 2], 1)

    def test_extra_id(self, tmp_path):
        chat = ChatFormat("extra_id").bind(bytes_only(tmp_path).tokenizer)
        messages = [SYSTEM, user("Hi"), assistant("Yes"), user("Ok")]
        assert chat.render(messages, True) == (
            "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nYes\n"
            "<extra_id_1>User\nOk\n<extra_id_1>Assistant\n"
        )
        assert chat.response_text(messages, "Fine") == "Fine\n<extra_id_2>"
        assert chat.render([user("Hi")], True).startswith(
            "<extra_id_0>System\n\n<extra_id_1>User\n"
        )
        mark = [33, 74, 93, 89, 87, 70, 68, 78, 73, 68, 23, 35]  # <extra_id_2>
        assert chat.response_ids([user("Hi")], "Hi") == ([45, 78, 204, *mark], 13)

    def test_extra_id_with_its_special_tokens(self):
        tokens = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "</s>", "<pad>"]
        tokenizer = sample.byte_level(tokens, eos_token="</s>", pad_token="<pad>")
        chat = ChatFormat("extra_id").bind(tokenizer)
        ids, closing = chat.response_ids([user("Hi")], "Fine.")
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<extra_id_2>")
        # ".\n" is one token of the split: only the mark is the closing's own.
        assert closing in (1, 2)
        assert tokenizer.decode(ids) == "Fine.\n<extra_id_2>"

    @pytest.mark.skipif(
        "HELPSTEER2_REAL_DATA" not in os.environ, reason="needs HELPSTEER2_REAL_DATA"
    )
    def test_extra_id_equals_nemo_aligners_rows(self, tmp_path):
        file = Path(os.environ["HELPSTEER2_REAL_DATA"]) / "steerlm_format" / "test-rm.jsonl"
        tokenizer = bytes_only(tmp_path).tokenizer
        rows = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        for text in rows:
            head, *turns = text.removesuffix("\n<extra_id_2>").split("\n<extra_id_1>")
            system = head.removeprefix("<extra_id_0>System\n")
            messages = []
            for turn in turns:
                role, content = turn.split("\n", 1)
                messages.append({"role": role.lower(), "content": content})
            chat = ChatFormat("extra_id", system).bind(tokenizer)
            assert messages[-1]["role"] == "assistant"
            answer = messages.pop()["content"]
            assert chat.render(messages, True) + chat.response_text(messages, answer) == text
        assert len(rows) == 8


class TestDefinition:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_prompt_and_response_make_the_whole_text(self, tokenizers, family, template):
        chat = ChatFormat(template).bind(tokenizers[family])
        for messages in CONVERSATIONS:
            for answer in ANSWERS:
                response = chat.response_text(messages, answer)
                whole = chat.render([*messages, assistant(answer)], False)
                assert chat.render(messages, True) + response == whole
                assert answer.strip() in response
                ids, closing = chat.response_ids(messages, answer)
                assert chat.tokenizer.decode(ids) == response
                assert 0 < closing <= len(chat.closing_ids)
                assert ids[-closing:] == chat.closing_ids[-closing:]

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_exactly_one_bos(self, tokenizers, family, template):
        tokenizer = tokenizers[family]
        chat = ChatFormat(template).bind(tokenizer)
        for messages in CONVERSATIONS:
            ids = chat.prompt_ids(messages)
            answer_ids, _ = chat.response_ids(messages, "Fine")
            if tokenizer.bos_token_id is None:
                assert family in ("qwen3", "chatml")
                continue
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.bos_token_id not in answer_ids

    def test_a_template_that_writes_bos_twice_gets_one(self, tokenizers, tmp_path):
        file = tmp_path / "twice.jinja"
        file.write_text("{{ bos_token }}" + sample.LLAMA3_TEMPLATE)
        chat = ChatFormat(str(file)).bind(tokenizers["llama3"])
        assert chat.prompt_ids([user("Hi")]).count(tokenizers["llama3"].bos_token_id) == 1
        assert chat.template_name == "twice"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_plain_closes_with_eos(self, tokenizers, family):
        tokenizer = tokenizers[family]
        ids, closing = ChatFormat("plain").bind(tokenizer).response_ids([user("Hi")], "Fine")
        assert (ids[-1], closing) == (tokenizer.eos_token_id, 1)

    def test_qwen3_answers_without_thinking(self, tokenizers):
        chat = ChatFormat("backbone").bind(tokenizers["qwen3"])
        assert chat.render([user("Hi")], True).endswith("assistant\n<think>\n\n</think>\n\n")
        assert chat.response_text([user("Hi")], "Fine") == "Fine<|im_end|>\n"
        with pytest.raises(UserError, match="cannot be told from its prompt"):
            chat.response_ids([user("Hi")], "<think>\nhm\n</think>\n\nFine")

    def test_a_template_whose_prompt_is_no_prefix_is_refused(self, tokenizers, tmp_path):
        file = tmp_path / "counting.jinja"
        file.write_text(
            "{{ messages | length }}{% for m in messages %}{{ m.content }}#{% endfor %}"
        )
        chat = ChatFormat(str(file)).bind(tokenizers["chatml"])
        with pytest.raises(UserError, match=r"'counting'.*cannot be told from its prompt"):
            chat.response_ids([user("Hi")], "Fine")

    @pytest.mark.parametrize("answer", ["", " ", "\n\n"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_empty_response_is_refused(self, tokenizers, family, answer):
        with pytest.raises(UserError, match="response is empty"):
            ChatFormat().bind(tokenizers[family]).response_ids([user("Hi")], answer)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_batch_gives_the_ids_of_single_texts(self, tokenizers, family):
        chat = ChatFormat().bind(tokenizers[family])
        prompt, texts = chat.split_texts(CONVERSATIONS[0], [*ANSWERS, "mind the <|im_end|> mark"])
        assert chat.encode([prompt, *texts]) == [
            chat.encode([text])[0] for text in (prompt, *texts)
        ]


class TestBoundary:
    @pytest.mark.parametrize("family", ["llama3", "qwen3", "trained"])
    def test_apart_equals_whole_at_a_special_boundary(self, tokenizers, family):
        assert boundary_difference(ChatFormat("auto").bind(tokenizers[family]), groups()) == 0.0

    def test_trained_holds_for_any_first_character(self, tokenizers):
        answers = ["\nnewline", "\n\n\n", "  two", "\t", " "]
        answers = [text + "." for text in answers]
        chat = ChatFormat().bind(tokenizers["trained"])
        assert boundary_difference(chat, groups(answers)) == 0.0

    def test_the_share_that_differs_is_reported(self, tokenizers):
        chat = ChatFormat().bind(tokenizers["chatml"])
        prompt = (user("Hi"),)
        same = Group(id="0", source="", prompt=prompt, responses=("Fine", "Well"))
        # The split joins newlines on both sides of the boundary into one word.
        other = Group(id="1", source="", prompt=prompt, responses=("Fine", "\n\nWell"))
        assert boundary_difference(chat, [same, other, same, same]) == 0.25
        assert boundary_difference(chat, []) == 0.0


class TestControlTokens:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_in_messages_they_are_text(self, tokenizers, family, template):
        tokenizer = tokenizers[family]
        chat = ChatFormat(template).bind(tokenizer)
        names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        evil = [user("say " + " and ".join(names) + names[0])]
        tame = [user("say so")]
        for name in names:
            token = tokenizer.convert_tokens_to_ids(name)
            assert chat.prompt_ids(evil).count(token) == chat.prompt_ids(tame).count(token)
            text = f"{name}Fine{name}, and {name}"
            ids, closing = chat.response_ids(tame, text)
            plain, _ = chat.response_ids(tame, "Fine")
            assert ids.count(token) == plain.count(token)
            assert tokenizer.decode(ids) == chat.response_text(tame, text)
            assert ids[-closing:] == plain[-closing:]
        assert names[0] + " and " in chat.render(evil, True)

    def test_lone_surrogates_are_refused(self, tokenizers):
        chat = ChatFormat().bind(tokenizers["trained"])
        for text in ("\ud800", "a\udc00b", "\ud8000\ud801"):
            with pytest.raises(UserError, match="not valid Unicode"):
                chat.prompt_ids([user(text)])


class TestDate:
    @pytest.fixture
    def on_day(self, monkeypatch):
        import transformers.utils.chat_template_utils as module

        def set_day(year: int, month: int, day: int) -> None:
            class Then(datetime):
                @classmethod
                def now(cls, tz=None):
                    return datetime(year, month, day)

            monkeypatch.setattr(module, "datetime", Then)

        return set_day

    def test_text_is_the_same_on_every_day(self, tokenizers, on_day):
        tokenizer = tokenizers["llama3"]
        texts, raw = set(), set()
        for day in ((2025, 1, 2), (2031, 12, 30)):
            on_day(*day)
            chat = ChatFormat("backbone").bind(tokenizer)
            texts.add(chat.render([user("Hi")], True))
            raw.add(tokenizer.apply_chat_template([user("Hi")], tokenize=False))
        assert len(raw) == 2, "the raw template must follow the day, else this test shows nothing"
        assert len(texts) == 1
        assert "Today Date: 26 Jul 2024\n\n" in texts.pop()

    def test_frozen_formats_are_those_of_that_day(self, tokenizers):
        for form in ("%Y-%m-%d", "%d %B %y", "%A, %a %b", "%H:%M:%S"):
            template = freeze_date("{{ strftime_now('" + form + "') }}")
            text = tokenizers["chatml"].apply_chat_template(
                [user("a")], chat_template=template, tokenize=False
            )
            assert text == datetime(2024, 7, 26).strftime(form)

    @pytest.mark.parametrize(
        "start", ["", "\n", "  ", "\n\n  ", "  {% if true %}x{% endif %}", "\n{{ 1 }}"]
    )
    def test_freezing_leaves_the_rest_alone(self, tokenizers, start):
        template = start + "  {% if true %}\n  a\n{% endif %}\n{# strftime_now #} b"
        render = tokenizers["chatml"].apply_chat_template
        assert freeze_date(template).startswith(DATE_FREEZE)
        frozen = render([user("a")], chat_template=freeze_date(template), tokenize=False)
        assert frozen == render([user("a")], chat_template=template, tokenize=False)

    def test_binding_the_frozen_text_again_changes_nothing(self, tokenizers):
        chat = ChatFormat().bind(tokenizers["llama3"])
        again = BoundChat(tokenizers["llama3"], "backbone", chat.template_text)
        assert again.template_hash == chat.template_hash
        assert again.prompt_ids([user("Hi")]) == chat.prompt_ids([user("Hi")])


class TestChoice:
    def test_auto(self, tokenizers, tmp_path):
        assert ChatFormat().bind(tokenizers["qwen3"]).template_name == "backbone"
        bare = sample.byte_level(["</s>", "<pad>"], eos_token="</s>", pad_token="<pad>")
        assert ChatFormat().bind(bare).template_name == "plain"
        with pytest.raises(UserError, match="no chat template"):
            ChatFormat("backbone").bind(bare)

    def test_hashes_tell_templates_apart(self, tokenizers):
        chats = [ChatFormat(name).bind(tokenizers["llama3"]) for name in TEMPLATES]
        assert len({chat.template_hash for chat in chats}) == len(TEMPLATES)

    def test_unknown_names_and_files(self, tokenizers, tmp_path):
        with pytest.raises(UserError, match="unknown chat template 'lama'"):
            ChatFormat("lama")
        with pytest.raises(UserError, match="cannot read the chat template"):
            ChatFormat(str(tmp_path / "none.jinja")).bind(tokenizers["llama3"])

    def test_a_broken_template_is_a_user_error(self, tokenizers, tmp_path):
        file = tmp_path / "broken.jinja"
        for text in ("{% for %}", "{{ raise_exception('no system role') }}", "no answer here"):
            file.write_text(text)
            with pytest.raises(UserError, match="chat template 'broken'"):
                ChatFormat(str(file)).bind(tokenizers["llama3"])

    def test_templates_run_in_a_sandbox(self, tokenizers, tmp_path):
        file = tmp_path / "evil.jinja"
        file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
        with pytest.raises(UserError, match="chat template 'evil'"):
            ChatFormat(str(file)).bind(tokenizers["llama3"])

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_system_prompt(self, tokenizers, template):
        tokenizer = tokenizers["trained"]
        plain = ChatFormat(template).bind(tokenizer)
        chat = ChatFormat(template, "Be brief.").bind(tokenizer)
        assert chat.render([user("Hi")], True) == plain.render([SYSTEM, user("Hi")], True)
        other: list[Message] = [{"role": "system", "content": "Be long."}, user("Hi")]
        assert chat.render(other, True) == plain.render(other, True)

    def test_pad_that_closes_responses_is_refused(self):
        tokenizer = sample.llama3_like(pad="<|eot_id|>")
        with pytest.raises(UserError, match=r"backbone\.tokenizer\.pad_token"):
            ChatFormat().bind(tokenizer)
