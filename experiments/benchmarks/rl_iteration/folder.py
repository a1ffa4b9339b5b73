"""Making the folder that all contenders read: the models, and the prompts as ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.reward_step.cost import SIZES, VOCABULARY
from experiments.benchmarks.reward_step.job import FINGERPRINT, LIMITS, SEED, Corpus
from experiments.benchmarks.rl_iteration.job import Job, Kind
from helpsteer2.attributes import HELPSTEER2_ATTRIBUTES
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.token_store import TokenWriter
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.policy_export import PolicySpec, write_policy
from helpsteer2.models.reward import RewardModel
from helpsteer2.models.spec import RewardSpec

BASE = "random llama"


def make_job(
    corpus: Corpus,
    folder: Path,
    *,
    kind: Kind,
    size: str,
    prompts: int,
    rounds: int,
    warmup: int,
    **options: Any,
) -> Job:
    """Draw the prompts and write everything that the contenders read.

    Args:
        corpus: Where to draw from, without replacement.
        folder: To create.
        kind: The algorithm.
        size: Name of the model size.
        prompts: Of an iteration.
        rounds: Measured iterations.
        warmup: Iterations before them.
        **options: The other fields of the job.
    """
    wanted = (warmup + rounds) * prompts
    if wanted > len(corpus.groups):
        raise SystemExit(
            f"{wanted} prompts are wanted, there are {len(corpus.groups)}: lower --rounds"
        )
    drawn = np.random.default_rng(SEED).permutation(len(corpus.groups))[:wanted].tolist()
    ids = [tuple(corpus.groups[index].prompt_ids.tolist()) for index in drawn]
    by_round = tuple(tuple(ids[first : first + prompts]) for first in range(0, wanted, prompts))
    job = Job(folder, kind, size, by_round, warmup, **options)
    folder.mkdir(parents=True, exist_ok=True)
    with TokenWriter(job.groups, corpus.groups.attribute_names) as writer:
        for index in drawn:
            writer.add(corpus.groups[index], corpus.groups.ids[index])
        writer.finish(FINGERPRINT, {})
    _write_models(job, corpus)
    job.write()
    return job


def _write_models(job: Job, corpus: Corpus) -> None:
    """Random models of one size, with the tokenizer of the corpus."""
    tokenizer = corpus.tokenizer
    chat = ChatFormat().bind(tokenizer)
    backbone = Backbone(
        TrainedTokenizer(VOCABULARY), init="random", config=SIZES[job.size].config()
    )
    causal_lm = backbone.build(tokenizer, SEED, lm_head=True)
    write_policy(job.policy, causal_lm, PolicySpec(chat, LIMITS, BASE), tokenizer)
    decoder = backbone.build(tokenizer, SEED + 1)
    for path, attributes in (
        (job.reward_model, HELPSTEER2_ATTRIBUTES),
        (job.scalar_reward_model, ("score",)),
    ):
        spec = RewardSpec.of(attributes, chat, tokenizer, LIMITS, BASE)
        RewardModel(decoder, spec).save_pretrained(path, tokenizer)
