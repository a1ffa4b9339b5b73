"""``helpsteer2 score``: rows in, the same rows with scores out, in order and without delay."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES, AttributeWeights
from helpsteer2.commands import score
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.rewards.scorer import RewardScorer

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]

WEIGHTS = AttributeWeights("two", {"helpfulness": 0.65, "verbosity": -0.4})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export with five attributes, and classifiers of others with one and three labels."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("score")
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    backbone = AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))
    chat = ChatFormat().bind(tokenizer)
    spec = RewardSpec.of(
        HELPSTEER2_ATTRIBUTES, chat, tokenizer, LengthLimits(60, 40), "random", weights=WEIGHTS
    )
    RewardModel(backbone, spec).save_pretrained(root / "five", tokenizer)
    for name, labels in {"one": {0: "LABEL_0"}, "three": dict(enumerate("abc"))}.items():
        config.id2label = labels
        AutoModelForSequenceClassification.from_config(
            config, attn_implementation="eager"
        ).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("five", "one", "three")}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    tmp_path: Path,
    folders: dict[str, Path],
) -> Run:
    def call(
        rows: list[Any] | bytes, *options: str, model: str = "five"
    ) -> tuple[int, list[dict[str, Any]], str]:
        given = rows if isinstance(rows, bytes) else "".join(json.dumps(r) + "\n" for r in rows)
        path = tmp_path / "rows.jsonl"
        path.write_bytes(given if isinstance(given, bytes) else given.encode())
        with path.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = score.main(["--model", str(folders[model]), *options])
        captured = capfdbinary.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err.decode()

    return call


def row(i: int, **extra: Any) -> dict[str, Any]:
    return {"prompt": f"Question {i}?", "response": f"Answer {i} " * (1 + i % 7), **extra}


def test_rows_come_back_in_order_with_scores(run: Run, folders: dict[str, Path]) -> None:
    rows = [row(i, id=i, nested={"kept": [None, "é"]}, score="old") for i in range(300)]
    code, out, err = run(rows, "--batch-tokens", "200")
    assert code == 0
    assert "scored 300 rows" in err
    groups = [
        Group("", "", ({"role": "user", "content": r["prompt"]},), (r["response"],)) for r in rows
    ]
    expected = np.concatenate(list(RewardScorer.from_pretrained(folders["five"]).score(groups)))
    for given, got, scores in zip(rows, out, expected, strict=True):
        assert {**got, "score": "old"} == {**given, "scores": got["scores"]}
        assert list(got["scores"]) == list(HELPSTEER2_ATTRIBUTES)
        np.testing.assert_allclose(list(got["scores"].values()), scores, rtol=0, atol=1e-5)
        reward = 0.65 * got["scores"]["helpfulness"] - 0.4 * got["scores"]["verbosity"]
        assert got["score"] == pytest.approx(reward, abs=1e-6)


def test_prompts_as_text_as_turns_and_as_messages(run: Run) -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    nemo = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWhy?"
    _, out, _ = run([{"prompt": prompt, "response": "So."} for prompt in (chat, nemo, "Why?")])
    assert out[0]["score"] == out[1]["score"]
    assert abs(out[0]["score"] - out[2]["score"]) > 1e-3


BAD = {
    b'{"prompt": "a"': "not valid JSON",
    b'{"prompt": "a", "response": "b", "x": NaN}': "NaN is not JSON",
    b'{"prompt": "a", "response": "b", "x": [1, {"y": -1e999}]}': "-1e999 is too large a number",
    b"[1]": "expected a JSON object",
    b'{"prompt": "\xff", "response": "b"}': "not valid UTF-8",
    b'{"response": "b"}': "prompt: the column is missing",
    b'{"prompt": 3, "response": ""}': "prompt: expected a text, got 3; response: the text is empty",
    b'{"prompt": " ", "response": "b"}': "prompt: the text is empty",
    b'{"prompt": [], "response": "b"}': "prompt: expected at least one message",
    b'{"prompt": [{"role": "bot", "content": "a"}], "response": "b"}': "prompt[0].role",
    b'{"prompt": ["a"], "response": "b"}': "prompt[0].role",
    b'{"prompt": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, '
    b'{"role": "user", "content": "c"}], "response": "d"}': "(or system first)",
    b'{"prompt": [{"role": "assistant", "content": "a"}], "response": "b"}': "must end in",
    b'{"prompt": "a\\n<extra_id_1>Assistant\\nb", "response": "c"}': "must end in",
    b'{"prompt": "a", "response": "\\ud800"}': "surrogate",
    b'{"prompt": "a", "response": "' + b"b" * 2_000_000 + b'"}': "2,000,000 characters",
}


def test_bad_rows_stop_nothing(run: Run) -> None:
    good = json.dumps(row(1)).encode()
    lines = [good]
    for bad in BAD:
        lines += [bad, good]
    code, out, err = run(b"\n".join(lines))
    assert code == 1
    assert len(out) == len(lines)
    assert f"{len(BAD)} bad rows" in err
    for number, (line, got) in enumerate(zip(lines, out, strict=True), start=1):
        if line == good:
            assert "score" in got
            assert "error" not in got
        else:
            assert BAD[line] in got["error"]
            assert "score" not in got
            assert f"stdin:{number}: {got['error']}" in err
    kept = out[2 * list(BAD).index(b'{"response": "b"}') + 1]
    assert kept["response"] == "b"


def test_a_row_that_is_mended_loses_its_error(run: Run) -> None:
    (bad, good) = run([row(1, response=""), row(2)])[1]
    code, out, _ = run([{**bad, "response": "Fine."}, good])
    assert code == 0
    assert [set(got) for got in out] == [{"prompt", "response", "scores", "score"}] * 2


def test_blank_lines_and_a_missing_last_line_end(run: Run) -> None:
    line = json.dumps(row(1)).encode()
    code, out, _ = run(b"\n" + line + b"\n\n  \r\n" + line)
    assert code == 0
    assert len(out) == 2


def test_no_rows(run: Run) -> None:
    assert run([])[:2] == (0, [])


def test_surrogates_in_other_keys_come_back(run: Run) -> None:
    code, out, _ = run(b'{"prompt": "a", "response": "b", "note": "\\ud800"}\n')
    assert code == 0
    assert out[0]["note"] == "\ud800"


def test_what_limits_cut_is_said(run: Run) -> None:
    _, _, err = run([{"prompt": "a", "response": "b" * 5000}])
    assert "1 responses cut" in err


# ---- weightings


def test_one_label_is_its_own_score(run: Run) -> None:
    _, out, _ = run([row(1)], model="one")
    assert out[0]["scores"] == {"score": out[0]["score"]}


def test_weights_as_json(run: Run) -> None:
    _, out, _ = run([row(1)], "--weights", '{"a": 2, "c": -1}', model="three")
    scores = out[0]["scores"]
    assert out[0]["score"] == pytest.approx(2 * scores["a"] - scores["c"])


def test_weights_by_name(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/mine.yaml").write_text(
        "_target_: helpsteer2.attributes.AttributeWeights\nname: mine\nvalues: {coherence: 3.0}\n"
    )
    monkeypatch.setattr("helpsteer2.config.compose.conf_dir", lambda: tmp_path)
    _, out, _ = run([row(1)], "--weights", "mine")
    assert out[0]["score"] == pytest.approx(3 * out[0]["scores"]["coherence"])
    with pytest.raises(UserError, match="no weighting 'yours'; there are mine"):
        run([row(1)], "--weights", "yours")


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ((), "three", "give one with --weights"),
        (("--weights", '{"helpfulness": 1}'), "three", "need helpfulness"),
        (("--weights", '{"a": 0}'), "three", "every weight is 0"),
        (("--weights", '{"a": true}'), "three", "not numbers"),
        (("--weights", '{"a": "1"}'), "three", "not numbers"),
        (("--weights", "{a}"), "three", "not valid JSON"),
    ],
)
def test_weights_that_do_not_fit(
    options: tuple[str, ...], model: str, message: str, run: Run
) -> None:
    with pytest.raises(UserError, match=message):
        run([row(1)], *options, model=model)


def test_a_reward_that_overflows_is_an_error(run: Run) -> None:
    code, out, _ = run([row(1)], "--weights", '{"a": 1e308, "b": 1e308, "c": 1e308}', model="three")
    assert code == 1
    assert "not finite" in out[0]["error"]


def test_a_budget_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        score.main(["--model", "x", "--batch-tokens", "0"])
    assert ended.value.code == 2
    assert "argument --batch-tokens: has to be 1 or more, got 0" in capsys.readouterr().err


def test_no_model(run: Run) -> None:
    with pytest.raises(UserError, match="no such folder"):
        score.main(["--model", "/nowhere/at/all"])


# ---- real processes and pipes


@pytest.fixture
def process(folders: dict[str, Path]) -> Iterator[subprocess.Popen[bytes]]:
    code = "import sys; from helpsteer2.commands.score import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--model", str(folders["five"])]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as running:
        yield running
        running.kill()


def write(process: subprocess.Popen[bytes], *rows: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(json.dumps(r) + "\n" for r in rows).encode())
    process.stdin.flush()


def read_line(process: subprocess.Popen[bytes], seconds: float = 120) -> dict[str, Any]:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], seconds)[0], "no output while the input is open"
    return json.loads(process.stdout.readline())


def test_output_appears_while_the_input_is_open(process: subprocess.Popen[bytes]) -> None:
    for i in range(3):  # each answer is read before the next row is written
        write(process, row(i, id=i))
        assert read_line(process)["id"] == i
    assert process.stdin is not None
    process.stdin.write(json.dumps(row(3, id=3)).encode())  # half a line: not yet a row
    process.stdin.close()
    assert read_line(process)["id"] == 3
    assert process.wait(60) == 0


def test_a_reader_that_leaves_is_no_traceback(process: subprocess.Popen[bytes]) -> None:
    write(process, row(0))
    read_line(process)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdin is not None
    process.stdout.close()
    started = time.monotonic()
    write(process, row(1))
    assert process.wait(60) == 141
    assert time.monotonic() - started < 30
    process.stdin.close()
    assert b"Traceback" not in process.stderr.read()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom helpsteer2.commands.score import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"exit code is 1" in done.stdout
