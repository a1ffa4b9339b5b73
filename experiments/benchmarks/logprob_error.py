"""How exact are our log-probabilities, in float32 and with a bfloat16 backbone?

    HELPSTEER2_REAL_DATA=DIR python -m experiments.benchmarks.logprob_error

A pretrained causal LM (``DIR/tinystories_656k``) reads pairs of real responses behind their real
prompts. The reference is transformers' own log-softmax of its logits in float64, a sequence at a
time and without padding. Held against it, over response tokens: ours from packed rows with shared
prompts, and transformers' logits path in the same precision.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import read_all
from helpsteer2.data.lengths import CutReport, LengthLimits
from helpsteer2.data.packing import pack
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.data.tokenise import encode_group
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.records import environment, write_json_atomic

Array = npt.NDArray[np.float64]

RESULT = Path(__file__).parent / "results" / "logprob_error.json"
LIMITS = LengthLimits(250, 250)
"""The model has positions for 512 tokens."""


def read_groups(data: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[TokenGroup]:
    """The first pairs of the validation split."""
    chat, report = ChatFormat().bind(tokenizer), CutReport()
    rows = islice(read_all(HelpSteer2(str(data / "helpsteer2_slice")), "validation"), count)
    return [encode_group(group, i, chat, LIMITS, (), (), report) for i, group in enumerate(rows)]


def plain(folder: Path, dtype: torch.dtype, groups: list[TokenGroup]) -> Array:
    """Log-probabilities of the response tokens by transformers' logits, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def each() -> Iterator[Array]:
        for group in groups:
            for response in group.response_ids:
                ids = torch.tensor([*group.prompt_ids, *response])
                logits = model(input_ids=ids[None]).logits[0].to(exact)
                own = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                yield own[-len(response) :].double().numpy()

    with torch.inference_mode():
        return np.concatenate(list(each()))


def ours(
    folder: Path, dtype: Any, tokenizer: PreTrainedTokenizerBase, groups: list[TokenGroup]
) -> Array:
    """The same from packed rows of eight groups."""
    backbone = Backbone(PretrainedTokenizer(str(folder)), path=str(folder), dtype=dtype)
    spec = PolicySpec(ChatFormat().bind(tokenizer), LIMITS, folder.name)
    policy = Policy(backbone.build(tokenizer, seed=0, lm_head=True), spec)
    with torch.inference_mode():
        rows = [
            policy.response_logprobs(pack(groups[first : first + 8])).logprobs.double().numpy()
            for first in range(0, len(groups), 8)
        ]
    return np.concatenate(rows)


def errors(found: Array, exact: Array) -> dict[str, float]:
    """Absolute errors of single tokens, in nats."""
    error = np.abs(found - exact)
    return {
        "mean": float(error.mean()),
        "p99": float(np.quantile(error, 0.99)),
        "largest": float(error.max()),
    }


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    data = Path(os.environ["HELPSTEER2_REAL_DATA"])
    folder = data / "tinystories_656k"
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = PretrainedTokenizer(str(folder)).build(lambda: iter(()), Path(cache))
    groups = read_groups(data, tokenizer, options.groups)
    exact = plain(folder, torch.float64, groups)
    table = Table("", "mean", "99 %", "largest", title=f"|error| of {len(exact):,} tokens, nats")
    figures: dict[str, dict[str, float]] = {}
    for name in ("float32", "bfloat16"):
        figures[f"ours_{name}"] = errors(ours(folder, name, tokenizer, groups), exact)
        figures[f"plain_{name}"] = errors(plain(folder, getattr(torch, name), groups), exact)
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.1e}" for value in row.values()))
    Console().print(table)
    record = {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.logprob_error"]),
        "groups": len(groups),
        "tokens": len(exact),
        "mean_logprob": float(exact.mean()),
        "errors_in_nats": figures,
        "environment": environment(),
    }
    write_json_atomic(options.output, record)


if __name__ == "__main__":
    sys.exit(main())
