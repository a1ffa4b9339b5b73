"""Real commands as stages: killed in the midst of each, the pipeline makes the same in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpsteer2.pipeline.record import Record
from tests.pipeline.processes import (
    Start,
    command,
    finish,
    in_folder,
    kill_with_children,
    made,
    wait_for,
)

RECIPE = """
defaults:
  - iterative_dpo
_target_: tests.pipeline.recipe.UpToScoredPairs
pairs:
  choose: {data: world}
  data: {groups: 256}
train:
  choose: {trainer: cpu}
  batching: {global_batch: 8, max_steps: 8}
  schedule: {checkpoint_every: 2, export_every: 4}
select:
  choose: {evaluator: [world_policy]}
  metric: world_policy/weightings/helpsteer2_rlhf/sampled/value
  evaluators: {world_policy: {data: {validation_groups: 8}, sampling: {n: 2, max_tokens: 8}}}
sample:
  choose: {data: world}
  max_prompts: 320
  sampling: {n: 2, temperature: 1.0, top_p: 1.0, max_tokens: 8}
  engine: {prompts_per_block: 16}
max_prompt_tokens: 256
max_response_tokens: 256
"""

SIGNS = {
    "pairs": ("run.lock", 0),
    "reference": ("run.lock", 0),
    "dpo": ("checkpoints/last.ckpt", 0),
    "select": ("candidates/*/selection.json", 0),
    "sample_1": ("groups.jsonl.partial", 20_000),
    "annotate_1": ("scores.bin", 32),
}
"""Of one stage a command: the file that tells that it is at work, once it has more bytes than that:
beyond the key of the scores, and beyond the first block of samples."""


@pytest.fixture
def pipeline(models: Path, tmp_path: Path) -> list[str]:
    """The command line, but for where the run and its stages are."""
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "short.yaml").write_text(RECIPE)
    return command(
        "pipeline", f"--config-dir={tmp_path / 'conf'}", "pipeline=short",
        f"pipeline.policy={models / 'sft' / 'export'}",
        f"pipeline.reward_model={models / 'regression' / 'export'}",
    )  # fmt: skip


def is_at_work(stages_dir: Path, name: str) -> bool:
    pattern, size = SIGNS[name]
    try:
        return any(file.stat().st_size > size for file in stages_dir.glob(f"{name}-*/{pattern}"))
    except FileNotFoundError:  # moved between the two looks
        return False


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of processor time, many more where cores are busy
def test_real_stages_killed_in_their_midst_make_the_same(
    pipeline: list[str], start: Start, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start([*pipeline, *in_folder(whole)])  # meanwhile, on another core
    for name in SIGNS:
        process = start([*pipeline, *in_folder(killed)])
        wait_for(lambda name=name: is_at_work(killed / "stages", name), process, 500)  # type: ignore[misc]
        kill_with_children(process)
        (folder,) = (killed / "stages").glob(f"{name}-*")
        record = Record.of(folder)
        assert record is not None
        assert record.state == "running", name
    finish(start([*pipeline, *in_folder(killed)]))
    finish(undisturbed)
    assert made(killed) == made(whole)
    assert set(made(whole)) == {*SIGNS, "pairs_1"}
