"""Contenders of the sampling benchmark: ours, transformers' generate, and the yardstick."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments.benchmarks.reward_step.cost import Size
from experiments.benchmarks.reward_step.turns import Turns
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.functional.sampling import Truncation
from helpsteer2.generation.cohort import Cohort, Ended, Request
from helpsteer2.generation.local import LocalEngine, LocalSampler
from helpsteer2.generation.sampling import SamplingParams
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec

SEED = 1
YARDSTICK = "yardstick"
MIB = 2**20


@dataclass(frozen=True)
class SamplingJob:
    """What all contenders sample. Pickles.

    Attributes:
        size: The model.
        dtype: Of the weights.
        tokenizer: Of the prompts.
        rounds: Ids of the prompts of every round, warm-up first.
        params: How to draw.
    """

    size: Size
    dtype: Literal["float32", "bfloat16"]
    tokenizer: PreTrainedTokenizerFast
    rounds: tuple[tuple[tuple[int, ...], ...], ...]
    params: SamplingParams

    @property
    def total_steps(self) -> int:
        """Rounds with warm-up."""
        return len(self.rounds)

    def model(self, implementation: str) -> Any:
        """The same random weights for all."""
        from transformers import AutoConfig

        config = AutoConfig.for_model(**self.size.config())
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, self.dtype), attn_implementation=implementation
        ).eval()


def run(turns: Turns, job: SamplingJob, kind: str, **options: Any) -> None:
    """Be the contender of that kind, one round a turn."""
    contenders: dict[str, Callable[..., None]] = {
        "ours": _ours,
        "generate": _generate,
        YARDSTICK: _yardstick,
    }
    contenders[kind](turns, job, **options)


@dataclass
class Tally:
    """What the decode steps of a round had to read and compute at the least.

    Attributes:
        tokens: Generated.
        steps: Decode steps.
        rows: Samples of each step.
        step_seconds: Of all decode steps.
        step_bytes: Of each step: all weights, and the keys and values of every live prompt (once)
            and sample.
        step_flops: Of each step: linear layers with the LM head, and attention.
    """

    tokens: int = 0
    steps: int = 0
    rows: list[int] = field(default_factory=list)
    step_seconds: float = 0.0
    step_bytes: list[float] = field(default_factory=list)
    step_flops: list[float] = field(default_factory=list)


class CountingSampler(LocalSampler):
    """The local engine, given ids in place of text, with a tally of its steps."""

    def __init__(self, policy: Policy, engine: LocalEngine, size: Size, width: int) -> None:
        super().__init__(policy, engine)
        self.size, self.width = size, width
        head = size.hidden * policy.lm_head.out_features
        self.parameters = size.linear_parameters + head
        self.tally = Tally()

    def _request(self, group: Any, params: SamplingParams) -> Request:
        group, ids = group
        return Request(group, np.asarray(ids, np.int32))

    def _step(self, cohorts: list[Cohort], truncation: Truncation) -> list[Ended]:
        rows = sum(len(cohort.keys) for cohort in cohorts)
        prompts = {
            id(cohort.requests[s // cohort.params.n]): cohort.requests[s // cohort.params.n]
            for cohort in cohorts
            for s in cohort._samples.tolist()
        }
        kept = sum(len(request.prompt_ids) for request in prompts.values())
        kept += sum(len(cohort.keys) * cohort.length for cohort in cohorts)
        attended = sum(int((cohort.positions + 1).sum()) for cohort in cohorts)
        per_token = 2 * self.size.layers * self.size.hidden
        self.tally.step_bytes.append(self.width * (self.parameters + per_token * kept))
        flops = 2.0 * self.parameters * rows + 4.0 * self.size.hidden * self.size.layers * attended
        self.tally.step_flops.append(flops)
        self.tally.rows.append(rows)
        start = time.perf_counter()
        ended = super()._step(cohorts, truncation)
        self.tally.step_seconds += time.perf_counter() - start
        self.tally.steps += 1
        return ended


def _ours(turns: Turns, job: SamplingJob, max_rows: int, profiled: bool = False) -> None:
    causal_lm = job.model(implementation_name("sdpa"))
    spec = PolicySpec(ChatFormat().bind(job.tokenizer), LengthLimits(1, 1), "random")
    width = 4 if job.dtype == "float32" else 2
    engine = LocalEngine(max_rows=max_rows, cache_tokens=2**30, prompts_per_block=2**20)
    sampler = CountingSampler(Policy(causal_lm, spec).eval(), engine, job.size, width)
    turns.wait_first()
    for number, prompts in enumerate(job.rounds):
        sampler.tally = Tally()
        groups = [(Group(f"{number}-{i}", "", (), ()), ids) for i, ids in enumerate(prompts)]
        last = number == len(job.rounds) - 1
        with _profiler(profiled and last) as profile:
            start = time.perf_counter()
            for _, samples in sampler.sample(groups, job.params):  # type: ignore[arg-type]
                sampler.tally.tokens += sum(len(one.ids) for one in samples)
            wall = time.perf_counter() - start
        found = {} if profile is None else {"profile": shares(profile, wall)}
        turns.end(lambda found=found: {**asdict(sampler.tally), **found})  # type: ignore[misc]


def _profiler(wanted: bool) -> Any:
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU]) if wanted else contextlib.nullcontext()


KERNELS = {
    "linear layers": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


def shares(profile: Any, wall: float) -> dict[str, float]:
    """Where a round goes, as shares of its time; the profiler itself makes Python's look larger."""
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    found = {
        name: sum(seconds.get(key, 0.0) for key in keys) / wall for name, keys in KERNELS.items()
    }
    found["other kernels"] = sum(seconds.values()) / wall - sum(found.values())
    found["outside of kernels"] = 1 - sum(found.values())
    return found


def _generate(
    turns: Turns, job: SamplingJob, prompts_at_once: int, cache: str | None = None
) -> None:
    """``generate`` over prompts sorted by length, left-padded, n samples each."""
    model, params, pad = job.model("sdpa"), job.params, job.tokenizer.pad_token_id
    options: dict[str, Any] = {
        "max_new_tokens": params.max_tokens, "num_return_sequences": params.n,
        "do_sample": True, "temperature": params.temperature, "top_p": params.top_p,
        "top_k": params.top_k, "eos_token_id": job.tokenizer.eos_token_id, "pad_token_id": pad,
    }  # fmt: skip
    if cache is not None:
        options["cache_implementation"] = cache
    turns.wait_first()
    for prompts in job.rounds:
        torch.manual_seed(SEED)
        ordered, tokens = sorted(prompts, key=len, reverse=True), 0
        for first in range(0, len(ordered), prompts_at_once):
            ids, mask = _left_padded(ordered[first : first + prompts_at_once], pad)
            out = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
            ended = (out == job.tokenizer.eos_token_id).cumsum(dim=1)
            tokens += int((ended - (out == job.tokenizer.eos_token_id).long() == 0).sum())
        turns.end(lambda tokens=tokens: {"tokens": tokens})  # type: ignore[misc]


def _left_padded(rows: list[tuple[int, ...]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _yardstick(turns: Turns, job: SamplingJob, max_rows: int) -> None:
    """How fast this machine reads memory, and multiplies matrices of the step's shapes."""
    dtype = getattr(torch, job.dtype)
    memory = torch.zeros(512 * MIB // 4, dtype=torch.float32)
    shapes = [*job.size.linear_shapes, (job.size.hidden, len(job.tokenizer))]
    products = [
        (torch.randn(max_rows, a).to(dtype), torch.randn(b, a).to(dtype)) for a, b in shapes
    ]
    turns.wait_first()
    while True:
        read = min(_seconds(memory.sum) for _ in range(3))
        flops = seconds = 0.0
        for x, weight in products:
            torch.nn.functional.linear(x, weight)
            seconds += min(
                _seconds(lambda x=x, w=weight: torch.nn.functional.linear(x, w)) for _ in range(5)
            )
            flops += 2.0 * x.shape[0] * weight.numel()
        rates = {"bytes_per_second": 512 * MIB / read, "flops_per_second": flops / seconds}
        turns.end(lambda rates=rates: rates)  # type: ignore[misc]


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
