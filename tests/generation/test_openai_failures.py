"""A server that misbehaves: told in words, tried again where that can help, nothing lost."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.generation import openai_client
from helpsteer2.generation.openai import OpenAIEngine, OpenAISampler
from helpsteer2.generation.openai_threads import in_threads
from helpsteer2.generation.sampling import Sample, SamplingParams

from . import openai_helpers
from .openai_helpers import CompletionServer, Reply, drawn, error, first, make_policy, serving

PARAMS = SamplingParams(n=3, max_tokens=20, seed=5)
GROUPS = [
    Group(f"g{i}", f"rows.jsonl:{i}", ({"role": "user", "content": f"What is {i}?"},), ())
    for i in range(12)
]
Samples = dict[str, list[Sample]]
Policy = tuple[BoundChat, tuple[int, ...], int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_policy(tmp_path_factory.mktemp("policy")))


@pytest.fixture(scope="module")
def policy(folder: str) -> Policy:
    with serving() as server:
        sampler = engine(server).open(folder)
    return sampler.chat, sampler.stop_token_ids, sampler.vocabulary


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_DELAY", 0.01)


def engine(at: CompletionServer | str, **options: Any) -> OpenAIEngine:
    url = at if isinstance(at, str) else at.url
    defaults = {"server": "vllm", "concurrency": 4, "timeout": 20, "deadline": 20}
    return OpenAIEngine(**{"base_url": url, **defaults, **options})


def sampled(
    engine: OpenAIEngine, policy: Policy, groups: Iterable[Group] = GROUPS, **params: Any
) -> Samples:
    found: Samples = {}
    sample_into(found, engine, policy, groups, **params)
    return found


def sample_into(
    found: Samples, engine: OpenAIEngine, policy: Policy, groups: Iterable[Group], **params: Any
) -> None:
    chosen = SamplingParams(**{**vars(PARAMS), **params})
    for group, samples in OpenAISampler(engine, "policy", *policy).sample(groups, chosen):
        found[group.id] = samples


def test_ids_and_logprobs_are_those_that_the_server_gives(policy: Policy) -> None:
    with serving() as server:
        sampler = OpenAISampler(engine(server), "policy", *policy)
        samples = dict((group.id, found) for group, found in sampler.sample(GROUPS, PARAMS))
    assert set(samples) == {group.id for group in GROUPS}
    seeds = {tuple(body["prompt"]): body["seed"] for body in server.bodies}
    for group in GROUPS:
        seed = seeds[tuple(sampler.chat.prompt_ids(group.prompt))]
        assert [list(sample.ids) for sample in samples[group.id]] == [
            drawn(seed + index) for index in range(3)
        ]
        for sample in samples[group.id]:
            assert sample.finish_reason == "stop"
            assert sample.text == sampler.chat.tokenizer.decode(sample.ids[:-1])
            assert sample.logprobs == tuple(-(i % 7) / 4 for i in sample.ids)
    assert sampler.counts.requests == len(GROUPS)
    assert sampler.counts.reencoded == sampler.counts.without_logprobs == 0


def test_n_requests_with_seeds_of_their_own_give_what_one_request_for_n_gives(
    policy: Policy,
) -> None:
    with serving() as server:
        together = sampled(engine(server), policy)
        server.bodies.clear()
        apart = sampled(engine(server, server="sglang"), policy)
        assert len(server.bodies) == 3 * len(GROUPS)
        assert len({body["seed"] for body in server.bodies}) == 3 * len(GROUPS)
    assert together == apart


def test_samples_depend_on_seed_group_and_index_alone(policy: Policy) -> None:
    with serving(seconds=0.01) as server:
        some = sampled(engine(server, concurrency=7), policy)
        assert 1 < server.most_running <= 7
        others = sampled(engine(server, concurrency=1), policy, reversed(GROUPS[3:]))
        more = sampled(engine(server), policy, n=5)
        unlike = sampled(engine(server), policy, seed=6)
    assert all(others[name] == some[name] for name in others)
    assert all(more[name][:3] == some[name] for name in some)
    assert not any(unlike[name] == some[name] for name in some)


def test_a_response_that_the_limit_cut_has_no_stop_token(policy: Policy) -> None:
    with serving() as server:
        samples = sampled(engine(server), policy, max_tokens=2)
    for sample in (one for found in samples.values() for one in found):
        assert sample.finish_reason == "length"
        assert len(sample.ids) == 2
        assert openai_helpers.STOP not in sample.ids


def test_a_cut_response_without_text_still_has_ids(policy: Policy) -> None:
    choice = {"index": 0, "text": "", "finish_reason": "length"}
    reply: Reply = (200, {}, json.dumps({"choices": [choice]}).encode())
    with serving(lambda count, body: reply) as server:
        samples = sampled(engine(server, server="openai"), policy, GROUPS[:1], n=1)
    assert samples == {"g0": [Sample((openai_helpers.STOP,), "", "length", None)]}


def test_other_stop_tokens_end_a_response_and_are_no_text(policy: Policy) -> None:
    stops = tuple(range(40, 60))
    with serving() as server:
        samples = sampled(engine(server), policy, stop_token_ids=stops)
    for sample in (one for found in samples.values() for one in found):
        assert sample.ids[-1] in (openai_helpers.STOP, *stops)
        assert not {*stops, openai_helpers.STOP} & {*sample.ids[:-1]}
        assert sample.text == policy[0].tokenizer.decode(sample.ids[:-1])


def test_logprobs_under_another_temperature_are_not_taken(policy: Policy) -> None:
    with serving() as server:
        hot = sampled(engine(server, server="sglang"), policy, temperature=2.0)
        raw = sampled(engine(server, server="vllm"), policy, temperature=2.0)
    assert {sample.logprobs for found in hot.values() for sample in found} == {None}
    assert None not in {sample.logprobs for found in raw.values() for sample in found}


# What passes.


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_failures_that_pass_change_nothing_but_the_count(policy: Policy, status: int) -> None:
    with serving() as server:
        expected = sampled(engine(server), policy)
    with serving(first(4, error(status, "busy"))) as server:
        sampler = OpenAISampler(engine(server), "policy", *policy)
        assert (
            dict((group.id, found) for group, found in sampler.sample(GROUPS, PARAMS)) == expected
        )
    assert sampler.counts.retries == 4


def test_the_server_may_say_how_long_to_wait(policy: Policy) -> None:
    with serving(first(1, error(429, "slowly", retry_after="1"))) as server:
        start = time.monotonic()
        assert sampled(engine(server), policy, GROUPS[:1])
        assert time.monotonic() - start >= 1


def test_a_lost_connection_is_made_again(policy: Policy) -> None:
    cut_short = (200, {"content-length": "1000"}, b'{"choices"')
    with serving(first(2, cut_short)) as server:
        assert len(sampled(engine(server), policy)) == len(GROUPS)


# What does not pass.


def test_nothing_listens(folder: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    for kind, command in (("vllm", "vllm serve"), ("transformers", "transformers serve")):
        with pytest.raises(UserError, match=f"(?s){url}.*{command}"):
            engine(url, server=kind).open(folder)
    assert time.monotonic() - start < 5


def test_a_wrong_model_is_told_with_those_there_are(folder: str) -> None:
    with serving(models=("small", "large")) as server:
        for name in (None, "huge"):
            with pytest.raises(UserError, match="small, large"):
                engine(server, served_model=name).open(folder)
        sampler = engine(server, served_model="large").open(folder)
        assert list(sampler.sample(GROUPS[:1], PARAMS))
        assert server.bodies[0]["model"] == "large"


def test_an_address_that_is_no_such_server(folder: str) -> None:
    with serving() as server, pytest.raises(UserError, match="/v1"):
        engine(server.url.removesuffix("/v1")).open(folder)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("<html>Welcome</html>", "no JSON: <html>"),
        ("[1, 2]", "no JSON object"),
        ('"' + "[" * 100_000, "no JSON"),
        ("{}", "choices"),
        ({"choices": []}, "0 of 1"),
        ({"choices": [7]}, "no objects"),
        ({"choices": [{"text": 3, "finish_reason": "stop"}]}, "text"),
        ({"choices": [{"text": "a", "finish_reason": "content_filter"}]}, "content_filter"),
        ({"choices": [{"text": "a", "finish_reason": None}]}, "None"),
        ({"choices": [{"text": "a", "finish_reason": "stop", "token_ids": ["b"]}]}, "token_ids"),
    ],
)
def test_nonsense_is_told_at_once(policy: Policy, answer: Any, told: str) -> None:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    with serving(lambda count, body: (200, {}, text.encode())) as server:
        with pytest.raises(UserError, match=told) as raised:
            sampled(engine(server), policy, GROUPS[:1], n=1)
        assert len(server.bodies) == 1
    assert "rows.jsonl:0" in str(raised.value)


def test_an_answer_that_is_not_compressed_as_it_says(policy: Policy) -> None:
    reply = (200, {"content-encoding": "gzip"}, b"nonsense")
    with serving(lambda count, body: reply) as server, pytest.raises(UserError, match="decoded"):
        sampled(engine(server), policy, GROUPS[:1])


def test_an_answer_without_end_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "LONGEST_ANSWER", 2**20)
    huge = (200, {}, b'{"choices": "' + b"a" * 2**21 + b'"}')
    with serving(lambda count, body: huge) as server, pytest.raises(UserError, match="1 MiB"):
        sampled(engine(server), policy, GROUPS[:1])


def test_a_slow_server_is_given_up_at_the_deadline(policy: Policy) -> None:
    with serving(seconds=3) as server:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no answer within 0\.\d+ s.*same command"):
            sampled(engine(server, timeout=0.3, deadline=1), policy, GROUPS[:2])
        assert 0.9 < time.monotonic() - start < 2.5
        assert len(server.bodies) >= 4


def test_a_server_that_always_fails_is_not_asked_forever(policy: Policy) -> None:
    with serving(lambda count, body: error(500, "out of memory")) as server:
        with pytest.raises(UserError, match="5 times: status 500: out of memory"):
            sampled(engine(server), policy, GROUPS[:1], n=1)
        assert len(server.bodies) == 5


def test_a_wait_beyond_the_deadline_is_not_waited(policy: Policy) -> None:
    start = time.monotonic()
    reply = error(429, "tomorrow", retry_after="86400")
    with serving(lambda count, body: reply) as server, pytest.raises(UserError, match="tomorrow"):
        sampled(engine(server), policy, GROUPS[:1])
    assert time.monotonic() - start < 5


def test_one_refused_prompt_is_named_and_the_others_are_kept(policy: Policy) -> None:
    long = Group("long", "rows.jsonl:99", ({"role": "user", "content": "long " * 50},), ())

    def refuse(count: int, body: dict[str, Any]) -> Reply | None:
        return error(400, "too long for me") if len(body["prompt"]) > 100 else None

    kept: Samples = {}
    with serving(refuse) as server:
        with pytest.raises(UserError, match=r"rows\.jsonl:99.*too long for me"):
            sample_into(kept, engine(server), policy, [*GROUPS[:3], long, *GROUPS[3:]])
        # Those on their way are waited for, others not begun.
        assert {"g0", "g1", "g2"} <= set(kept)
        assert len(server.bodies) < len(GROUPS)


def test_what_was_sampled_is_kept_when_the_server_dies(policy: Policy) -> None:
    path = Path(openai_helpers.__file__)
    process = subprocess.Popen([sys.executable, str(path), "7"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    kept: Samples = {}
    try:
        url = process.stdout.readline().strip()
        with pytest.raises(UserError, match="same command"):
            sample_into(kept, engine(url, deadline=2, timeout=2), policy, GROUPS)
        assert process.wait(10) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert 4 <= len(kept) <= 7  # an answer on its way may die with the server
    with serving() as server:
        rest = sampled(engine(server), policy, [group for group in GROUPS if group.id not in kept])
        assert kept | rest == sampled(engine(server), policy)


def test_a_server_with_another_tokenizer_is_noticed(policy: Policy) -> None:
    choice = {"text": "a", "finish_reason": "stop"}
    answer = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3}}).encode()
    with serving(lambda count, body: (200, {}, answer)) as server:
        for kind in ("vllm", "transformers"):
            with pytest.raises(UserError, match="counts 3 tokens"):
                sampled(engine(server, server=kind), policy, GROUPS[:1], n=1)


# Settings.


def test_the_key_comes_from_the_environment_and_is_never_shown(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with serving(lambda count, body: error(401, "bad key s3cret-key")) as server:
        chosen = engine(server, api_key_variable="MY_KEY")
        with pytest.raises(UserError, match="MY_KEY"):
            chosen.open("nowhere")
        monkeypatch.setenv("MY_KEY", "s3cret-key")
        with pytest.raises(UserError, match=r"401: bad key .*api_key_variable") as raised:
            sampled(chosen, policy, GROUPS[:1])
        assert set(server.authorizations) == {"Bearer s3cret-key"}
        server.authorizations.clear()
        with pytest.raises(UserError):
            sampled(engine(server), policy, GROUPS[:1])
        assert set(server.authorizations) == {None}
    assert "s3cret" not in str(raised.value) + repr(chosen) + caplog.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"base_url": "http://me:pw@localhost:8000/v1"}, "api_key_variable"),
        ({"base_url": "localhost:8000"}, "no address"),
        ({"base_url": "http://localhost:99999/v1"}, "no address"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 10.0, "deadline": 5.0}, "deadline"),
        ({"server": "tgi"}, "vllm, sglang, transformers, openai"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        engine("http://localhost:8000/v1", **options)


def test_a_server_of_text_alone_gets_no_ids_and_no_control_tokens(policy: Policy) -> None:
    spelled = Group("bad", "rows.jsonl:7", ({"role": "user", "content": "Say <|end|> now"},), ())
    with serving(lambda count, body: error(400, str(body["prompt"]))) as server:
        with pytest.raises(UserError, match=r"rows\.jsonl:7.*control tokens"):
            sampled(engine(server, server="transformers"), policy, [spelled])
        assert server.bodies == []
        with pytest.raises(UserError, match=r"<\|user\|>What is 0\?<\|end\|><\|assistant\|>"):
            sampled(engine(server, server="openai"), policy, GROUPS[:1])
        for options in ({"top_k": 5}, {"stop_token_ids": (7,)}):
            with pytest.raises(UserError, match=f"takes no sampling.{next(iter(options))}"):
                sampled(engine(server, server="openai"), policy, GROUPS[:1], **options)


def test_a_server_that_takes_ids_gets_control_tokens_as_plain_text(policy: Policy) -> None:
    spelled = Group("bad", "here", ({"role": "user", "content": "Say <|end|> now"},), ())
    with serving() as server:
        sampled(engine(server), policy, [spelled])
    assert server.bodies[0]["prompt"].count(openai_helpers.STOP) == 1


# Threads.


def test_jobs_are_read_as_threads_get_free() -> None:
    read = []

    def jobs() -> Iterable[int]:
        for number in range(50):
            read.append(number)
            yield number

    for done, (job, result) in enumerate(in_threads(lambda job: job * job, jobs(), 4), 1):
        assert result == job * job
        assert len(read) <= done + 4
    assert len(read) == 50


def test_an_interrupted_run_waits_for_nobody() -> None:
    hanging = threading.Event()
    results = in_threads(lambda job: job or hanging.wait(60), iter([1, 0, 0]), 2)
    assert next(results) == (1, 1)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 1
    assert all(t.daemon for t in threading.enumerate() if t.name == "sampling")
    hanging.set()
