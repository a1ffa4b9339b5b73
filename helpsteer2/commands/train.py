"""``helpsteer2 train``: one run of one Trainer, which can be killed and started again."""

from __future__ import annotations

import errno
import gc
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
from rich.console import Console

from helpsteer2.attributes import AttributeWeights
from helpsteer2.callbacks.checkpoints import (
    BEST,
    LAST,
    Cadence,
    Checkpoints,
    read_checkpoint,
    require_metric,
)
from helpsteer2.callbacks.guards import BadBatch, StopRequested, StopSignals
from helpsteer2.callbacks.metrics_log import MetricsLog
from helpsteer2.callbacks.progress import ProgressReport
from helpsteer2.callbacks.rollouts import RolloutReport, summary_of
from helpsteer2.callbacks.validation_report import ValidationReport
from helpsteer2.callbacks.wandb import WandbRun
from helpsteer2.callbacks.wandb import finish as finish_wandb
from helpsteer2.callbacks.weights_report import WeightsReport
from helpsteer2.commands.resume import begin, finished_result
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.train_data import DataSettings, TrainingData
from helpsteer2.commands.train_report import print_summary, result_of
from helpsteer2.commands.train_rollouts import (
    ROLLOUTS,
    RolloutData,
    check_goes_with,
    discard_stale,
)
from helpsteer2.commands.train_trainer import make_trainer
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.start import ModelSetup, PolicyStart, RewardStart
from helpsteer2.modules.on_policy import OnPolicyModule
from helpsteer2.modules.step import StepModule
from helpsteer2.rollouts.datamodule import RolloutDataModule
from helpsteer2.rollouts.settings import RolloutSettings

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def train(
    run_dir: str,
    seed: int,
    model: RewardStart | PolicyStart,
    backbone: Backbone,
    data: GroupSource,
    chat: ChatFormat,
    lengths: LengthLimits,
    batching: Batching,
    attributes: list[str],
    module: partial[StepModule],
    trainer: Callable[..., pl.Trainer],
    schedule: Cadence,
    cache_dir: str,
    reference: str | None = None,
    weights: AttributeWeights | None = None,
    rollouts: RolloutSettings | None = None,
    reward_model: str | None = None,
    logger: WandbRun | None = None,
    optimized_metric: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> float | None:
    """Train a reward model or a policy and export it to ``run_dir/export``.

    The same command started again goes on from ``run_dir/checkpoints/last.ckpt``, to the same
    weights as if it had never stopped; once the run is finished it returns what was recorded.

    Args:
        run_dir: Folder of the run; one process (or one group of ranks) at a time.
        seed: Seed of the order of the data and of new weights.
        model: What kind of model to start from; it has to be the kind that ``module`` trains.
        backbone: The decoder to start from, with its tokenizer.
        data: Where the splits ``train`` and ``validation`` are read.
        chat: How conversations become text.
        lengths: Longest prompt and response.
        batching: How groups become optimizer steps.
        attributes: Names of a reward model's scores, in their order; a policy has none.
        module: Makes the LightningModule around the model.
        trainer: Makes the Trainer; precision ``32-true`` or ``bf16-mixed``. Several devices are
            started by ``torchrun`` or Slurm, one process each.
        schedule: When to validate and save.
        cache_dir: Folder for tokenised data.
        reference: Folder of reference log-probabilities of the same data, made by ``helpsteer2
            reference``; for the modules that need one.
        weights: Weighting stored with the export of a reward model as its usual one; in on-policy
            training the one that makes rewards.
        rollouts: How a policy samples what it learns from; for the modules that do. Of ``data`` the
            prompts of ``train`` are read then, and no validation.
        reward_model: Folder or Hub id of the reward model of the rollouts, or the url of its
            server, as ``rollouts.rewarder`` opens it; for the record.
        logger: W&B beside the run's own ``metrics.csv``; None for the file alone.
        optimized_metric: Name of the metric to return, for sweepers.
        config: The whole configuration as plain containers, kept with the run.

    Returns:
        The optimized metric of the exported weights, None if none is named.

    Raises:
        UserError: If something outside the code is wrong; the message says what to do.
        SystemExit: With 128 + the signal's number, after a signal asked the run to stop.
    """
    return _Run(
        folder=RunFolder(run_dir),
        seed=seed,
        start=model,
        backbone=backbone,
        data=DataSettings(data, chat, lengths, tuple(attributes), cache_dir, reference),
        batching=batching,
        make_module=module,
        make_trainer=trainer,
        schedule=schedule,
        weights=weights,
        rollouts=rollouts,
        wandb=logger,
        optimized_metric=optimized_metric,
        config=config,
    ).execute()


@dataclass(kw_only=True)
class _Run:
    """One run: its settings, named as in ``train``, and its steps in order."""

    folder: RunFolder
    seed: int
    start: RewardStart | PolicyStart
    backbone: Backbone
    data: DataSettings
    batching: Batching
    make_module: partial[StepModule]
    make_trainer: Callable[..., pl.Trainer]
    schedule: Cadence
    weights: AttributeWeights | None
    rollouts: RolloutSettings | None
    wandb: WandbRun | None
    optimized_metric: str | None
    config: Mapping[str, Any] | None
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.progress = ProgressReport(self.console)

    @property
    def validates(self) -> bool:
        """Whether there are validations."""
        return self.schedule.validate_every is not None

    @property
    def module_class(self) -> type[StepModule]:
        """The class of the module to be."""
        return cast("type[StepModule]", self.make_module.func)

    def execute(self) -> float | None:
        """Lock the folder and run, or tell what a finished run has recorded."""
        started = time.monotonic()
        with ExitStack() as stack:
            stack.callback(_clean_up)
            stop = stack.enter_context(StopSignals())
            try:
                trainer = make_trainer(self.make_trainer, self.folder.path, self.validates)
                if trainer.is_global_zero:
                    stack.enter_context(self.folder.locked("train"))
                    stack.enter_context(self.folder.logging(self.console))
                return self._execute(trainer, stop, started)
            except StopRequested as stopped:
                finish_wandb(1)
                again = f"the same command with run_dir={self.folder.path} goes on from here"
                logger.info("%s: %s", stopped, again)
                raise SystemExit(128 + stopped.signal) from None
            except torch.OutOfMemoryError as error:
                sampling = "" if self.rollouts is None else ", rollouts.offload=true"
                raise UserError(
                    f"the device's memory is full ({str(error).splitlines()[0]}): lower "
                    "batching.tokens_per_microbatch (results do not change) or set "
                    f"backbone.gradient_checkpointing=true{sampling}; the same command resumes"
                ) from error
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
                raise UserError(f"cannot write ({error}); saved checkpoints are intact") from error

    def _execute(self, trainer: pl.Trainer, stop: StopSignals, started: float) -> float | None:
        if trainer.world_size > 1:
            trainer.strategy.setup_environment()
            # Each rank resolved ${now:} for itself.
            self.folder = RunFolder(trainer.strategy.broadcast(self.folder.path))
        finished = None
        if trainer.is_global_zero:
            finished = finished_result(self.folder, self.config)
        finished = trainer.strategy.broadcast(finished)
        if finished is not None:
            return self._recorded(finished)
        data = self._read(trainer)
        datamodule = self._datamodule(data, trainer, stop)
        if trainer.is_global_zero:
            if isinstance(data, RolloutData):
                discard_stale(self.folder, self.config, data.fingerprints())
            begin(self.folder, self.config, data.fingerprints(), datamodule.total_steps)
        pl.seed_everything(self.seed, workers=True, verbose=False)
        module = self._module(data, trainer)
        if isinstance(datamodule, RolloutDataModule):
            assert isinstance(module, OnPolicyModule)
            datamodule.start_from(module, trainer.strategy.root_device, self.backbone.attention)
        checkpoints = self._fit(trainer, module, data, datamodule, stop)
        value = None
        if trainer.is_global_zero:
            value = self._finish(trainer, module, data, checkpoints, started)
        return trainer.strategy.broadcast(value)

    def _read(self, trainer: pl.Trainer) -> TrainingData | RolloutData:
        """Groups to learn from, or what samples of the policy itself take."""
        check_goes_with(self.module_class, self.rollouts, self.schedule)
        if self.rollouts is None:
            return self.data.tokenise(
                self.start, self.backbone, self.module_class, self.validates, trainer
            )
        return RolloutData.read(
            self.rollouts, self.data, self.start, self.backbone, self.weights, self.seed
        )

    def _datamodule(
        self, data: TrainingData | RolloutData, trainer: pl.Trainer, stop: StopSignals
    ) -> GroupDataModule | RolloutDataModule:
        """Steps of the data; impossible batches are refused here, before the model is built."""
        if isinstance(data, RolloutData):
            folder = self.folder.path / ROLLOUTS
            report = partial(self._rollout_progress, trainer, stop)
            return data.datamodule(folder, self.batching, self.seed, report)
        datamodule = GroupDataModule(data.train, data.validation, self.batching, self.seed)
        datamodule.plan(trainer.world_size)
        if datamodule.dropped_groups:
            logger.info("%d groups of a last partial step are left out", datamodule.dropped_groups)
        return datamodule

    def _rollout_progress(
        self, trainer: pl.Trainer, stop: StopSignals, stage: str, done: int, total: int
    ) -> None:
        """Show how far an iteration is; nothing is at stake between its blocks."""
        if trainer.is_global_zero:
            self.progress.show_stage(stage, done, total)
        if stop.received is not None and trainer.world_size == 1:
            raise StopRequested(stop.received)

    def _recorded(self, result: Mapping[str, Any]) -> float | None:
        logger.info("%s is finished: its result.json is what counts", self.folder.path)
        if self.optimized_metric is None:
            return None
        return require_metric(self.optimized_metric, result["metrics"])

    def _module(self, data: TrainingData | RolloutData, trainer: pl.Trainer) -> StepModule:
        model = self.start.build(
            ModelSetup(
                backbone=self.backbone,
                chat=data.chat,
                limits=self.data.limits,
                train=data.train if isinstance(data, TrainingData) else None,
                data=data.description,
                weights=self.weights,
                seed=self.seed,
                device=trainer.strategy.root_device,
                autocast=torch.bfloat16 if trainer.precision == "bf16-mixed" else None,
                label_attributes=data.label_attributes,
            )
        )
        module = self.make_module(model=model)
        before = model.spec.objective  # of a model that training goes on from
        objective = f"{before}, then {module.objective}" if before else module.objective
        model.spec = replace(model.spec, objective=objective)
        return module

    def _fit(
        self,
        trainer: pl.Trainer,
        module: StepModule,
        data: TrainingData | RolloutData,
        datamodule: GroupDataModule | RolloutDataModule,
        stop: StopSignals,
    ) -> Checkpoints:
        view = None
        if self.wandb is not None and trainer.is_global_zero:
            view = self.wandb.open(self.folder.path, self.config or {})

        def export(name: str) -> None:
            module.model.save_pretrained(self.folder.exports / name, data.chat.tokenizer)

        checkpoints = Checkpoints(
            self.folder.checkpoints,
            self.schedule,
            stop,
            self.optimized_metric,
            export,
            datamodule.steps_per_iteration if isinstance(datamodule, RolloutDataModule) else None,
        )
        self.metrics_log = MetricsLog(self.folder.metrics, view)
        self.report = ValidationReport(
            self.folder.path,
            self.schedule.export,
            partial(read_all, self.data.source, "validation"),
            view,
        )
        trainer.callbacks += [
            BadBatch(self.folder.bad_batch), self.metrics_log, self.progress, self.report,
            WeightsReport(self.folder.path, view), stop, checkpoints,
        ]  # fmt: skip
        if isinstance(datamodule, RolloutDataModule):
            self.rollout_report = RolloutReport(self.folder.path, view)
            trainer.callbacks.insert(0, self.rollout_report)
        trainer.fit_loop.epoch_loop.max_steps = datamodule.total_steps
        last = self.folder.checkpoints / LAST
        resume = trainer.strategy.broadcast(str(last) if last.exists() else None)
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        return checkpoints

    def _finish(
        self,
        trainer: pl.Trainer,
        module: StepModule,
        data: TrainingData | RolloutData,
        checkpoints: Checkpoints,
        started: float,
    ) -> float | None:
        """Export, record, and tell; rank zero only."""
        exported_step = trainer.global_step
        metrics = {**self.metrics_log.latest, **checkpoints.last_metrics}
        if self.schedule.export == "best" and checkpoints.best_step is not None:
            exported_step = checkpoints.best_step
            metrics.update(checkpoints.best_metrics)
            best = read_checkpoint(self.folder.checkpoints / BEST)
            module.load_state_dict(best["state_dict"])
        module.model.save_pretrained(self.folder.export, data.chat.tokenizer)
        value = None
        if self.optimized_metric is not None:
            value = require_metric(self.optimized_metric, metrics)
        result = result_of(
            metrics=metrics,
            step=trainer.global_step,
            exported_step=exported_step,
            last_validation=checkpoints.last_metrics,
            optimized=(self.optimized_metric, value),
            fingerprints=data.fingerprints(),
            reports=data.reports(),
            speed=self.progress.throughput.summary(),
            wall_seconds=time.monotonic() - started,
            config=self.config,
        )
        if isinstance(data, RolloutData):
            seconds = self.rollout_report.update_seconds
            result["rollouts"] = summary_of(self.folder.path / ROLLOUTS, seconds)
        self.report.publish(trainer.global_step)
        self.folder.write_result(result)
        finish_wandb(0)
        print_summary(self.console, self.folder, result)
        return value


def _clean_up() -> None:
    """Leave nothing to the next job of a sweep in this process."""
    finish_wandb(1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
