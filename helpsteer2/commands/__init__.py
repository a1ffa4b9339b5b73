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
            "run evaluators on a reward model or a policy",
            "helpsteer2.commands.evaluate.evaluate",
            "evaluate",
        ),
        ConfigCommand(
            "expo",
            "extrapolate a reward model from two stages of its training",
            "helpsteer2.commands.expo.expo",
            "expo",
        ),
        ConfigCommand(
            "sample",
            "sample responses of a policy to the prompts of a data set",
            "helpsteer2.commands.sample.sample",
            "sample",
        ),
        ConfigCommand(
            "annotate",
            "score the responses of groups by a reward model, here or behind a server",
            "helpsteer2.commands.annotate.annotate",
            "annotate",
        ),
        ConfigCommand(
            "pairs",
            "make preference pairs of groups: the best response against the worst",
            "helpsteer2.commands.pairs.pairs",
            "pairs",
        ),
        ConfigCommand(
            "label",
            "give responses or prompts the attribute labels that a policy answers behind (SteerLM)",
            "helpsteer2.commands.label.label",
            "label",
        ),
        ConfigCommand(
            "weigh",
            "importance weights of a policy's samples, for training by SteerLM 2.0",
            "helpsteer2.commands.weigh.weigh",
            "weigh",
        ),
        ConfigCommand(
            "reference",
            "log-probabilities of a policy, for training that compares with it (module=dpo)",
            "helpsteer2.commands.reference.reference",
            "reference",
        ),
        ConfigCommand(
            "select",
            "choose the best of several exports by an evaluator",
            "helpsteer2.commands.select.select",
            "select",
        ),
        ConfigCommand(
            "pipeline",
            "run the stages of a recipe; those that are done are skipped",
            "helpsteer2.commands.pipeline.pipeline",
            "pipeline",
            {"--dry-run": "dry_run=true"},
        ),
    )
}
"""Commands that take a configuration, by name."""

OTHER_COMMANDS = {
    "check": "compose and validate a configuration, run nothing",
    "score": "rows of prompt and response on standard input, scores on standard output",
    "serve": "a reward model behind HTTP, for many clients at once",
    "data": "describe a data set, or validate data files",
    "quickstart": "a language model, a reward model and every method on made-up data, then a table",
    "world": "write made-up data in HelpSteer2's files, or rate answers by its oracle",
}
"""Commands with arguments of their own: name to summary."""
