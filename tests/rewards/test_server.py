"""A server gives the scores of the model, and no client can take more than its share."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from helpsteer2.errors import UserError
from helpsteer2.rewards.client import RewardClient
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.rewards.server import ServerLimits
from helpsteer2.rewards.wire import RequestLimits, request_body
from helpsteer2.rewards.worker import ScoringWorker
from tests.rewards.serving import BODY, JSON, HeldScorer, Running, ask, serving, wait_until_loaded
from tests.rewards.tiny import WEIGHTS, group, some_groups, tiny_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    limits = RequestLimits(max_body_bytes=20_000, max_rows=30, max_characters=5_000)
    with serving(folder, requests=limits, weights=WEIGHTS) as server:
        yield server


def test_scores_are_those_of_the_model(running: Running, folder: Path) -> None:
    wait_until_loaded(running.port)
    groups = some_groups(10)
    status, answer, _ = ask(running.port, body=request_body(groups))
    assert status == 200
    scorer = RewardScorer.from_pretrained(folder)
    expected = list(scorer.score(groups))
    for of_group, rewards, wanted in zip(
        answer["scores"], answer["rewards"], expected, strict=True
    ):
        np.testing.assert_allclose(of_group, wanted, rtol=0, atol=1e-6)
        wanted_rewards = WEIGHTS.reward(wanted, scorer.attribute_names)
        np.testing.assert_allclose(rewards, wanted_rewards, rtol=0, atol=1e-6)
    assert answer["attribute_names"] == list(scorer.attribute_names)
    assert answer["model_hash"] == scorer.model_hash


def test_what_the_server_says_of_itself(running: Running, folder: Path) -> None:
    wait_until_loaded(running.port)
    scorer = RewardScorer.from_pretrained(folder)
    _, info, _ = ask(running.port, "/info", None, "GET")
    assert info["model_hash"] == scorer.model_hash
    assert info["template_hash"] == scorer.chat.template_hash
    assert info["weights"] == {"name": "two", "values": dict(WEIGHTS.values)}
    assert info["limits"]["max_rows"] == 30
    assert ask(running.port, "/health", None, "GET")[:2] == (200, {"status": "ok"})
    _, description, _ = ask(running.port, "/openapi.json", None, "GET")
    schema = description["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"]
    assert schema["schema"]["required"] == ["groups"]


def test_concurrent_clients_share_passes(running: Running, folder: Path) -> None:
    wait_until_loaded(running.port)
    groups = some_groups(32)
    expected = list(RewardScorer.from_pretrained(folder).score(groups))
    scorer = running.scorer
    scorer.calls.clear()
    scorer.began.clear()
    scorer.may_go.clear()
    with ThreadPoolExecutor(33) as pool:
        first = pool.submit(ask, running.port)
        assert scorer.began.wait(30)
        answers = [pool.submit(ask, running.port, body=request_body([one])) for one in groups]
        time.sleep(1.0)  # all of them wait
        scorer.may_go.set()
        assert first.result()[0] == 200
        for answer, wanted in zip(answers, expected, strict=True):
            status, content, _ = answer.result()
            assert status == 200
            np.testing.assert_allclose(content["scores"][0], wanted, rtol=0, atol=1e-5)
    assert sum(scorer.calls) == 33
    assert len(scorer.calls) <= 4


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"path": "/nowhere"}, 404),
        ({"path": "/score", "method": "GET", "body": None}, 405),
        ({"body": b"{"}, 400),
        ({"body": b"[1]"}, 422),
        ({"body": request_body([group("Hi", "a\ud800")])}, 422),
        ({"body": request_body([group("Hi", "")])}, 422),
        ({"body": request_body([group("Hi", *map(str, range(31)))])}, 413),
        ({"body": request_body([group("Hi", "a" * 5_001)])}, 413),
        ({"body": b" " * 20_001}, 413),
        ({"body": b" " * 5_000_000}, 413),
        ({"Content-Type": "text/plain"}, 415),
    ],
)
def test_bad_requests(running: Running, request_: dict[str, Any], status: int) -> None:
    wait_until_loaded(running.port)
    got, answer, _ = ask(running.port, **request_)
    assert got == status
    assert len(json.dumps(answer)) < 500
    assert ask(running.port)[0] == 200


def test_a_bad_request_spoils_no_other_in_its_pass(running: Running) -> None:
    wait_until_loaded(running.port)
    running.scorer.began.clear()
    running.scorer.may_go.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, running.port)
        assert running.scorer.began.wait(30)
        bad = [pool.submit(ask, running.port, body=request_body([group("Hi", "")]))] * 2
        good = [pool.submit(ask, running.port) for _ in range(3)]
        time.sleep(0.3)
        running.scorer.may_go.set()
        assert [answer.result()[0] for answer in [first, *good]] == [200] * 4
        for answer in bad:
            status, content, _ = answer.result()
            assert status == 422
            assert content["problems"] == ["groups[0]: the response is empty"]


def test_a_full_queue_sends_clients_away(folder: Path) -> None:
    with serving(folder, limits=ServerLimits(max_waiting=2)) as running:
        wait_until_loaded(running.port)
        running.scorer.may_go.clear()
        with ThreadPoolExecutor(8) as pool:
            first = pool.submit(ask, running.port)
            assert running.scorer.began.wait(30)
            others = [pool.submit(ask, running.port) for _ in range(5)]
            deadline = time.monotonic() + 30
            while sum(answer.done() for answer in others) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert ask(running.port, "/health", None, "GET")[0] == 200
            running.scorer.may_go.set()
            answers = [answer.result() for answer in [first, *others]]
        assert sorted(status for status, _, _ in answers) == [200] * 3 + [503] * 3
        assert all(h["Retry-After"] == "1" for status, _, h in answers if status == 503)
        assert ask(running.port)[0] == 200


def test_a_model_being_loaded_is_alive_but_not_ready(folder: Path) -> None:
    loaded = threading.Event()

    def load(scorer: HeldScorer) -> RewardScorer:
        assert loaded.wait(60)
        return scorer

    with serving(folder, load=load) as running:
        assert ask(running.port, "/health", None, "GET")[0] == 200
        for path, method in (("/ready", "GET"), ("/info", "GET"), ("/score", "POST")):
            status, answer, headers = ask(running.port, path, method=method)
            assert status == 503
            assert "being loaded" in answer["error"]
            assert headers["Retry-After"]
        loaded.set()
        wait_until_loaded(running.port)
        assert ask(running.port)[0] == 200


def test_the_end_does_not_wait_for_a_model_that_is_being_loaded() -> None:
    loaded = threading.Event()

    def load() -> RewardScorer:
        loaded.wait(60)
        raise UserError("too late")

    worker = ScoringWorker(load, 1, 0.005)
    worker.start()
    begin = time.monotonic()
    assert not worker.close(30)
    assert time.monotonic() - begin < 5
    loaded.set()


def test_scores_that_are_not_finite_name_their_group_and_are_not_asked_for_again(
    folder: Path,
) -> None:
    with serving(folder) as running:
        wait_until_loaded(running.port)
        good, bad = group("Hi", "Hello"), group("Hi", "zzz", identity="seven")
        tokens = [running.scorer.encode(one).response_ids[0].tolist() for one in (good, bad)]
        (only,) = {*tokens[1]} - {*tokens[0]}
        running.scorer.model.backbone.get_input_embeddings().weight.data[only] = float("nan")
        status, answer, _ = ask(running.port, body=request_body([good, bad, good]))
        assert status == 422
        assert answer["problems"] == ["groups[1]: the scores are not finite"]
        running.scorer.calls.clear()
        with pytest.raises(UserError, match=r"refused .*: 422 .*groups\[0\]: .*group 'seven'"):
            list(RewardClient(running.url).score([bad]))
        assert len(running.scorer.calls) == 1


def test_a_failing_pass_is_told_and_the_next_is_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder) as running:
        wait_until_loaded(running.port)

        def fail(*_: object) -> Any:
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as patched:
            patched.setattr(running.scorer.model, "forward", fail)
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
            connection.request("POST", "/score", BODY, JSON)
            assert connection.getresponse().status == 500
        assert ask(running.port)[0] == 200
