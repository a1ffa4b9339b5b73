"""Prompts that go as text: what would become other ids on the server is refused for its reason."""

from __future__ import annotations

import pytest

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, Message
from helpsteer2.errors import UserError
from helpsteer2.generation.openai import OpenAIEngine, OpenAISampler
from helpsteer2.generation.sampling import SamplingParams
from tests.data import sample_tokenizers as sample

# Nothing listens there: what is refused is refused before it is sent.
ENGINE = OpenAIEngine("http://127.0.0.1:9/v1", "openai", timeout=0.1, deadline=0.1)


def refusal(content: str, train: bool) -> str:
    """Why a prompt is not sent; its tokenizer puts a space before each text it encodes."""
    chat = ChatFormat("plain").bind(sample.metaspace())
    prompt = (
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Hello", train=train),
        Message(role="user", content=content),
    )
    sampler = OpenAISampler(ENGINE, None, chat, chat.closing_ids, len(chat.tokenizer))
    with pytest.raises(UserError) as caught:
        list(sampler.sample([Group("a", "rows:1", prompt, ())], SamplingParams(n=1, max_tokens=5)))
    return str(caught.value)


def test_a_prompt_whose_text_gets_other_ids_is_refused_for_its_reason() -> None:
    assert "answers in it are marked `train`" in refusal("Why?", train=True)
    assert "spells out control tokens" in refusal("What is </s>?", train=False)
    assert "spells out control tokens" in refusal("What is </s>?", train=True)


def test_what_gets_the_same_ids_is_sent() -> None:
    assert "no answer" in refusal("Why?", train=False)
