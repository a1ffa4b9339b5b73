"""The commands of the command line, one module each."""

from __future__ import annotations

from helpsteer2.config.command import ConfigCommand

CONFIG_COMMANDS = {
    command.name: command
    for command in (
        ConfigCommand(
            "train",
            "train a reward model or a policy (one Trainer.fit) and export it",
            "helpsteer2.commands.train.train",
            "train",
        ),
        ConfigCommand(
            "evaluate",
            "score a reward model on evaluators",
            "helpsteer2.commands.evaluate.evaluate",
            "evaluate",
        ),
        ConfigCommand(
            "expo",
            "extrapolate a reward model from two stages of its training",
            "helpsteer2.commands.expo.expo",
            "expo",
        ),
    )
}
"""Commands that take a configuration, by name."""

OTHER_COMMANDS = {
    "check": "compose and validate a configuration, run nothing",
    "score": "rows of prompt and response on standard input, scores on standard output",
    "data": "describe a data set, or validate data files",
    "quickstart": "train a policy and a reward model on made-up data, evaluate it",
    "world": "write made-up data in HelpSteer2's files, or rate answers by its oracle",
}
"""Commands with arguments of their own: name to summary."""
