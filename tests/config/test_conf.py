"""The files of ``conf``: every one composes, validates, and says nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.config.annotations import TARGET
from helpsteer2.config.checked import check
from helpsteer2.config.compose import conf_dir
from helpsteer2.config.signatures import read_signature

CONF = conf_dir()
GROUPS = ("backbone", "data", "logger", "module", "trainer", "weights")
NEEDS = {
    "backbone=local": ["backbone.path=some/model"],
    "data=local": ["data.path=some/folder"],
    "data=groups": ["data.path=some/folder"],
    "experiment=reward/local_slice": ["data.path=some/folder"],
}
"""What has to be given with a choice that leaves something open."""


def options(group: str) -> list[str]:
    folder = CONF / group
    files = folder.rglob("*.yaml")
    return sorted(f"{group}={file.relative_to(folder).with_suffix('')}" for file in files)


@pytest.mark.parametrize("choice", options("experiment"))
def test_every_experiment_composes_and_validates(choice: str) -> None:
    (job,) = check(CONFIG_COMMANDS["train"], [choice, *NEEDS.get(choice, [])]).jobs
    assert job["run_dir"].startswith("outputs/train/")


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_composes_and_validates(group: str) -> None:
    for choice in options(group):
        check(CONFIG_COMMANDS["train"], [choice, *NEEDS.get(choice, [])])


def test_evaluate_takes_every_evaluator_and_weighting() -> None:
    names = [choice.partition("=")[2] for choice in options("evaluator")]
    (job,) = check(
        CONFIG_COMMANDS["evaluate"], ["model=some/export", f"evaluator=[{','.join(names)}]"]
    ).jobs
    assert sorted(job["evaluators"]) == names
    weightings = {option.partition("=")[2] for option in options("weights")}
    assert set(job["weightings"]) == weightings
    assert all(job[f"weightings.{name}.name"] == name for name in weightings)


def test_the_paper_recipe_has_the_paper_values() -> None:
    (job,) = check(CONFIG_COMMANDS["train"], ["experiment=reward/helpsteer2_llama3_70b"]).jobs
    # arXiv 2406.08673, appendix H: 128 rows a step are 64 pairs, for two passes.
    assert job["batching.global_batch"] == 64
    assert job["batching.epochs"] == 2
    assert 2 * 10_162 // job["batching.global_batch"] == 317
    assert job["module.optimizer.lr"] == 2e-6
    assert job["module.optimizer.betas"] == [0.9, 0.98]
    assert job["lengths.max_prompt_tokens"] + job["lengths.max_response_tokens"] == 4096
    assert job["backbone.path"] == job["backbone.tokenizer.path"] == "meta-llama/Meta-Llama-3-70B"
    assert job["weights.values"] == {
        "helpfulness": 0.65,
        "correctness": 0.80,
        "coherence": 0.45,
        "complexity": 0.55,
        "verbosity": -0.40,
    }


def test_every_value_of_the_paper_recipe_names_its_source() -> None:
    text = (CONF / "experiment/reward/helpsteer2_llama3_70b.yaml").read_text(encoding="utf-8")
    body = text[text.index("batching:") :].splitlines()
    source = ""
    for line in body:
        source = line if line.strip().startswith("#") else source
        is_value = ":" in line and not line.rstrip().endswith(":")
        if is_value and not line.strip().startswith("#"):
            has_source = "HS2" in line or "NeMo" in line
            assert has_source or ("NeMo" in source and "_tokens" in line), line


def target_nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if TARGET in node:
            yield node
        for value in node.values():
            yield from target_nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from target_nodes(value)


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(CONF.rglob("*.yaml")) if "experiment" not in file.parts],
    ids=lambda file: str(file.relative_to(CONF)),
)
def test_no_key_restates_a_default(file: Path) -> None:
    # An experiment may: it pins the values of its source.
    for node in target_nodes(yaml.safe_load(file.read_text(encoding="utf-8"))):
        signature = read_signature(node[TARGET])
        assert signature is not None, f"{node[TARGET]} cannot be read"
        restated = {
            key: value
            for key, value in node.items()
            if key in signature.parameters
            and type(value) is type(signature.parameters[key].default)
            and value == signature.parameters[key].default
        }
        assert not restated
