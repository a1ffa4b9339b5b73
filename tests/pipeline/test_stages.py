from __future__ import annotations

from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from helpsteer2.commands.resume import CHANGES_THE_RESULT, MAY_CHANGE
from helpsteer2.pipeline.fingerprint import NO_EFFECT
from helpsteer2.pipeline.process import last_lines
from helpsteer2.pipeline.stages import Output, Stage, check_order, override_text, overrides_of

VALUES: list[Any] = [
    None, True, False, 0, -3, 1e-7, 2.5, "", "word", "a b", "1e-6", "null", "True", "inf", "12",
    "it's", "back\\slash", "ends with \\", "quoted \\'", "a,b=c", "[x]", "{y}", "/tmp/a b/c's",
    "stage:first-0123456789ab/export", "#1", "a: b", [1, "x y", None], ["[", "]"], [],
    {"helpfulness": 0.65, "verbosity": -0.4}, {"nested": {"list": [1, "two words"]}},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_hydra_reads_an_override_as_it_was_meant(value: Any) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override_text("a.b", value)])
    assert parsed.key_or_group == "a.b"
    read = parsed.value()

    def bare(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: bare(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [bare(inner) for inner in item]
        return item.text if hasattr(item, "with_quotes") else item

    assert bare(read) == value
    assert not parsed.is_sweep_override()


def test_settings_become_overrides() -> None:
    settings = yaml.safe_load("""
        choose: {experiment: reward/world, data: world}
        data: {groups: 100}
        backbone: {path: "@sft/export"}
        model: ["@a/export", plain]
        empty: {}
    """)
    assert overrides_of(settings) == {
        "experiment": "reward/world",
        "data": "world",
        "data.groups": 100,
        "backbone.path": Output("sft", "export"),
        "model": [Output("a", "export"), "plain"],
        "empty": {},
    }
    assert overrides_of({}) == {}


def test_mistakes_of_the_order_are_told_together() -> None:
    stages = [
        Stage("a", "train", {"x": Output("b", "export")}),
        Stage("b", "tarin", {"x": [Output("a", "checkpoints/last.ckpt")]}),
        Stage("b", "train", {}),
    ]
    assert check_order(stages, {"train": object()}) == [
        "stage a: no earlier stage is named 'b'",
        "stage b: there is no command 'tarin'",
        "stage b: 'checkpoints/last.ckpt' is no output of a stage: export, exports, groups.jsonl, "
        "reference, statistics.json, train.jsonl",
        "two stages are named 'b'",
    ]


def test_what_a_resumed_training_may_change_does_not_tell_stages_apart() -> None:
    # But for what decides what comes out, and inputs, of which the content counts.
    inputs = {"reference", "reward_model", "rollouts.rewarder"}
    assert set(MAY_CHANGE) - set(CHANGES_THE_RESULT) - inputs <= set(NO_EFFECT)
    assert not set(CHANGES_THE_RESULT) & set(NO_EFFECT)


def test_last_lines_are_those_that_a_terminal_shows(tmp_path: Any) -> None:
    log = tmp_path / "stage.log"
    log.write_bytes(
        b"\n".join(b"line %d" % i for i in range(5000))
        + b"\n\n\x1b[2K10 %\r\x1b[31m 20 %\x1b[0m\r100 %\r\n  the end \xff\n"
    )
    assert last_lines(log, 3).splitlines() == ["line 4999", "100 %", "  the end \ufffd"]
    assert last_lines(tmp_path / "missing", 3) == ""
