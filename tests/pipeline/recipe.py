"""A recipe of tiny commands; ``python -m tests.pipeline.recipe`` is a command line with both."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpsteer2.commands.pipeline as pipeline_command
from helpsteer2.__main__ import main
from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.config.command import ConfigCommand
from helpsteer2.config.compose import conf_dir
from helpsteer2.pipeline.iterative_dpo import IterativeDPO
from helpsteer2.pipeline.stages import Output, Stage, overrides_of
from tests.pipeline import tiny

COMMANDS = {
    name: ConfigCommand(name, "for tests", f"tests.pipeline.tiny.{name}", name)
    for name in tiny.KEYS
}

CONF = """
_target_: tests.pipeline.recipe.Recipe
data: ???
"""


@dataclass(frozen=True)
class Recipe:
    """A model is learned, another from it, and that one is weighed."""

    data: str
    weights: dict[str, float] = field(default_factory=lambda: {"helpfulness": 1.0})
    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    third: dict[str, Any] = field(default_factory=dict)

    def stages(self, seed: int) -> Sequence[Stage]:
        """Three stages, each from the one before."""
        model = Output("second", "groups.jsonl")
        return (
            Stage("first", "learn", {**overrides_of(self.first), "data": self.data, "seed": seed}),
            Stage(
                "second", "learn", {**overrides_of(self.second), "data": Output("first", "export")}
            ),
            Stage(
                "third",
                "weigh",
                {**overrides_of(self.third), "model": model, "weights": self.weights},
            ),
        )


@dataclass(frozen=True)
class Apart:
    """Two models of which one never comes out the same, and what is weighed of both."""

    data: str
    is_read_again: bool = False

    def stages(self, seed: int) -> Sequence[Stage]:
        """Three stages, or four: the last one reads the second model again."""
        noisy = Output("noisy", "export")
        again = Stage("again", "learn", {"data": noisy})
        return (
            Stage("steady", "learn", {"data": self.data, "seed": seed}),
            Stage("noisy", "learn", {"data": self.data, "behaviour": "noisy"}),
            Stage("both", "weigh", {
                "model": Output("steady", "groups.jsonl"), "weights": {"a": 1.0}, "extra": [noisy],
            }),
            *([again] if self.is_read_again else []),
        )  # fmt: skip


@dataclass(frozen=True)
class UpToScoredPairs(IterativeDPO):
    """Iterative DPO without what follows the scored pairs: the same kinds of stages once more."""

    def stages(self, seed: int) -> Sequence[Stage]:
        """All up to ``pairs_1``."""
        stages = list(super().stages(seed))
        return stages[: [stage.name for stage in stages].index("pairs_1") + 1]


def write_conf(folder: Path) -> Path:
    """Write the YAML files of the commands; their folder."""
    conf = folder / "conf"
    (conf / "pipeline").mkdir(parents=True)
    for name, keys in tiny.KEYS.items():
        (conf / f"{name}.yaml").write_text(tiny.ROOT + keys)
    for name in ("pipeline.yaml", "hydra_settings.yaml"):
        (conf / name).write_text((conf_dir() / name).read_text())
    (conf / "pipeline" / "tiny.yaml").write_text(CONF)
    return conf


if __name__ == "__main__":
    CONFIG_COMMANDS.update(COMMANDS)
    pipeline_command.PROGRAM = tiny.PROGRAM
    sys.exit(main())
