"""Reading a model from an unmerged adapter and the base that it was trained beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.export import check_pad_token
from helpsteer2.models.loading import LoadedReward, checked_chat, load_tokenizer
from helpsteer2.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FINGERPRINT,
    HEAD,
    adapter_tensors,
    frozen_fingerprint,
    inject,
    merged_folder,
    require_peft,
)
from helpsteer2.models.spec import SPEC_FILE, RewardSpec

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpsteer2.models.attention import AttentionChoice


def load_adapter(
    folder: Path,
    base: str | Path | None,
    dtype: Literal["float32", "bfloat16"],
    attention: AttentionChoice,
    device: torch.device | str,
) -> LoadedReward:
    """Load the base of an adapter and put the adapter beside its weights, unmerged.

    Args:
        folder: The ``adapter`` folder of an export of ours.
        base: Folder or Hub id of the base; None takes the one that the adapter names.
        dtype: Of the base. Adapters and head are fp32.
        attention: Attention backend.
        device: Where the model shall run.

    Returns:
        The parts, with every dropout 0.

    Raises:
        UserError: If the adapter is not ours or damaged, or the base is not the one it was trained
            beside.
    """
    require_peft()
    config, spec = read_config(folder), RewardSpec.read(folder)
    if spec is None:
        raise UserError(
            f"{folder} is an adapter without {SPEC_FILE}, of another project: merge it into its "
            "base with peft, and give the merged model"
        )
    tensors, fingerprint = read_tensors(folder)
    weight = tensors.pop(HEAD, None)
    if weight is None:
        raise UserError(f"{folder} has no reward head ({HEAD}): export the model again")
    path = base_path(config, base, folder)
    tokenizer = load_tokenizer(folder)
    model = load_base(path, folder, dtype, attention, device, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id  # of the base it may have none
    check_pad_token(model.config, tokenizer, str(folder))
    chat = checked_chat(spec, model.config, tokenizer, folder)
    put_adapter(model, config, tensors, fingerprint, f"{folder} is no adapter of {path}")
    hidden_size = model.config.get_text_config().hidden_size
    if tuple(weight.shape) != (len(spec.attribute_names), hidden_size):
        raise UserError(
            f"{folder}: the head is {tuple(weight.shape)}, {SPEC_FILE} and the base want "
            f"{(len(spec.attribute_names), hidden_size)}"
        )
    head = nn.Linear(hidden_size, len(spec.attribute_names), bias=False, device="meta")
    head.weight = nn.Parameter(weight.float())
    return LoadedReward(model, head, spec, tokenizer, chat)


def base_path(config: LoraConfig, base: str | Path | None, folder: Path) -> str:
    """Where the base of an adapter lies.

    Args:
        config: The adapter's.
        base: What the user says; None takes what the adapter names.
        folder: The adapter's, for the message.

    Raises:
        UserError: If neither says it.
    """
    path = str(base or config.base_model_name_or_path or "")
    if not path:
        raise UserError(f"{folder} does not say what its base is: {_elsewhere(folder)}")
    return path


def read_config(folder: Path) -> LoraConfig:
    """The peft configuration of an adapter folder.

    Raises:
        UserError: If it is damaged, or no LoRA.
    """
    from peft import LoraConfig

    try:
        kind = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8")).get("peft_type")
        if kind != "LORA":
            raise UserError(f"{folder} is an adapter of type {kind}: only LORA can be read")
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: {ADAPTER_CONFIG} is damaged ({error})") from error
    assert isinstance(config, LoraConfig)
    # They concern the classifier around the decoder, whose head is read apart.
    config.task_type = config.modules_to_save = None
    config.inference_mode = False
    return config


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The stored tensors, and the fingerprint of the weights they were trained beside.

    Raises:
        UserError: If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(FINGERPRINT)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: {ADAPTER_WEIGHTS} is damaged ({error})") from error


def load_base(
    path: str,
    folder: Path,
    dtype: Literal["float32", "bfloat16"],
    attention: AttentionChoice,
    device: torch.device | str,
    tokenizer: PreTrainedTokenizerBase,
    lm_head: bool = False,
) -> PreTrainedModel:
    """The base of an adapter.

    Args:
        path: Where it lies: a folder or a Hub id.
        folder: The adapter's, for the message.
        dtype: Of the weights.
        attention: Attention backend.
        device: Where the model shall run.
        tokenizer: The adapter's; its vocabulary must fit the embedding.
        lm_head: Whether to give the causal LM around the decoder.

    Raises:
        UserError: If it cannot be used.
    """
    backbone = Backbone(PretrainedTokenizer(path), path=path, dtype=dtype, attention=attention)
    try:
        return backbone.build(tokenizer, seed=0, device=device, lm_head=lm_head)
    except UserError as error:
        raise UserError(
            f"{folder} is an adapter of {path}, which cannot be used ({error}). If the base lies "
            f"elsewhere now, {_elsewhere(folder)}"
        ) from error


def _elsewhere(folder: Path) -> str:
    """What helps every command, and needs no option of any, if the base of an adapter moved."""
    whole = merged_folder(folder)
    instead = "" if whole is None else f"; or give {whole}, the same model with the adapter merged"
    return f"write its path as base_model_name_or_path into {folder / ADAPTER_CONFIG}{instead}"


@torch.no_grad()
def put_adapter(
    model: PreTrainedModel,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    fingerprint: str | None,
    refusal: str,
) -> None:
    """Put a stored adapter into its base, in place.

    Args:
        model: The base's decoder.
        config: The adapter's, as ``read_config`` gives it.
        tensors: Its weights by peft's names, all of the decoder.
        fingerprint: Of the weights that it was trained beside, None if not known.
        refusal: What the message begins with, if they do not belong together.

    Raises:
        UserError: Beginning with ``refusal``, if the base is another one.
    """
    try:
        inject(model, config)
    except ValueError as error:  # none of the layers is there
        raise UserError(f"{refusal}: {error}") from error
    places = adapter_tensors(model)
    wrong = {
        "missing": tensors.keys() - places.keys(),
        "without a tensor": places.keys() - tensors.keys(),
        "of another shape": {
            name
            for name in places.keys() & tensors.keys()
            if places[name].shape != tensors[name].shape
        },
    }
    found = [f"{len(names)} {kind} ({min(names)}, …)" for kind, names in wrong.items() if names]
    if found:
        raise UserError(f"{refusal}: of its layers there are {'; '.join(found)}")
    if fingerprint is not None and frozen_fingerprint(model) != fingerprint:
        raise UserError(
            f"{refusal}: the layers are the same, but not the weights that it was trained beside"
        )
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
