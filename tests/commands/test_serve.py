"""``helpsteer2 serve`` as a process: many clients, slow clients, and an end that loses nothing."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from helpsteer2.commands import serve
from helpsteer2.errors import UserError
from helpsteer2.rewards.client import RewardClient
from helpsteer2.rewards.scorer import RewardScorer
from helpsteer2.rewards.wire import request_body
from tests.rewards.tiny import group, some_groups, tiny_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("serve"), max_response_tokens=400)


@contextmanager
def started(
    folder: Path, *options: str, python: tuple[str, ...] = ("-m", "helpsteer2")
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its url once it listens."""
    command = [sys.executable, *python, "serve", "--model", str(folder), "--port", "0"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, line_of(process.stdout, "listening on ").split(",")[0]
        finally:
            process.kill()


def line_of(stream: IO[str] | None, beginning: str) -> str:
    assert stream is not None
    for line in stream:
        if line.startswith(beginning):
            return line.removeprefix(beginning).strip()
    raise AssertionError(f"no line begins with {beginning!r}")


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)


def post(connection: http.client.HTTPConnection, body: bytes) -> None:
    connection.request("POST", "/score", body, {"Content-Type": "application/json"})


@pytest.mark.slow
def test_32_clients_among_a_thousand_slow_ones(folder: Path) -> None:
    groups = some_groups(96)
    expected = list(RewardScorer.from_pretrained(folder).score(groups))
    with started(folder) as (process, url):
        line_of(process.stdout, "ready: ")
        port = int(url.rpartition(":")[2])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(1000)]
        for i, one in enumerate(slow):
            head = "POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            one.sendall((head + "Content-Length: 999\r\n\r\n{" if i % 2 else head).encode())
        with ThreadPoolExecutor(32) as pool:
            clients = [RewardClient(url, concurrency=1, rows_per_request=1) for _ in range(32)]
            parts = [groups[i::32] for i in range(32)]
            done = pool.map(lambda client, part: list(client.score(part)), clients, parts)
            for i, scores in enumerate(done):
                for of_group, wanted in zip(scores, expected[i::32], strict=True):
                    np.testing.assert_allclose(of_group, wanted, rtol=0, atol=1e-5)
        for one in slow:
            one.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_in_flight_is_answered_before_the_end(
    folder: Path, number: signal.Signals, code: int
) -> None:
    body = request_body([group("Hi", *(f"{i} " * 200 for i in range(200)))])
    with started(folder) as (process, url):
        line_of(process.stdout, "ready: ")
        connection, idle = connect(url), connect(url)
        idle.connect()
        post(connection, body)
        time.sleep(0.3)
        begin = time.monotonic()
        process.send_signal(number)
        response = connection.getresponse()
        assert response.status == 200
        assert np.shape(json.loads(response.read())["scores"]) == (1, 200, 5)
        assert process.wait(180) == code
        assert time.monotonic() - begin < 60
        with pytest.raises(ConnectionRefusedError):
            connect(url).connect()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


LOADS = """
import sys
from helpsteer2 import __main__
from helpsteer2.commands import serve

def load(*_):
    import torch
    weight = torch.ones(200, 200)
    print("busy", flush=True)
    while True:
        weight = (weight @ weight).clamp(0, 1)

serve._load = load
sys.exit(__main__.main())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_end_comes_at_once_while_the_model_is_loaded(
    folder: Path, number: signal.Signals, code: int
) -> None:
    with started(folder, python=("-c", LOADS)) as (process, url):
        line_of(process.stdout, "busy")
        connection = connect(url)
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(180) == code
        assert time.monotonic() - begin < 30
        assert process.stderr is not None
        assert process.stderr.read() == ("helpsteer2: interrupted\n" if code == 130 else "")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with started(tmp_path) as (process, _):
        assert process.wait(180) == 1
        assert process.stderr is not None
        assert str(tmp_path) in process.stderr.read()


def test_an_address_that_is_taken_is_told_before_anything_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1:{port} \(Address"):
            serve._listen("127.0.0.1", port)


def test_an_open_address_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    serve._listen("0.0.0.0", 0).close()
    assert "anybody who reaches 0.0.0.0" in capsys.readouterr().err
    with serve._listen("localhost", 0) as listener:
        assert serve._url(listener).startswith("http://")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--port", "70000"], ["--max-rows", "0"], ["--batch-tokens", "-1"], ["--max-waiting", "x"]],
)
def test_options_that_make_no_sense(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve._options(["--model", "x", *options])
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_without_fastapi_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "helpsteer2.rewards.server", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match=r"fastapi is not installed: pip .*helpsteer2\[serve\]"):
            serve.main(["--model", "x", "--port", "0"])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_is_in_the_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "helpsteer2", "serve", "--help"],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0
    assert "POST /score" in done.stdout
