"""What must be the same, and what may differ, when a run goes on in its folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from helpsteer2.callbacks.checkpoints import LAST, read_checkpoint
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.errors import UserError
from helpsteer2.records import differing_keys, is_among

logger = logging.getLogger(__name__)

CONFIG, INPUTS = "config.yaml", "inputs.yaml"

MAY_CHANGE = (
    "run_dir", "cache_dir", "experiment", "logger", "optimized_metric", "reference", "weights",
    "batching.epochs", "batching.max_steps", "batching.tokens_per_microbatch",
    "backbone.gradient_checkpointing", "schedule.checkpoint_every", "schedule.export",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "rollouts.offload", "rollouts.engine.cache_tokens", "rollouts.engine.max_rows",
    "rollouts.engine.prefill_tokens", "rollouts.rewarder", "reward_model",
)  # fmt: skip
"""Keys that may differ when a run is resumed: they decide where it runs, how long, and what is
kept, not what a step computes (but for rounding). Of on-policy training the weighting decides;
where the reward model is does not, it is known by its hash."""

LENGTH = ("batching.epochs", "batching.max_steps")
"""Those of them that decide the rate of every step, if it decays towards the last one."""

CHANGES_THE_RESULT = ("weights", "batching.epochs", "batching.max_steps", "schedule.export")
"""Those of them for which a finished run has something left to do."""


def finished_result(folder: RunFolder, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Compare the settings with those of the run in a folder.

    Args:
        folder: The run's folder, locked.
        config: The settings; None compares nothing.

    Returns:
        The record of a finished run with nothing left to do, else None.

    Raises:
        UserError: If the folder holds a run with other settings; all differences are named.
    """
    result = folder.result()
    started = result is not None or (folder.checkpoints / LAST).exists()
    kept = folder.kept(CONFIG) if started else None
    if config is None or kept is None:
        return result
    differing = differing_keys(kept, config)
    refused = {key: values for key, values in differing.items() if not may_change(key, kept)}
    if refused:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in refused.items()]
        raise UserError(
            f"run_dir={folder.path} holds a run with other settings; choose another run_dir, or "
            "set these back to resume it:\n" + "\n".join(lines)
        )
    unfinished = any(is_among(key, CHANGES_THE_RESULT) for key in differing)
    return None if unfinished else result


def may_change(key: str, kept: Mapping[str, Any]) -> bool:
    """Whether a run may go on under another value.

    Args:
        key: Dotted key of the configuration.
        kept: The configuration that the run has begun with.
    """
    decays = (kept.get("module") or {}).get("decay", "constant") != "constant"
    if decays and is_among(key, LENGTH):
        return False
    rewards = kept.get("rollouts") is not None and is_among(key, ("weights",))
    return is_among(key, MAY_CHANGE) and not rewards


def begin(
    folder: RunFolder,
    config: Mapping[str, Any] | None,
    fingerprints: Mapping[str, Any],
    total_steps: int,
) -> None:
    """Check that a run to resume is of this data, and keep what the run is of.

    Args:
        folder: The run's folder, locked, its settings compared.
        config: The settings.
        fingerprints: Hashes of the data, the tokenizer and the template.
        total_steps: Optimizer steps asked for.

    Raises:
        UserError: If the checkpoint is of other data, or further than asked for.
    """
    last = folder.checkpoints / LAST
    if last.exists():
        changed = differing_keys(folder.kept(INPUTS) or {}, fingerprints)
        if changed:
            raise UserError(
                f"run_dir={folder.path} holds a run on other data: {', '.join(changed)} changed "
                "since. Choose another run_dir, or restore the data to resume it"
            )
        done = int(read_checkpoint(last)["global_step"])
        if done > total_steps:
            raise UserError(
                f"run_dir={folder.path} is already at step {done}, {total_steps} were asked for: "
                "raise batching.max_steps or batching.epochs, or choose another run_dir"
            )
        logger.info("resuming after step %d of %d", done, total_steps)
    folder.keep(INPUTS, fingerprints)
    if config is not None:
        folder.keep(CONFIG, config)
    # From here on the record is out of date, whatever happens.
    (folder.path / "result.json").unlink(missing_ok=True)
