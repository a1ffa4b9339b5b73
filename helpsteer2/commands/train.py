"""``helpsteer2 train``: one run of one Trainer, which can be killed and started again."""

from __future__ import annotations

import errno
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console

from helpsteer2.attributes import AttributeWeights
from helpsteer2.callbacks.checkpoints import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    Cadence,
    Checkpoints,
    read_checkpoint,
    require_metric,
)
from helpsteer2.callbacks.guards import BadBatch, StopRequested, StopSignals
from helpsteer2.callbacks.metrics_log import MetricsLog
from helpsteer2.callbacks.progress import ProgressReport
from helpsteer2.callbacks.wandb import WandbRun
from helpsteer2.callbacks.wandb import finish as finish_wandb
from helpsteer2.commands.resume import begin, finished_result
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.commands.train_report import print_summary, result_of
from helpsteer2.config.rules import SET_BY_RUN
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.groups import GroupSource, read_all
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.modules.step import StepModule

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class ModuleFactory(Protocol):
    """Makes the LightningModule around a model, as a config node with ``_partial_`` does."""

    def __call__(self, model: RewardModel) -> StepModule:
        """Wrap the model."""


def train(
    run_dir: str,
    seed: int,
    backbone: Backbone,
    data: GroupSource,
    chat: ChatFormat,
    lengths: LengthLimits,
    batching: Batching,
    attributes: list[str],
    module: ModuleFactory,
    trainer: Callable[..., pl.Trainer],
    schedule: Cadence,
    cache_dir: str,
    weights: AttributeWeights | None = None,
    logger: WandbRun | None = None,
    optimized_metric: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> float | None:
    """Train a reward model and export it to ``run_dir/export``.

    The same command started again goes on from ``run_dir/checkpoints/last.ckpt``, to the same
    weights as if it had never stopped; once the run is finished it returns what was recorded.

    Args:
        run_dir: Folder of the run; one process (or one group of ranks) at a time.
        seed: Seed of the order of the data and of new weights.
        backbone: The decoder to start from, with its tokenizer.
        data: Where the splits ``train`` and ``validation`` are read.
        chat: How conversations become text.
        lengths: Longest prompt and response.
        batching: How groups become optimizer steps.
        attributes: Names of the ratings to learn, in the order of the scores.
        module: Makes the LightningModule around the model.
        trainer: Makes the Trainer; precision ``32-true`` or ``bf16-mixed``. Several devices are
            started by ``torchrun`` or Slurm, one process each.
        schedule: When to validate and save.
        cache_dir: Folder for tokenised data.
        weights: Weighting stored with the export as its usual one.
        logger: W&B beside the run's own ``metrics.csv``; None for the file alone.
        optimized_metric: Name of the metric to return, for sweepers.
        config: The whole configuration as plain containers, kept with the run.

    Returns:
        The optimized metric of the exported weights, None if none is named.

    Raises:
        UserError: If something outside the code is wrong; the message says what to do.
        SystemExit: With 128 + the signal's number, after a signal asked the run to stop.
    """
    run = _Run(
        RunFolder(run_dir), seed, backbone, data, chat, lengths, batching, tuple(attributes),
        module, trainer, schedule, cache_dir, weights, logger, optimized_metric, config,
    )  # fmt: skip
    return run.execute()


@dataclass
class _Data:
    """What comes out of tokenising."""

    tokenizer: Any
    chat: BoundChat
    train: TokenisedGroups
    validation: TokenisedGroups | None

    def fingerprints(self) -> dict[str, Any]:
        """Hashes of everything that the ids depend on."""
        return {
            "train": self.train.fingerprint,
            "validation": None if self.validation is None else self.validation.fingerprint,
            "tokenizer": tokenizer_hash(self.tokenizer),
            "template": self.chat.template_hash,
        }


@dataclass
class _Run:
    """One run: its settings, named as in ``train``, and its steps in order."""

    folder: RunFolder
    seed: int
    backbone: Backbone
    data: GroupSource
    chat: ChatFormat
    lengths: LengthLimits
    batching: Batching
    attributes: tuple[str, ...]
    make_module: ModuleFactory
    make_trainer: Callable[..., pl.Trainer]
    schedule: Cadence
    cache_dir: str
    weights: AttributeWeights | None
    wandb: WandbRun | None
    optimized_metric: str | None
    config: Mapping[str, Any] | None
    console: Console = field(default_factory=Console)

    def execute(self) -> float | None:
        """Lock the folder and run, or tell what a finished run has recorded."""
        started = time.monotonic()
        with ExitStack() as stack:
            stack.callback(_clean_up)
            stop = stack.enter_context(StopSignals())
            try:
                trainer = self._trainer()
                if trainer.is_global_zero:
                    stack.enter_context(self.folder.locked())
                    stack.enter_context(self.folder.logging(self.console))
                return self._execute(trainer, stop, started)
            except StopRequested as stopped:
                finish_wandb(1)
                again = f"the same command with run_dir={self.folder.path} goes on from here"
                logger.info("%s: %s", stopped, again)
                raise SystemExit(128 + stopped.signal) from None
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the device's memory is full ({str(error).splitlines()[0]}): lower "
                    "batching.tokens_per_microbatch (results do not change) or set "
                    "backbone.gradient_checkpointing=true; the same command resumes"
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
        data = self._tokenise(trainer)
        datamodule = GroupDataModule(data.train, data.validation, self.batching, self.seed)
        datamodule.plan(trainer.world_size)  # refuses impossible batches before the model is built
        if datamodule.dropped_groups:
            logger.info("%d groups of a last partial step are left out", datamodule.dropped_groups)
        if trainer.is_global_zero:
            begin(self.folder, self.config, data.fingerprints(), datamodule.total_steps)
        pl.seed_everything(self.seed, workers=True, verbose=False)
        module = self._module(data, trainer)
        checkpoints = self._fit(trainer, module, datamodule, stop)
        value = None
        if trainer.is_global_zero:
            value = self._finish(trainer, module, data, checkpoints, started)
        return trainer.strategy.broadcast(value)

    def _trainer(self) -> pl.Trainer:
        """The Trainer, before anything slow: wrong hardware settings show at once."""
        given = dict(getattr(self.make_trainer, "keywords", {}))
        for name, place in SET_BY_RUN.items():
            if given.get(name) not in (None, False):
                raise UserError(f"trainer.{name} is set by this project: use {place}")
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        trainer = self.make_trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=1,
            limit_val_batches=0 if self.schedule.validate_every is None else 1.0,
            default_root_dir=str(self.folder.path),
            plugins=[*(given.get("plugins") or []), AtomicCheckpointIO()],
        )
        # On the CPU Lightning makes bf16-mixed of 16-mixed without asking.
        asked = str(given.get("precision", trainer.precision))
        if trainer.precision not in ("32-true", "bf16-mixed") or asked.startswith("16"):
            raise UserError(
                f"trainer.precision={asked} keeps no fp32 weights or needs loss "
                "scaling: use 32-true or bf16-mixed"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != trainer.world_size and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(
                f"torchrun started {started} processes for {trainer.world_size} devices: set "
                "trainer.devices (and num_nodes) to match, and trainer.strategy=ddp"
            )
        ranks = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size > 1 and not (ranks and ranks.creates_processes_externally):
            raise UserError(
                f"{trainer.world_size} devices need one process each: start them with torchrun "
                f"--nproc-per-node={trainer.num_devices} -m helpsteer2 train …, or with srun"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"trainer.strategy={type(trainer.strategy).__name__} is not supported: use auto "
                "or ddp"
            )
        return trainer

    def _recorded(self, result: Mapping[str, Any]) -> float | None:
        logger.info("%s is finished: its result.json is what counts", self.folder.path)
        if self.optimized_metric is None:
            return None
        return require_metric(self.optimized_metric, result["metrics"])

    def _tokenise(self, trainer: pl.Trainer) -> _Data:
        """Tokenizer and tokenised splits; rank zero makes what the others read."""
        with _rank_zero_first(trainer):
            tokenizer = self.backbone.tokenizer.build(self._texts, self.cache_dir)
            chat = self.chat.bind(tokenizer)
            train = self._split("train", chat)
            validation = None
            if self.schedule.validate_every is not None:
                validation = self._split("validation", chat)
        for split, groups in (("training", train), ("validation", validation)):
            means = [] if groups is None else groups.rating_means().tolist()
            unrated = [n for n, mean in zip(self.attributes, means, strict=False) if mean != mean]
            if unrated:
                message = f"no response of the {split} data is rated on {', '.join(unrated)}"
                if len(unrated) == len(means):
                    raise UserError(f"{message}: there is nothing to learn or to measure")
                logger.warning("%s", message)
        return _Data(tokenizer, chat, train, validation)

    def _split(self, split: str, chat: BoundChat) -> TokenisedGroups:
        return tokenise(self.data, split, chat, self.lengths, self.attributes, self.cache_dir)

    def _texts(self) -> Iterator[str]:
        """Texts of the training data, for a tokenizer that is trained on them."""
        for group in read_all(self.data, "train"):
            yield from (message["content"] for message in group.prompt)
            yield from group.responses

    def _module(self, data: _Data, trainer: pl.Trainer) -> StepModule:
        device = trainer.strategy.root_device
        autocast = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
        backbone = self.backbone.build(data.tokenizer, self.seed, device, autocast)
        base = self.backbone.path if self.backbone.init == "pretrained" else None
        spec = RewardSpec.of(
            self.attributes,
            data.chat,
            data.tokenizer,
            self.lengths,
            base or f"random {backbone.config.model_type}",
            data=f"{type(self.data).__name__} ({data.train.fingerprint[:12]})",
            weights=self.weights,
            rating_means=tuple(data.train.rating_means().tolist()),
            rating_stds=tuple(data.train.rating_stds().tolist()),
        )
        module = self.make_module(model=RewardModel(backbone, spec))
        module.model.spec = replace(spec, objective=module.objective)
        return module

    def _fit(
        self,
        trainer: pl.Trainer,
        module: StepModule,
        datamodule: GroupDataModule,
        stop: StopSignals,
    ) -> Checkpoints:
        view = None
        if self.wandb is not None and trainer.is_global_zero:
            view = self.wandb.open(self.folder.path, self.config or {})
        checkpoints = Checkpoints(
            self.folder.checkpoints, self.schedule, stop, self.optimized_metric
        )
        self.metrics_log = MetricsLog(self.folder.metrics, view)
        self.progress = ProgressReport(self.console)
        trainer.callbacks += [
            BadBatch(self.folder.bad_batch), self.metrics_log, self.progress, stop, checkpoints,
        ]  # fmt: skip
        trainer.fit_loop.epoch_loop.max_steps = datamodule.total_steps
        last = self.folder.checkpoints / LAST
        resume = trainer.strategy.broadcast(str(last) if last.exists() else None)
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        return checkpoints

    def _finish(
        self,
        trainer: pl.Trainer,
        module: StepModule,
        data: _Data,
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
        module.model.save_pretrained(self.folder.export, data.tokenizer)
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
            reports={
                "train": data.train.report,
                "validation": None if data.validation is None else data.validation.report,
            },
            speed=self.progress.throughput.summary(),
            wall_seconds=time.monotonic() - started,
            config=self.config,
        )
        self.folder.write_result(result)
        finish_wandb(0)
        print_summary(self.console, self.folder, result, self.attributes)
        return value


@contextmanager
def _rank_zero_first(trainer: pl.Trainer) -> Iterator[None]:
    """Run a block on rank zero, then on the others."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier("rank zero first")
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier("rank zero first")


def _clean_up() -> None:
    """Leave nothing to the next job of a sweep in this process."""
    finish_wandb(1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
