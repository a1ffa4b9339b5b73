"""Sampling from a real server of the kind: ``transformers serve``, started on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpsteer2.__main__ import dispatch
from helpsteer2.data.groups import Group, Message
from helpsteer2.errors import UserError
from helpsteer2.generation.openai import OpenAIEngine, OpenAISampler
from helpsteer2.generation.sampling import Sample, SamplingParams

from .openai_helpers import STOP, make_policy

pytestmark = pytest.mark.slow  # the server takes its time to start

START_SECONDS = 240


@dataclass
class Server:
    """A running server and the policy that it has."""

    url: str
    policy: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(package, reason="transformers serve needs it")
    root = tmp_path_factory.mktemp("server")
    policy = make_policy(root)
    # Settings that a server would use unasked, none of which may show in the samples.
    path = policy / "generation_config.json"
    odd = {"do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 5.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", str(policy), "--host", "127.0.0.1", "--port", str(port)]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", command, *arguments, "--device", "cpu"],
            env=os.environ | {"HF_HOME": str(root / "hub")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        await_health(url, process, root / "log")
        yield Server(f"{url}/v1", policy)
    finally:
        process.kill()
        process.wait()


def await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end and process.poll() is None:
        try:
            direct.open(f"{url}/health", timeout=2).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"transformers serve did not start:\n{log.read_text()[-2000:]}")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


PROMPTS: list[tuple[Message, ...]] = [
    *((user(f"What is {i}?"),) for i in range(8)),
    ({"role": "system", "content": "Be kind."}, user("Good morning!")),
    (user("One?"), {"role": "assistant", "content": "Yes."}, user("  Two? \n ÄöÜ 日本  ")),
]
GROUPS = [Group(f"g{i}", f"rows:{i}", prompt, ()) for i, prompt in enumerate(PROMPTS)]


def opened(server: Server, **options: Any) -> OpenAISampler:
    settings = {"server": "transformers", "concurrency": 4, "timeout": 60, "deadline": 60}
    return OpenAIEngine(server.url, **{**settings, **options}).open(str(server.policy))


def sampled(sampler: OpenAISampler, groups: list[Group] = GROUPS, **params: Any) -> Any:
    chosen = SamplingParams(**{"n": 1, "max_tokens": 24, **params})
    return {group.id: samples for group, samples in sampler.sample(groups, chosen)}


def test_greedy_samples_are_those_of_the_model_in_this_process(server: Server) -> None:
    sampler = opened(server)
    found = sampled(sampler, temperature=0)
    model = AutoModelForCausalLM.from_pretrained(server.policy)
    tokenizer = AutoTokenizer.from_pretrained(server.policy)
    reasons = set()
    for group in GROUPS:
        ids = sampler.chat.prompt_ids(group.prompt)
        options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 24}
        expected = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        (sample,) = found[group.id]
        assert sample.text == tokenizer.decode(expected, skip_special_tokens=True)
        # At the very last token the server cannot tell one reason from the other.
        stopped = expected[-1] == STOP and len(expected) < 24
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert (sample.ids[-1] == STOP) == stopped
        assert sample.logprobs is None
        reasons.add(sample.finish_reason)
    assert reasons == {"stop", "length"}
    assert sampler.counts.requests == len(GROUPS)
    assert sampler.counts.reencoded == sampler.counts.without_logprobs == len(GROUPS)


def test_samples_repeat_and_depend_on_seed_group_and_index(server: Server) -> None:
    sampler = opened(server, concurrency=1)
    some = sampled(sampler, GROUPS[:4], n=3)
    again = sampled(sampler, GROUPS[3:1:-1], n=2)
    assert again == {name: some[name][:2] for name in ("g2", "g3")}
    assert sampled(sampler, GROUPS[:1], n=3, seed=1)["g0"] != some["g0"]
    texts = [sample.text for samples in some.values() for sample in samples]
    assert len(set(texts)) > 0.9 * len(texts)


def test_temperature_and_truncation_reach_the_server(server: Server) -> None:
    """The one token that they leave is the likeliest, also against the model's own settings."""
    sampler, few = opened(server), GROUPS[:3]
    greedy = sampled(sampler, few, temperature=0)
    assert sampled(sampler, few, top_k=1) == greedy
    assert sampled(sampler, few, top_p=1e-6) == greedy
    assert sampled(sampler, few, temperature=1e-4) == greedy
    assert sampled(sampler, few) != greedy


def test_many_requests_at_once_lose_and_mix_up_nothing(server: Server) -> None:
    alone = sampled(opened(server, concurrency=1), temperature=0)
    sampler = opened(server, concurrency=16)
    found: dict[str, list[Sample]] = sampled(sampler, n=2, top_k=1)
    assert found == {name: [sample] * 2 for name, (sample,) in alone.items()}
    assert sampler.counts.requests == 2 * len(GROUPS)


def test_the_server_names_its_model_if_another_is_asked_for(server: Server) -> None:
    sampler = opened(server, served_model="another")
    with pytest.raises(UserError, match=f"pinned to '{server.policy}'"):
        sampled(sampler, GROUPS[:1])
    assert sampled(opened(server, served_model=str(server.policy)), GROUPS[:1])


def test_a_wrong_kind_of_server_is_told(server: Server) -> None:
    served = opened(server)
    engine = OpenAIEngine(server.url, server="vllm")
    sampler = OpenAISampler(engine, None, served.chat, served.stop_token_ids, served.vocabulary)
    with pytest.raises(UserError, match="another kind of server"):
        sampled(sampler, GROUPS[:1])


def test_the_command_writes_groups_and_no_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])
    engine = {"base_url": server.url, "server": "transformers", "api_key_variable": "MY_KEY"}
    arguments = [
        "sample", f"model={server.policy}", f"run_dir={tmp_path}", "data=world", "max_prompts=3",
        "sampling.n=2", "sampling.max_tokens=8", "engine=openai",
        *(f"engine.{name}={value}" for name, value in engine.items()),
    ]  # fmt: skip
    try:
        assert dispatch(arguments) == 0
    finally:
        GlobalHydra.instance().clear()
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert len(row["responses"]) == len(row["response_ids"]) == 2
        assert set(row["finish_reasons"]) <= {"stop", "length"}
        assert row.get("logprobs") is None
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["server"]["reencoded"] == 6
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"s3cret" not in file.read_bytes()
