"""LoRA: low-rank adapters beside the frozen weights of a decoder, made by peft.

peft puts its layers into the decoder in place. The decoder's class stays, and with it packed
attention and the training step. Only the adapters train, in fp32 whatever the type of the weights
beside them.

Source: arXiv 2106.09685, section 4.1: ``W x + alpha / rank · B A x``, B zero at the start.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from helpsteer2.errors import UserError
from helpsteer2.models.adapted_linear import speed_up
from helpsteer2.models.spec import POLICY_FILE, SPEC_FILE

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

NAME = "default"
"""peft's name for the one adapter of a model."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = f"{PREFIX}score.weight"
"""peft's names, in its folders, for the model around the decoder and for the reward head."""

FINGERPRINT = "base_fingerprint"
"""Where an adapter file tells of the weights that it was trained beside."""

SAMPLED = 256
"""Values of each frozen weight that go into a fingerprint, about."""


@dataclass(frozen=True)
class Lora:
    """What the adapters are; nothing is made before ``inject``.

    Args:
        rank: Inner dimension of the adapters.
        alpha: The adapters' output is multiplied by ``alpha / rank``.
        target_modules: Names of the linear layers that get an adapter, or ``all-linear``.
        dropout: Share of an adapter's inputs that are dropped in training. What is dropped follows
            the run's seed, the step and how the step is cut into micro-batches.

    Raises:
        UserError: If a value makes no sense, or peft is not installed.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: Literal["all-linear"] | Sequence[str] = ("q_proj", "v_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                "backbone.lora: rank has to be 1 or more, alpha above 0 and dropout from 0 to "
                f"below 1, got {self.rank}, {self.alpha} and {self.dropout}"
            )
        if not self.target_modules:
            raise UserError("backbone.lora.target_modules is empty: name a linear layer")
        require_peft()

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the layers that get an adapter, as peft looks for them.

        Args:
            model: The decoder, with or without weights.

        Raises:
            UserError: If a name is no linear layer's.
        """
        layers = linear_layers(model)
        names = sorted({layer.rpartition(".")[2] for layer in layers})
        if self.target_modules == "all-linear":
            return names
        wanted = list(self.target_modules)
        for name in wanted:
            if not any(f".{layer}".endswith(f".{name}") for layer in layers):
                near = get_close_matches(name, names, n=1)
                raise UserError(
                    f"backbone.lora.target_modules: {type(model).__name__} has no linear layer "
                    f"{name!r}{f', did you mean {near[0]}?' if near else ''}; there are "
                    f"{', '.join(names)} (or all-linear)"
                )
        return wanted

    def inject(self, model: PreTrainedModel, seed: int, base: str | None = None) -> None:
        """Freeze a decoder and put adapters into it, in place; the scores stay what they are.

        Args:
            model: The decoder, without LM head.
            seed: Seed of the adapters' first weights; the global generator is left alone.
            base: Folder or Hub id that holds exactly these weights, None if there is none. It is
                written into exported adapters.

        Raises:
            UserError: If a target is no layer of the decoder.
        """
        from peft import LoraConfig

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.targets(model),
            lora_dropout=self.dropout,
            base_model_name_or_path=base,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject(model, config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "LoRA of rank %d on %s: %s weights train beside %s frozen ones",
            self.rank,
            ", ".join(sorted(config.target_modules)),
            f"{trained:,}",
            f"{sum(p.numel() for p in model.parameters()) - trained:,}",
        )


def require_peft() -> None:
    """Say how to get peft where it is not installed.

    Raises:
        UserError: If it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("LoRA needs peft: pip install 'helpsteer2[lora]'")


def linear_layers(model: nn.Module) -> list[str]:
    """Dotted names of the layers that can have an adapter."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]


def inject(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze a decoder and put peft's layers into it, in place.

    Args:
        model: The decoder, without LM head.
        config: peft's own; its layers have to be there.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, adapter_name=NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft gives adapters the type of the frozen weights
            parameter.data = parameter.data.float()
    speed_up(model, NAME)


def adapter_config(model: nn.Module) -> LoraConfig | None:
    """The peft configuration of a decoder's adapters, None if it has none."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    return configs.get(NAME)


def merged(model: nn.Module) -> AbstractContextManager[None]:
    """Put plain layers in the place of those with adapters, for as long as the block lasts.

    Their weights are the frozen ones plus the adapters' product, added in fp32, rounded once to the
    type of the frozen ones, and held on the CPU. The trained layers come back untouched.

    Args:
        model: A model with or without adapters; without, nothing happens.
    """
    return _replaced(model, _merged_layer)


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Put the frozen layers in the place of those with adapters, for as long as the block lasts.

    The model is then what it was before any training, with no second copy of its weights.

    Args:
        model: A model with or without adapters; without, nothing happens.
    """
    return _replaced(model, lambda layer: layer.get_base_layer())


@contextmanager
def _replaced(model: nn.Module, stand_in: Callable[[Any], nn.Module]) -> Iterator[None]:
    """Put other layers in the place of those with adapters, and these back in the end."""
    if adapter_config(model) is None:
        yield
        return
    from peft.tuners.lora import LoraLayer

    layers = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    try:
        for name, layer in layers.items():
            _put(model, name, stand_in(layer))
        yield
    finally:
        for name, layer in layers.items():
            _put(model, name, layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


@torch.no_grad()
def _merged_layer(layer: Any) -> nn.Module:
    """The frozen layer with the adapter's product added to a copy of its weight."""
    base: nn.Module = layer.get_base_layer()
    old = base.weight
    assert isinstance(old, nn.Parameter)
    weight = (old.float() + layer.get_delta_weight(NAME)).to(old.dtype).cpu()
    plain = copy.copy(base)
    plain._parameters = {**base._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return plain


@torch.no_grad()
def frozen_fingerprint(model: nn.Module) -> str | None:
    """Hash of the frozen weights: their names, shapes and some values of each.

    The values are rounded to bf16 first, so that a model has the same fingerprint in both types.

    Args:
        model: Any model.

    Returns:
        A hexadecimal hash, None if nothing is frozen.
    """
    digest = None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        digest = digest or hashlib.sha256()
        values = parameter.reshape(-1)
        sample = values[:: max(1, values.numel() // SAMPLED)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest() if digest else None


def adapter_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The adapters' weights under the names that peft stores them by.

    Args:
        model: A decoder with adapters.

    Returns:
        The live tensors, not copies.
    """
    return {
        f"{PREFIX}{model.base_model_prefix}.{name}".replace(f".{NAME}.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    return all((folder / name).is_file() for name in files) and not any(
        folder.glob("model*.safetensors")
    )


def merged_folder(adapter: Path) -> Path | None:
    """The folder of the same model with the adapters merged.

    Args:
        adapter: Folder with adapters alone.

    Returns:
        The folder above, if an export put the adapters there; None if they stand alone.
    """
    adapter = adapter.resolve()
    above = adapter.parent
    for name in (SPEC_FILE, POLICY_FILE):
        ours, theirs = adapter / name, above / name
        # An export writes the very same record twice; of other models it would tell other things.
        if ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes():
            return above if any(above.glob("model*.safetensors")) else None
    return None


def adapter_refusal(folder: Path) -> str:
    """Why adapters cannot stand where a whole model is wanted, and what can.

    Args:
        folder: Holds adapters alone.
    """
    whole = merged_folder(folder)
    return f"{folder} holds an adapter only: " + (
        "merge it into its base model first"
        if whole is None
        else f"give {whole}, the same model with the adapter merged"
    )


def write_adapter(folder: Path, model: PreTrainedModel, head: nn.Linear | None) -> None:
    """Write a decoder's adapters as peft does, for ``peft.PeftModel.from_pretrained``.

    Args:
        folder: A new folder.
        model: A decoder with adapters.
        head: The reward head, fp32 without bias; None for the adapter of a causal LM.
    """
    from peft import TaskType
    from safetensors.torch import save_file

    config = copy.copy(adapter_config(model))
    assert config is not None
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order changes with the run
    config.task_type = TaskType.CAUSAL_LM if head is None else TaskType.SEQ_CLS
    config.modules_to_save = None if head is None else ["score"]
    tensors = adapter_tensors(model)
    if head is not None:
        tensors[HEAD] = head.weight.detach()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    fingerprint = frozen_fingerprint(model)
    assert fingerprint is not None
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt", FINGERPRINT: fingerprint})
