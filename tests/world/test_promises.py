"""What is promised of runs in the made-up world: a model of a small size, and data in no time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import build
from helpsteer2.config.checked import check
from helpsteer2.data.groups import read_all
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.models.backbone import Backbone
from helpsteer2.world.source import WorldSource


def test_the_backbone_of_the_world_is_of_the_promised_size(tmp_path: Path) -> None:
    checked = check(CONFIG_COMMANDS["train"], ["backbone=world", "data.groups=100"])
    built = build({key: checked.jobs[0][key] for key in ("backbone", "data")})
    backbone, source = built["backbone"], built["data"]
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone.tokenizer, TrainedTokenizer)

    def texts() -> Iterator[str]:
        for group in read_all(source, "train"):
            yield from (message["content"] for message in group.prompt)
            yield from group.responses

    tokenizer = backbone.tokenizer.build(texts, tmp_path)
    # The world's words do not fill the vocabulary; with other data it may be as large as allowed.
    whole = {**(backbone.config or {}), "vocab_size": backbone.tokenizer.vocab_size}
    sizes = [
        one.build(tokenizer, seed=0, lm_head=True).num_parameters()
        for one in (backbone, replace(backbone, config=whole))
    ]
    assert 1_000_000 <= sizes[0] < sizes[1] <= 3_000_000
    assert sizes[1] == 1_180_800


def test_thousands_of_groups_are_made_in_seconds() -> None:
    source = WorldSource(groups=2000, seed=0, validation_groups=1)
    # Time of this process, not of the clock: others may keep the machine busy. It takes less
    # than a second where this was written.
    before = time.process_time()
    assert sum(1 for _ in read_all(source, "train")) == 2000
    assert time.process_time() - before < 10
