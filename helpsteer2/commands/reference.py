"""``helpsteer2 reference``: log-probabilities of a policy, for training that compares with it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress

from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import GroupSource, Unlabelled
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.reference import (
    REFERENCE_FILE,
    Reference,
    ReferenceInputs,
    ReferenceSplit,
    write_reference,
)
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.export import replaced_folder
from helpsteer2.models.policy import Policy
from helpsteer2.models.reference import policy_hash, reference_split
from helpsteer2.models.start import PolicyStart
from helpsteer2.records import environment

Split: TypeAlias = "tuple[TokenisedGroups, ReferenceSplit]"


def reference(
    run_dir: str,
    model: str,
    tokenizer: PretrainedTokenizer,
    data: GroupSource,
    splits: list[str],
    chat: ChatFormat,
    lengths: LengthLimits,
    dtype: Literal["float32", "bfloat16"],
    precision: Literal["32-true", "bf16-mixed"],
    attention: Literal["auto", "sdpa", "flex", "flash"],
    tokens_per_microbatch: int,
    cache_dir: str,
    labels: bool = True,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write the log-probability of every response token to ``run_dir/reference``.

    ``helpsteer2 train module=dpo reference=RUN/reference`` reads them. Data, chat, lengths, dtype
    and precision have to be those of that run, which refuses others. The folder appears when it is
    whole; if it holds the same already, nothing is computed.

    Args:
        run_dir: Folder of the log-probabilities (``reference``) and the record (``result.json``).
        model: Folder of the policy, or its Hub id.
        tokenizer: Its tokenizer.
        data: Groups of n responses; whether a response is preferred does not matter here.
        splits: The splits to read.
        chat: How conversations become text.
        lengths: Longest prompt and response.
        dtype: Type of the weights, as ``backbone.dtype`` of the training.
        precision: As ``trainer.precision`` of the training.
        attention: Attention backend.
        tokens_per_microbatch: Most tokens of one forward pass.
        cache_dir: Folder for tokenised data.
        labels: Whether the labels of the groups are read; without them it is log P(y|x) of a policy
            that was trained without any.
        config: The whole configuration, kept in the result.

    Raises:
        DataError: If a row of the data is bad.
        UserError: If the policy or the data cannot be used, another process uses the folder, or it
            cannot be written.
    """
    started, start = datetime.now(timezone.utc), time.monotonic()
    if not splits:
        raise UserError("splits is empty: name at least one, splits=[train] for example")
    folder, console = RunFolder(run_dir), Console()
    place = folder.path / "reference"
    with folder.locked("reference"):
        # As training makes them, so that they are the same ids.
        bound = PolicyStart().chat(chat, Backbone(tokenizer, model), lambda: iter(()), cache_dir)
        close_cut = PolicyStart.closes_cut_responses
        read = data if labels else Unlabelled(data)
        groups = {
            split: tokenise(read, split, bound, lengths, (), cache_dir, close_cut)
            for split in splits
        }
        weights = policy_hash(model)
        inputs = ReferenceInputs.of(bound, lengths, dtype, precision, labels)
        if folder.result() is not None and _is_there(place, weights, inputs, groups):
            console.print(f"{place} holds these log-probabilities already", soft_wrap=True)
            return
        # From here on the record is out of date, whatever happens.
        (folder.path / "result.json").unlink(missing_ok=True)
        reader = _Reader(model, dtype, precision, attention, tokens_per_microbatch)
        content = reader.read(groups, console)
        with replaced_folder(place, REFERENCE_FILE) as aside:
            write_reference(aside, weights, inputs, content)
        folder.write_result(
            {
                "kind": "reference",
                "metrics": _metrics(content),
                "weights": weights,
                "inputs": asdict(inputs),
                "groups": {split: part.fingerprint for split, part in groups.items()},
                "data": {split: part.report for split, part in groups.items()},
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    for split, figures in _metrics(content).items():
        console.print(
            f"{split}: {figures['responses']:,} responses, {figures['tokens']:,} tokens, mean "
            f"log-probability {figures['mean_token_logprob']:.4f} a token",
            highlight=False,
        )
    console.print(f"wrote {place}, for reference={place} of helpsteer2 train", soft_wrap=True)


def _is_there(
    place: Path, weights: str, inputs: ReferenceInputs, groups: Mapping[str, TokenisedGroups]
) -> bool:
    """Whether the folder holds what would be computed, undamaged."""
    try:
        there = Reference.open(place)
        for split, part in groups.items():
            there.join(part, split)
    except UserError:
        return False
    return (there.weights, there.inputs) == (weights, inputs)


def _metrics(content: Mapping[str, Split]) -> dict[str, dict[str, float]]:
    """Numbers of each split."""
    return {
        split: {
            "responses": len(values.lengths),
            "tokens": len(values.logprobs),
            "mean_token_logprob": float(values.logprobs.mean(dtype=float)),
        }
        for split, (_, values) in content.items()
    }


@dataclass(frozen=True)
class _Reader:
    """Loads the policy and reads the splits; the attributes are those of ``reference``."""

    model: str
    dtype: Literal["float32", "bfloat16"]
    precision: Literal["32-true", "bf16-mixed"]
    attention: Literal["auto", "sdpa", "flex", "flash"]
    tokens_per_microbatch: int

    def read(self, groups: Mapping[str, TokenisedGroups], console: Console) -> dict[str, Split]:
        """Log-probabilities of every split, with a progress bar if somebody looks at it."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy, _, _ = Policy.from_pretrained(self.model, self.dtype, self.attention, device)
        autocast = torch.bfloat16 if self.precision == "bf16-mixed" else None
        content = {}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            for split, part in groups.items():
                task = bar.add_task(split, total=len(part))
                values = reference_split(
                    policy, part, self.tokens_per_microbatch, autocast, partial(bar.advance, task)
                )
                content[split] = (part, values)
        return content
