"""What the result of a stage depends on, as one flat mapping and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helpsteer2
from helpsteer2.pipeline.contents import Contents
from helpsteer2.records import differing_keys, flat, is_among, plain

NO_EFFECT = (
    "run_dir", "cache_dir", "experiment", "logger", "optimized_metric", "tokens_per_microbatch",
    "batching.tokens_per_microbatch", "backbone.gradient_checkpointing",
    "schedule.checkpoint_every", "trainer.accelerator", "trainer.devices", "trainer.num_nodes",
    "trainer.strategy", "rollouts.offload", "rollouts.engine.cache_tokens",
    "rollouts.engine.max_rows", "rollouts.engine.prefill_tokens",
)  # fmt: skip
"""Keys that decide where and how fast a stage runs, not what comes out (but for rounding)."""

_PATH_KEYS = {
    "path", "init_from", "model", "base", "weak", "strong", "reference", "baseline", "candidates",
    "file", "reward_model", "statistics",
}  # fmt: skip
"""Last parts of keys whose value may be a path, even one without a slash."""

CONTENT = "content "
"""Before the hash that stands in place of a path."""

STAGE = "stage:"
"""Before the name of a stage's folder, where a path to it is not yet a path."""


def dependencies(command: str, config: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    """Everything that a stage's outputs depend on.

    Paths outside the pipeline are replaced by a hash of what lies there, so that a moved file
    changes nothing and an edited one does. References to earlier stages stay as they are: they
    carry the fingerprint of that stage.

    Args:
        command: Name of the command.
        config: Its checked configuration, defaults filled in, nested.
        contents: Hashes what lies at a path.

    Returns:
        Value by dotted key, keys without effect left out; the command and the package's version
        are among them.

    Raises:
        UserError: If a file cannot be read.
    """
    found = {
        key: _content(key, value, contents)
        for key, value in flat(plain(config))
        if not is_among(key, NO_EFFECT)
    }
    return {"(command)": command, "(version)": helpsteer2.__version__, **found}


def fingerprint_of(dependencies: Mapping[str, Any]) -> str:
    """Hash of what ``dependencies`` gave, 64 hexadecimal digits."""
    text = json.dumps(dependencies, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in what two stages differ.

    Args:
        old: Dependencies of one.
        new: Of the other.

    Returns:
        ``KEY: OLD → NEW`` for each key that differs; where it is an input, that it changed.
    """
    lines = []
    for key, (before, after) in differing_keys(old, new).items():
        kinds = {_kind(before), _kind(after)}
        if kinds in ({CONTENT}, {STAGE}):
            lines.append(f"{key}: the input changed")
        else:
            lines.append(f"{key}: {_short(before)} → {_short(after)}")
    return lines


def _kind(value: Any) -> str | None:
    """Whether a value stands for an input."""
    first = value[0] if isinstance(value, list) and value else value
    texts = (kind for kind in (CONTENT, STAGE) if isinstance(first, str) and first.startswith(kind))
    return next(texts, None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _content(key: str, value: Any, contents: Contents) -> Any:
    if isinstance(value, list):
        return [_content(key, item, contents) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if "/" not in value and key.rpartition(".")[2] not in _PATH_KEYS:
        return value
    try:
        path = Path(value).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or no such home
        return value
    return f"{CONTENT}{contents.of_path(path)}" if is_there else value
