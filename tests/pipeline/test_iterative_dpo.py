"""What iterations sample reaches their training whole, by the plan of their stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands import check as check_command
from helpsteer2.errors import ConfigError
from helpsteer2.pipeline.contents import Contents
from helpsteer2.pipeline.iterative_dpo import IterativeDPO
from helpsteer2.pipeline.plan import Commands, plan

GIVEN: dict[str, Any] = {"policy": "some/policy", "reward_model": "some/model", "iterations": 2}


def planned(folder: Path, **settings: Any) -> dict[str, Mapping[str, Any]]:
    """The whole configuration of every stage."""
    stages = IterativeDPO(**GIVEN, **settings).stages(1)
    commands = Commands(CONFIG_COMMANDS, ("-m", "helpsteer2"))
    planned = plan(stages, commands, folder / "stages", Contents(folder / "memory"))
    return {stage.name: stage.depends_on for stage in planned}


@pytest.mark.parametrize("sample", [{}, {"max_prompt_tokens": 100}])
def test_no_prompt_is_sampled_that_training_would_cut(
    tmp_path: Path, sample: dict[str, Any]
) -> None:
    stages = planned(tmp_path, max_prompt_tokens=512, sample=sample)
    for number in (1, 2):
        sampled = stages[f"sample_{number}"]["max_prompt_tokens"]
        assert sampled == sample.get("max_prompt_tokens", 512)
        for stage in (f"reference_{number}", f"dpo_{number}"):
            assert sampled <= stages[stage]["lengths.max_prompt_tokens"]


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ({"sampling": {"max_tokens": 257}}, r"sample\.sampling\.max_tokens: 257 .*_response_.*256"),
        ({"max_prompt_tokens": 513}, r"sample\.max_prompt_tokens: 513 .*_prompt_.*512"),
    ],
)
def test_samples_that_training_would_cut_are_refused(
    tmp_path: Path, sample: dict[str, Any], told: str
) -> None:
    limits = {"max_prompt_tokens": 512, "max_response_tokens": 256}
    with pytest.raises(ConfigError, match=told):
        planned(tmp_path, **limits, sample=sample)
    fitting = {"max_prompt_tokens": 512, "sampling": {"max_tokens": 256}}
    assert planned(tmp_path, **limits, sample=fitting)


def test_the_check_refuses_them_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["pipeline", "pipeline=iterative_dpo", "pipeline.policy=a/b"]
    wanted += ["pipeline.reward_model=a/c", "pipeline.max_response_tokens=512"]
    with pytest.raises(ConfigError, match=r"sample\.sampling\.max_tokens: 1024"):
        check_command.main(wanted)
    assert check_command.main([*wanted, "pipeline.sample.sampling.max_tokens=512"]) == 0
