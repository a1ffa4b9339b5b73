"""``helpsteer2 sample steering=…``: what a policy is asked for, said, recorded and refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoConfig, AutoModelForCausalLM

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, Message, read_all
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.generation.local import LocalEngine
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec

NAMES = ("helpfulness", "complexity", "verbosity")
QUESTIONS = ("Why?", "To be or not to be, what do you say?", "Be?")
STEERING = "steering={helpfulness: 3, verbosity: 1}"

Run = Callable[..., list[Group]]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights, said to be trained with labels and without."""
    root = tmp_path_factory.mktemp("policies")
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation_name("sdpa")
    )
    chat = ChatFormat().bind(tokenizer)
    for name, attributes in (("labelled", NAMES), ("plain", ())):
        spec = PolicySpec(chat, LengthLimits(400, 100), "random", label_attributes=attributes)
        Policy(causal_lm, spec).save_pretrained(root / name, tokenizer)
    return {name: root / name for name in ("labelled", "plain")}


@pytest.fixture
def run(policies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on prompts with these labels, and read what it writes."""
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])

    def call(
        *overrides: str, policy: str = "labelled", labels: tuple[str | None, ...] = (None,) * 3
    ) -> list[Group]:
        prompts = [
            Group(
                f"q{i}", f"s:{i}", (Message(role="user", content=question),), (),
                label=None if label is None else AttributeLabel.parse(label),
            )
            for i, (question, label) in enumerate(zip(QUESTIONS, labels, strict=True))
        ]  # fmt: skip
        write_groups(tmp_path / "prompts.jsonl", prompts, ())
        given = [
            f"run_dir={tmp_path / 'run'}", f"model={policies[policy]}", "data=groups",
            f"data.path={tmp_path / 'prompts.jsonl'}", "sampling.n=2", "sampling.max_tokens=12",
        ]  # fmt: skip
        try:
            assert launch(CONFIG_COMMANDS["sample"], [*given, *overrides]) == 0
        finally:
            GlobalHydra.instance().clear()
        return list(read_all(GroupFiles(str(tmp_path / "run/groups.jsonl")), "train"))

    return call


def recorded(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "run/result.json").read_text())
    return result


def texts(groups: list[Group]) -> list[str | None]:
    return [None if group.label is None else group.label.text for group in groups]


def test_one_label_for_all_is_completed_said_and_recorded(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = run(STEERING)
    # Complexity is not asked for: the paper's level.
    expected = "helpfulness:3,complexity:2,verbosity:1"
    assert texts(groups) == [expected] * 3
    assert f"answers are asked to be {expected}" in capsys.readouterr().out
    assert recorded(tmp_path)["steering"] == {"helpfulness": 3, "verbosity": 1}
    assert recorded(tmp_path)["config"]["steering"] == {"helpfulness": 3, "verbosity": 1}


def test_samples_are_those_behind_the_label_wherever_it_comes_from(
    run: Run, tmp_path: Path
) -> None:
    label = "helpfulness:3,complexity:2,verbosity:1"
    given = run(labels=(label, "helpfulness:0,complexity:0,verbosity:0", label))
    assert recorded(tmp_path)["steering"] is None
    steered = run(STEERING, f"run_dir={tmp_path / 'other'}")
    steered = list(read_all(GroupFiles(str(tmp_path / "other/groups.jsonl")), "train"))
    ids = [[group.response_ids for group in groups] for groups in (given, steered)]
    assert ids[0][0] == ids[1][0]
    assert ids[0][1] != ids[1][1]  # asked for something else
    assert ids[0][2] == ids[1][2]


def test_labels_of_prompts_give_way_to_steering(run: Run) -> None:
    labels = ("helpfulness:0", "verbosity:4", None)
    assert texts(run(STEERING, labels=labels)) == ["helpfulness:3,complexity:2,verbosity:1"] * 3


def test_a_policy_without_labels_answers_as_before(run: Run, tmp_path: Path) -> None:
    groups = run(policy="plain")
    assert texts(groups) == [None] * 3
    assert recorded(tmp_path)["steering"] is None


def test_limits_count_prompts_without_their_labels(run: Run, policies: dict[str, Path]) -> None:
    chat = LocalEngine().open(str(policies["labelled"]), "float32", "sdpa").chat
    longest = max(len(chat.prompt_ids([Message(role="user", content=q)])) for q in QUESTIONS)
    assert len(run(STEERING, f"max_prompt_tokens={longest}")) == 3


@pytest.mark.parametrize(
    ("steering", "policy", "labels", "told"),
    [
        ("{helpfulness: 5}", "labelled", None, r"steering: .*is 5, must be a whole number 0 to 4"),
        ("{helpfulness: 2.5}", "labelled", None, r"steering.helpfulness.*2\.5"),
        ("{helpfulness: -1}", "labelled", None, r"helpfulness is -1, must be a whole number"),
        ("{helpfulness: 9, verbosity: 7}", "labelled", None, r"helpfulness is 9.*verbosity is 7"),
        ("{}", "labelled", None, r"steering: .*names no attribute"),
        ("{humour: 4}", "labelled", None, r"not trained with humour: its labels are of helpful"),
        ("{helpfulness: 4}", "plain", None, r"trained without labels.* for helpfulness:4"),
        ("null", "labelled", None, r"s:0: .*trained to answer behind a label .* set steering="),
        ("null", "labelled", ("verbosity:1", None, "verbosity:1"), r"s:1: .*and there is none"),
        ("null", "plain", (None, "verbosity:1", None), r"s:1: .*trained without labels"),
        ("null", "labelled", ("verbosity:1", None, "wit:1"), r"s:1: "),
        ("null", "labelled", ("verbosity:1", "wit:1", None), r"not trained with wit"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(
    run: Run, tmp_path: Path, steering: str, policy: str, labels: Any, told: str
) -> None:
    given = {} if labels is None else {"labels": labels}
    with pytest.raises(UserError, match=told):
        run(f"steering={steering}", policy=policy, **given)
    assert not (tmp_path / "run/result.json").exists()
    assert not (tmp_path / "run/groups.jsonl").exists()


def test_a_finished_run_with_other_steering_is_refused(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = run(STEERING)
    monkeypatch.setattr(LocalEngine, "open", lambda *_: pytest.fail("the policy was loaded"))
    assert run("steering={verbosity: 1, helpfulness: 3}") == made  # the same, in another order
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other settings.*steering\.verbosity: 1 → 2"):
        run("steering={helpfulness: 3, verbosity: 2}")
    with pytest.raises(UserError, match=r"other settings.*steering"):
        run()
