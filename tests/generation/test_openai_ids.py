"""Ids that a server answers: those that the policy knows, or a word about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.generation.openai import OpenAIEngine
from helpsteer2.generation.sampling import Sample, SamplingParams

from .openai_helpers import STOP, Reply, make_policy, serving

GROUP = Group("a", "rows.jsonl:7", ({"role": "user", "content": "What is it?"},), ())


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def vocabulary(policy: Path) -> int:
    size: int = json.loads((policy / "config.json").read_text())["vocab_size"]
    return size


def sample_of(policy: Path, token: int) -> Sample:
    """The sample of a server that answers this token and the end of a turn."""

    def answer(count: int, body: dict[str, Any]) -> Reply:
        choice = {"text": "x", "finish_reason": "stop", "token_ids": [token, STOP]}
        return 200, {}, json.dumps({"choices": [choice]}).encode()

    with serving(answer) as server:
        sampler = OpenAIEngine(server.url, "vllm", timeout=20, deadline=20).open(str(policy))
        ((_, (sample,)),) = sampler.sample([GROUP], SamplingParams())
    return sample


def test_ids_that_the_policy_does_not_know_are_told_with_their_prompt(policy: Path) -> None:
    size = vocabulary(policy)
    assert sample_of(policy, size - 1).ids == (size - 1, STOP)
    for token in (-1, size, 2**40):
        with pytest.raises(UserError, match=rf"rows\.jsonl:7.*token {token}, .* than {size}"):
            sample_of(policy, token)


def test_ids_between_the_tokenizer_and_a_wider_head_are_kept(policy: Path) -> None:
    size = vocabulary(policy)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"vocab_size": size + 20}))
    try:
        sample = sample_of(policy, size + 19)
    finally:
        (policy / "config.json").write_text(json.dumps(config))
    assert sample.ids == (size + 19, STOP)
    assert sample.text == ""
