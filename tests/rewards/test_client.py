"""The client scores as the model does, bears a server's bad days, and says what it cannot bear."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError
from helpsteer2.rewards import client as client_module
from helpsteer2.rewards.client import RewardClient
from helpsteer2.rewards.scorer import RewardScorer
from tests.rewards.tiny import group, some_groups, tiny_reward_model

INFO = {
    "model_hash": "m",
    "attribute_names": ["a", "b"],
    "limits": {"max_body_bytes": 1000, "max_rows": 10, "max_characters": 100},
}
GROUPS = [group("Hi", "x", "yy"), group("Ho", "zzz", identity="second")]


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "LONGEST_DELAY_SECONDS", 0.05)


# ---- a real server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("client"))


@pytest.mark.parametrize(("concurrency", "rows"), [(1, 1), (8, 16), (3, 1000)])
def test_scores_over_http_are_those_in_process(folder: Path, concurrency: int, rows: int) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from tests.rewards.serving import RequestLimits, serving

    groups = some_groups(40)
    scorer = RewardScorer.from_pretrained(folder)
    limits = RequestLimits(max_rows=20, max_body_bytes=2_000, max_messages=2)
    with serving(folder, requests=limits) as running:
        client = RewardClient(running.url + "/", concurrency=concurrency, rows_per_request=rows)
        assert client.attribute_names == scorer.attribute_names
        assert client.model_hash == scorer.model_hash
        for scores, wanted in zip(client.score(iter(groups)), scorer.score(groups), strict=True):
            assert scores.dtype == np.float32
            np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)
        assert list(client.score([])) == []
        with pytest.raises(UserError, match=r"413 .*21 responses.*\(group 'big', here\)"):
            list(client.score([group("Hi", *map(str, range(21)), identity="big")]))
        with pytest.raises(UserError, match="the response is empty"):
            list(client.score([group("Hi", "")]))


# ---- a server that misbehaves


class Scripted:
    """Answers ``/info``, and ``/score`` by a script: a function of each request, in turn."""

    def __init__(self) -> None:
        self.script: list[Callable[[Any], Any]] = []
        self.requests: list[Any] = []
        self.info: Any = INFO
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, outer.info)

            def do_POST(self) -> None:
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(self.body)
                (outer.script.pop(0) if outer.script else right)(self)

            def answer(self, status: int, content: Any, **headers: str) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def scores_of(body: Any) -> list[list[list[float]]]:
    return [[[len(text), 1.0] for text in g["responses"]] for g in body["groups"]]


def right(handler: Any) -> None:
    scores = scores_of(handler.body)
    handler.answer(200, {"model_hash": "m", "attribute_names": ["a", "b"], "scores": scores})


def says(status: int, content: Any = b"", **headers: str) -> Callable[[Any], None]:
    return lambda handler: handler.answer(status, content, **headers)


def hangs_up(handler: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def breaks_off(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores"')
    hangs_up(handler)


def is_silent(handler: Any) -> None:
    time.sleep(1.0)


def is_late(handler: Any) -> None:
    time.sleep(1.0)
    right(handler)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    made = Scripted()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def scored(scripted: Scripted, groups: list[Group] = GROUPS, **settings: Any) -> list[Any]:
    client = RewardClient(scripted.url, **{"concurrency": 1, "attempts": 4, **settings})
    return [scores.tolist() for scores in client.score(groups)]


EXPECTED = [[[1.0, 1.0], [2.0, 1.0]], [[3.0, 1.0]]]


@pytest.mark.parametrize(
    "trouble",
    [
        [says(429, b"slow down", Retry_After="0")],
        [says(425)],
        [says(500, b"Internal Server Error")],
        [says(503, {"error": "the model is being loaded", "problems": []}, Retry_After="1")],
        [hangs_up],
        [breaks_off],
        [says(502), hangs_up, says(429)],
    ],
)
def test_trouble_that_passes(scripted: Scripted, trouble: list[Callable[[Any], None]]) -> None:
    scripted.script = trouble
    assert scored(scripted) == EXPECTED
    assert len(scripted.requests) >= 2


def test_a_slow_answer_is_asked_for_again(scripted: Scripted) -> None:
    scripted.script = [is_silent]
    assert scored(scripted, timeout_seconds=0.3) == EXPECTED


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (says(429), "failed 4 times, the last time: 429 Too Many Requests"),
        (says(500, {"error": "no memory", "problems": []}), "failed 4 times.* 500 .*: no memory"),
        (hangs_up, "no answer in 4 attempts"),
    ],
)
def test_trouble_that_stays(
    scripted: Scripted, trouble: Callable[[Any], None], message: str
) -> None:
    scripted.script = [trouble] * 8
    with pytest.raises(UserError, match=message) as error:
        scored(scripted)
    assert scripted.url in str(error.value)
    assert "'id', here and 1 more" in str(error.value)
    assert ("running there" in str(error.value)) == (trouble is hangs_up)


def answered(**changes: Any) -> Callable[[Any], None]:
    good = {"model_hash": "m", "attribute_names": ["a", "b"], "scores": EXPECTED}
    return says(200, {**good, **changes})


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        (says(200, b"<html>"), "no JSON"),
        (says(200, []), "none of `helpsteer2 serve`"),
        (says(200, {"scores": EXPECTED}), "none of `helpsteer2 serve`"),
        (answered(scores=EXPECTED[:1]), "does not fit its request"),
        (answered(scores=[[[1.0, 1.0]], [[3.0, 1.0]]]), "does not fit its request"),
        (answered(scores=[[["x", 1.0], [2.0, 1.0]], [[3.0, 1.0]]]), "none of"),
        (answered(scores=[[[1.0], [2.0, 1.0]], [[3.0, 1.0]]]), "none of"),
        (answered(attribute_names=["b", "a"]), "other shapes or attributes"),
        (answered(model_hash="other"), "another one than at the beginning"),
        (says(422, {"error": "no", "problems": ["groups[0]: bad"]}), "422 .*: no; groups.0.: bad"),
        (says(404, {"detail": "Not Found"}), "404 Not Found"),
    ],
)
def test_nonsense_and_refusals_are_not_asked_for_again(
    scripted: Scripted, nonsense: Callable[[Any], None], message: str
) -> None:
    scripted.script = [nonsense]
    with pytest.raises(UserError, match=message):
        scored(scripted)
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("info", [{}, [], {**INFO, "limits": {"x": 1}}, {**INFO, "model_hash": 3}])
def test_a_server_of_something_else(scripted: Scripted, info: Any) -> None:
    scripted.info = info
    with pytest.raises(UserError, match=r"/info is no answer of `helpsteer2 serve`"):
        scored(scripted)


def test_nobody_there() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"no answer in 3 attempts.*refused.*serve` running there"):
        list(RewardClient(f"http://127.0.0.1:{port}", attempts=3).score(GROUPS))


def test_a_host_that_accepts_no_connection_is_given_up_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "CONNECT_SECONDS", 0.2)
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(5):  # until nobody is let in any more
            waiting = stack.enter_context(closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"no connection in 0\.2 seconds.*running there"):
            list(RewardClient(url, attempts=3).score(GROUPS))
        assert time.monotonic() - begin < 10


def test_an_answer_may_take_longer_than_a_connection(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CONNECT_SECONDS", 0.3)
    scripted.script = [is_late, is_late]
    assert scored(scripted, rows_per_request=1, attempts=1) == EXPECTED


def test_requests_stay_within_what_the_server_takes(scripted: Scripted) -> None:
    groups = [group("Hi", "x" * 90, "y" * 90) for _ in range(30)]
    scored(scripted, groups, rows_per_request=100)
    assert all(len(json.dumps(body)) <= 1000 for body in scripted.requests)
    assert sum(len(body["groups"]) for body in scripted.requests) == 30
    assert max(len(body["groups"]) for body in scripted.requests) > 1


def test_many_requests_come_back_in_order(scripted: Scripted) -> None:
    groups = [group("Hi", "x" * i) for i in range(1, 60)]
    got = scored(scripted, groups, concurrency=6, rows_per_request=2)
    assert [scores[0][0] for scores in got] == list(range(1, 60))


def test_what_is_read_is_bounded(scripted: Scripted) -> None:
    n_read = 0

    def stream() -> Iterator[Group]:
        nonlocal n_read
        for _ in range(1000):
            n_read += 1
            yield group("Hi", "x")

    scores = RewardClient(scripted.url, concurrency=2, rows_per_request=3).score(stream())
    next(scores)
    assert n_read < 20
    scores.close()


def test_who_stops_early_does_not_wait_for_answers(scripted: Scripted) -> None:
    def answers_the_first(handler: Any) -> None:
        (right if handler.body["groups"][0]["responses"] == ["x0"] else is_silent)(handler)

    scripted.script = [answers_the_first] * 100
    many = [group("Hi", f"x{i}") for i in range(100)]
    scores = RewardClient(scripted.url, concurrency=4, rows_per_request=1).score(many)
    next(scores)
    begin = time.monotonic()
    scores.close()
    assert time.monotonic() - begin < 0.8


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "expected http"),
        ("ftp://x", "expected http"),
        ("http://", "expected http"),
        ("http://x:99999", "Port out of range"),
        ("http://me:secret@x", "name or password"),
    ],
)
def test_urls_that_make_no_sense(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        RewardClient(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["concurrency", "rows_per_request", "timeout_seconds", "attempts"])
def test_numbers_that_make_no_sense(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has to be above 0"):
        RewardClient("http://x", **{name: 0})
