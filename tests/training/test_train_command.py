"""What a user meets: errors told in one message, and what a run leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from helpsteer2.callbacks import checkpoints as checkpoints_module
from helpsteer2.callbacks.checkpoints import LAST, read_checkpoint
from helpsteer2.callbacks.wandb import WandbRun
from helpsteer2.commands.resume import finished_result
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.train import train
from helpsteer2.data.groups import Group
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.losses.regression import RegressionLoss
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.reward import RewardModel
from helpsteer2.records import differing_keys, is_among
from tests.training.runs import NAMES, SHAPE, ToyGroups, arguments


def test_a_run_leaves_its_record_and_a_model(tmp_path: Path, capsys) -> None:
    value = train(**arguments(tmp_path / "run", max_steps=6))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert value == result["metrics"]["val/loss"] == result["optimized_metric"]["value"]
    assert result["steps"] == 6
    inputs = {"train", "validation", "tokenizer", "template", "reference"}
    assert set(result["fingerprints"]) == inputs
    assert {"environment", "speed", "wall_seconds", "config", "data"} <= set(result)
    assert result["speed"]["groups_per_second"] > 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config == arguments(tmp_path / "run", max_steps=6)["config"]
    model, _, _ = RewardModel.from_pretrained(tmp_path / "run/export")
    assert model.spec.attribute_names == NAMES
    assert model.spec.objective
    shown = capsys.readouterr().out
    assert "step 6/6" in shown
    assert str(tmp_path / "run/export") in shown
    assert "step 6/6" in (tmp_path / "run/run.log").read_text()


def test_best_or_last_weights_are_exported(tmp_path: Path) -> None:
    # A rate that soon overshoots: the last validation is not the best.
    options: dict[str, Any] = {"max_steps": 6, "validate_every": 1, "lr": 0.5}
    exported = {}
    for export in ("best", "last"):
        train(**arguments(tmp_path / export, export=export, **options))
        result = json.loads((tmp_path / export / "result.json").read_text())
        model, _, _ = RewardModel.from_pretrained(tmp_path / export / "export")
        exported[export] = (result, model.head.weight)
    losses = {
        int(line.split(",")[0]): float(line.split(",")[2])
        for line in (tmp_path / "best/metrics.csv").read_text().splitlines()
        if ",val/loss," in line
    }
    best = min(losses, key=lambda step: losses[step])
    assert best != 6
    assert exported["best"][0]["exported_step"] == best
    assert exported["best"][0]["metrics"]["val/loss"] == pytest.approx(losses[best])
    assert exported["last"][0]["exported_step"] == 6
    assert exported["last"][0]["metrics"]["val/loss"] == pytest.approx(losses[6])
    last = read_checkpoint(tmp_path / "last/checkpoints" / LAST)["state_dict"]
    assert torch.equal(exported["last"][1], last["model.head.weight"])
    assert not torch.equal(exported["best"][1], exported["last"][1])


def test_without_validation_the_last_weights_are_exported(tmp_path: Path) -> None:
    options: dict[str, Any] = {"validate_every": None, "optimized_metric": "train/loss"}
    value = train(**arguments(tmp_path / "run", max_steps=4, **options))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert value == result["metrics"]["train/loss"]
    assert result["exported_step"] == 4
    assert "val/loss" not in (tmp_path / "run/metrics.csv").read_text()


def test_nan_loss_stops_the_run_and_keeps_the_batch(tmp_path: Path, monkeypatch) -> None:
    from safetensors import safe_open

    inner = RegressionLoss.__call__
    calls: list[int] = []

    def poisoned(self, scores, attributes):
        calls.append(1)
        return inner(self, scores * (torch.nan if len(calls) > 20 else 1), attributes)

    monkeypatch.setattr(RegressionLoss, "__call__", poisoned)
    with pytest.raises(UserError) as caught:
        train(**arguments(tmp_path / "run", validate_every=None, checkpoint_every=1,
                          optimized_metric="train/loss"))  # fmt: skip
    [file] = (tmp_path / "run/bad_batch").iterdir()
    step = int(file.name.split("_")[1])
    assert f"step {step} " in str(caught.value)
    assert str(file) in str(caught.value)
    saved = read_checkpoint(tmp_path / "run/checkpoints" / LAST)
    assert saved["global_step"] == step
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    with safe_open(file, "pt") as kept:
        groups = json.loads(kept.metadata()["group_indices"])
        assert sum(map(len, groups)) == 6
        assert kept.get_tensor("0.input_ids").dtype == torch.int64
    assert not (tmp_path / "run/result.json").exists()


def test_full_disk_while_saving_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    real, saves = torch.save, []

    def full(content, file):
        saves.append(1)
        if len(saves) > 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(content, file)

    options: dict[str, Any] = {"validate_every": None, "checkpoint_every": 2}
    options |= {"optimized_metric": "train/loss"}
    monkeypatch.setattr(checkpoints_module.torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        train(**arguments(tmp_path / "run", **options))
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in folder.iterdir()] == [LAST]
    assert read_checkpoint(folder / LAST)["global_step"] == 4
    monkeypatch.undo()
    assert train(**arguments(tmp_path / "run", **options)) is not None


def test_run_ended_by_a_callback_is_validated_and_saved_there(tmp_path: Path) -> None:
    class Enough(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 4

    value = train(**arguments(tmp_path / "run", trainer={"callbacks": [Enough()]}))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 4
    assert read_checkpoint(tmp_path / "run/checkpoints" / LAST)["global_step"] == 4
    assert value == result["last_validation"]["val/loss"]


def test_data_without_any_rating_is_refused_before_training(tmp_path: Path) -> None:
    class Unrated(ToyGroups):
        def read(self, split: str, report: Any) -> Iterator[Group]:
            for group in super().read(split, report):
                yield replace(group, attributes=None)

    with pytest.raises(UserError, match=r"no response of the training data is rated"):
        train(**arguments(tmp_path / "run") | {"data": Unrated()})
    assert not (tmp_path / "run/metrics.csv").exists()


def test_a_backbone_drawn_at_random_is_not_named_after_the_one_it_looks_like(
    tmp_path: Path,
) -> None:
    from transformers import AutoConfig

    folder = tmp_path / "Famous-8B"
    AutoConfig.for_model(**SHAPE, vocab_size=270).save_pretrained(folder)
    backbone = Backbone(TrainedTokenizer(270), path=str(folder), init="random")
    options: dict[str, Any] = {"validate_every": None, "optimized_metric": None, "max_steps": 1}
    train(**arguments(tmp_path / "run", **options) | {"backbone": backbone})
    assert "Famous" not in (tmp_path / "run/export/reward_model.json").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_run_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        train(**arguments(tmp_path / "run"))


def test_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(UserError, match=r"run_dir=.*cannot be written"):
        train(**arguments(tmp_path / "run"))


@pytest.mark.parametrize(
    ("trainer", "place"),
    [({"max_steps": 3}, "batching.max_steps"), ({"gradient_clip_val": 1.0}, "module.gradient")],
)
def test_trainer_arguments_that_are_set_elsewhere(tmp_path: Path, trainer, place: str) -> None:
    with pytest.raises(UserError, match=place):
        train(**arguments(tmp_path / "run", trainer=trainer))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_precision_without_fp32_weights_is_refused(tmp_path: Path, precision: str) -> None:
    with pytest.raises(UserError, match=r"trainer\.precision"):
        train(**arguments(tmp_path / "run", precision=precision))


def test_several_devices_need_one_process_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchrun"):
        train(**arguments(tmp_path / "run", devices=2))


def test_unknown_metric_is_refused_at_the_first_validation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val/lost.*val/helpfulness/mse"):
        train(**arguments(tmp_path / "run", validate_every=2, optimized_metric="val/lost"))
    assert "3,train/loss" not in (tmp_path / "run/metrics.csv").read_text()


def test_full_memory_says_what_to_lower(tmp_path: Path, monkeypatch) -> None:
    def full(self, scores, attributes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(RegressionLoss, "__call__", full)
    with pytest.raises(UserError, match=r"batching\.tokens_per_microbatch"):
        train(**arguments(tmp_path / "run"))


def test_wandb_out_of_reach_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")

    def away(**options):
        raise wandb.errors.CommError("the server is away")

    monkeypatch.setattr(wandb, "init", away)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with_wandb = train(**arguments(tmp_path / "a", max_steps=3, wandb=WandbRun()))
    monkeypatch.undo()
    assert with_wandb == train(**arguments(tmp_path / "b", max_steps=3))
    assert "the server is away" in (tmp_path / "a/run.log").read_text()


@pytest.mark.slow
def test_wandb_without_a_key_is_offline_and_finished(tmp_path: Path, monkeypatch, capsys) -> None:
    wandb = pytest.importorskip("wandb")

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(**arguments(tmp_path / "run", max_steps=3, wandb=WandbRun()))
    assert wandb.run is None
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert "W&B is offline" in capsys.readouterr().out


def test_differing_keys_are_dotted_and_know_absent_ones() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": (1,), "gone": None, "was": 1}
    new = {"a": {"b": 1, "c": [1, 3]}, "d": [1], "e": {"f": 2}}
    assert differing_keys(old, new) == {"a.c": ([1, 2], [1, 3]), "e.f": (None, 2), "was": (1, None)}
    assert is_among("trainer.devices", ("trainer.devices",))
    assert is_among("logger.project", ("logger",))
    assert not is_among("trainer.devices_x", ("trainer.devices",))


def test_a_run_whose_rate_decays_to_its_end_keeps_its_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    longer = {"batching": {"max_steps": 9}}
    for decay, refused in (("constant", False), ("linear", True)):
        module = {"module": {"decay": decay}}
        folder.write_result({"kind": "train"})
        folder.keep("config.yaml", {"batching": {"max_steps": 5}} | module)
        with pytest.raises(UserError, match="max_steps") if refused else nullcontext():
            assert finished_result(folder, longer | module) is None


def test_lock_ends_with_its_block(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        assert (tmp_path / "run/run.lock").read_text() == str(os.getpid())
    with folder.locked():
        pass


def test_nothing_is_left_for_the_next_job_of_a_sweep(tmp_path: Path) -> None:
    import logging
    import signal

    before = signal.getsignal(signal.SIGINT), list(logging.getLogger("helpsteer2").handlers)
    values = [train(**arguments(tmp_path / str(i), max_steps=3)) for i in range(2)]
    assert values[0] == values[1]
    after = signal.getsignal(signal.SIGINT), list(logging.getLogger("helpsteer2").handlers)
    assert before == after
