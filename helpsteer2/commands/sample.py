"""``helpsteer2 sample``: prompts in, groups of sampled responses out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.sample_store import SampleStore
from helpsteer2.data.groups import Group, GroupSource, read_prompts
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.errors import UserError
from helpsteer2.evaluation.scoring import model_key
from helpsteer2.generation.sampling import (
    Engine,
    Sampler,
    SamplingParams,
    sampled_group,
    with_labels,
)
from helpsteer2.records import differing_keys, environment

GROUPS_FILE, SETTINGS_FILE = "groups.jsonl", "sampling.yaml"
PARTIAL_FILE = f"{GROUPS_FILE}.partial"


def sample(
    run_dir: str,
    seed: int,
    model: str,
    dtype: Literal["float32", "bfloat16"],
    attention: Literal["auto", "sdpa", "flex", "flash"],
    data: GroupSource,
    split: str,
    max_prompts: int | None,
    max_prompt_tokens: int,
    sampling: SamplingParams,
    engine: Engine,
    steering: Mapping[str, int] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Sample responses of a policy to the prompts of a data set.

    The same command goes on where a killed one was, and gives the same file.

    Args:
        run_dir: Folder of the groups (``groups.jsonl``) and the record (``result.json``).
        seed: Seed of the random numbers, by way of ``sampling``.
        model: Folder of the policy, or its Hub id.
        dtype: Type of the weights, for ``engine=local``.
        attention: Attention backend of the prompts, for ``engine=local``.
        data: Where the prompts are, with or without responses.
        split: The split of them to read.
        max_prompts: Only so many of the first prompts; None for all.
        max_prompt_tokens: Longest prompt; longer ones are left out, counted and named.
        sampling: How to draw.
        engine: What samples.
        steering: What the answers of a policy that was trained with labels shall be like: ratings
            0–4 by attribute, the same for all prompts. Attributes left out have the usual values.
            None takes the label of each prompt.
        config: The whole configuration, kept in the result.

    Raises:
        DataError: If a row of the data is bad.
        UserError: If the policy or its server cannot be used, the folder holds samples of other
            settings, another process uses it, or it cannot be written.
    """
    started, console = datetime.now(timezone.utc), Console()
    label = _asked(steering)
    folder = RunFolder(run_dir)
    partial = folder.path / PARTIAL_FILE
    with folder.locked("sample"):
        known = {"path": model, "hash": model_key(model)}
        settings = {
            "model": known,
            "dtype": dtype,
            "data": {"split": split, "fingerprint": data.fingerprint(split)},
            "max_prompts": max_prompts,
            "max_prompt_tokens": max_prompt_tokens,
            "sampling": sampling,
            "engine": engine.identity,
            "steering": None if label is None else label.as_dict(),
        }
        if (done := folder.result()) is not None and not partial.exists():
            # To ask again what its ids mean takes the model or its server.
            settings["model"] = {**known, "ids_hash": done["model"]["ids_hash"]}
            _check_settings(folder, settings)
            console.print(_summary(done["metrics"]))
            console.print(f"{folder.path / GROUPS_FILE} was finished before", soft_wrap=True)
            return
        prompts = list(read_prompts(data, split))[:max_prompts]
        sampler = engine.open(model, dtype, attention)
        settings["model"] = {**known, "ids_hash": sampler.ids_hash}
        _check_settings(folder, settings)
        prompts = with_labels(prompts, label, sampler.label_attributes)
        if label is not None:
            label = prompts[0].label  # with the usual values of what it left out
            console.print(f"answers are asked to be {label}", highlight=False, soft_wrap=True)
        fitting, too_long = _by_length(prompts, sampler, max_prompt_tokens)
        clock = time.monotonic()
        with SampleStore(partial) as store:
            tokens = _sample_all(fitting, sampler, sampling, store, console)
            seconds = time.monotonic() - clock
            metrics = {
                "prompts": len(prompts),
                "prompts_too_long": len(too_long),
                **store.write(folder.path / GROUPS_FILE),
                "tokens_in_this_run": tokens,
                "tokens_per_second": round(tokens / seconds, 2) if tokens else None,
            }
            folder.write_result(
                {
                    "kind": "sample",
                    "metrics": metrics,
                    "too_long": too_long,
                    "label": None if label is None else label.as_dict(),
                    **settings,
                    "server": getattr(sampler, "counts", None),
                    "config": config,
                    "environment": environment(),
                    "started": started.isoformat(timespec="seconds"),
                    "wall_seconds": round(seconds, 3),
                }
            )
            store.remove()
    console.print(_summary(metrics))
    console.print(f"wrote {folder.path / GROUPS_FILE}", soft_wrap=True)


def _asked(steering: Mapping[str, int] | None) -> AttributeLabel | None:
    """The label of all prompts, if there is one."""
    if steering is None:
        return None
    try:
        return AttributeLabel.of(steering)
    except UserError as error:
        raise UserError(f"steering: {error}") from error


def _check_settings(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with samples that other settings gave; without samples none bind."""
    outputs = [folder.path / name for name in (PARTIAL_FILE, GROUPS_FILE, "result.json")]
    sampled = any(path.exists() and path.stat().st_size for path in outputs)
    kept = folder.kept(SETTINGS_FILE) if sampled else None
    if kept is None:
        folder.keep(SETTINGS_FILE, settings)
        return
    changed = differing_keys(kept, settings)
    if changed:
        told = "; ".join(f"{key}: {old} → {new}" for key, (old, new) in changed.items())
        raise UserError(
            f"run_dir={folder.path} holds samples of other settings ({told}): choose another "
            "run_dir, or remove it"
        )


def _by_length(
    prompts: Sequence[Group], sampler: Sampler, most_tokens: int
) -> tuple[list[Group], list[str]]:
    """Prompts within the limit, and the ids of the others."""
    fitting, too_long = [], []
    for group in prompts:
        if len(sampler.chat.prompt_ids(group.prompt)) <= most_tokens:
            fitting.append(group)
        else:
            too_long.append(group.id)
    if not fitting:
        raise UserError(
            f"none of the {len(prompts)} prompts has {most_tokens} tokens or fewer: raise "
            "max_prompt_tokens"
        )
    return fitting, too_long


def _sample_all(
    prompts: Sequence[Group],
    sampler: Sampler,
    params: SamplingParams,
    store: SampleStore,
    console: Console,
) -> int:
    """Sample what is missing; how many tokens these are."""
    places = {group.id: place for place, group in enumerate(prompts)}
    if len(places) < len(prompts):
        raise UserError("data: several prompts have the same id, and samples go by it")
    missing = _missing(len(prompts), store.places, sampler.prompts_per_block)
    tokens, start = 0, time.monotonic()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("samples", total=len(prompts) * params.n, speed=0)
        progress.advance(task, (len(prompts) - len(missing)) * params.n)
        for group, samples in sampler.sample((prompts[place] for place in missing), params):
            store.add(places[group.id], sampled_group(group, samples, sampler.ids_hash))
            tokens += sum(len(one.ids) for one in samples)
            speed = tokens / (time.monotonic() - start)
            progress.update(task, advance=params.n, speed=speed)
    return tokens


def _missing(total: int, there: set[int], block: int) -> list[int]:
    """Places to sample: whole blocks, so that what a killed run lost comes out the same."""
    missing: list[int] = []
    for first in range(0, total, block):
        places = range(first, min(first + block, total))
        if not there.issuperset(places):
            missing += places
    return missing


def _summary(metrics: Mapping[str, Any]) -> str:
    """What there is, in a line or two."""
    finished = metrics["finish_reasons"]["stop"]
    text = (
        f"{metrics['groups']:,} prompts, {metrics['samples']:,} samples of "
        f"{metrics['mean_tokens']:.1f} tokens on average, {finished:,} finished, "
        f"{metrics['empty_samples']:,} empty"
    )
    if metrics["prompts_too_long"]:
        text += f"; {metrics['prompts_too_long']:,} prompts were too long and left out"
    return text
