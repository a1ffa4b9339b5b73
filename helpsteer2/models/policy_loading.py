"""Reading a policy: our exports, their adapters beside a base, and the causal LMs of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import UserError
from helpsteer2.models.adapter import (
    base_path,
    load_base,
    put_adapter,
    read_config,
    read_tensors,
)
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.loading import load_tokenizer, local_folder
from helpsteer2.models.lora import is_adapter, require_peft
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.spec import POLICY_FILE, SPEC_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from helpsteer2.models.attention import AttentionChoice


def load_policy(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"],
    attention: AttentionChoice,
    device: torch.device | str,
    base: str | Path | None,
) -> tuple[PreTrainedModel, PolicySpec, PreTrainedTokenizerBase]:
    """Load a causal LM with its tokenizer and chat format, checked against each other.

    Args:
        path: Folder or Hub id of an export, of its ``adapter``, or of any causal LM with a chat
            template of its own.
        dtype: Of the weights; adapters are fp32.
        attention: Attention backend.
        device: Where the model shall run; it is made on the CPU.
        base: Folder or Hub id of an adapter's base, if it has moved since the training.

    Returns:
        The causal LM, what it was trained with, and its tokenizer.

    Raises:
        UserError: If the folder is no policy, or one of its parts has changed.
    """
    folder = local_folder(path, "policy")
    if (folder / SPEC_FILE).is_file():
        raise UserError(f"{path} is a reward model, which writes no text: give a policy")
    tokenizer = load_tokenizer(folder)
    spec = PolicySpec.read(folder, tokenizer)
    if is_adapter(folder):
        if spec is None:
            raise UserError(
                f"{folder} is an adapter without {POLICY_FILE}, of another project: merge it into "
                "its base with peft, and give the merged model"
            )
        causal_lm = _with_adapter(folder, base, dtype, attention, device, tokenizer)
        return causal_lm, spec, tokenizer
    if base is not None:
        raise UserError(f"{path} is a whole model: base is for an adapter alone")
    if spec is None and not tokenizer.chat_template:
        raise UserError(
            f"{folder} has no chat template, so nobody could say where an answer begins and ends: "
            "train it first (module=sft), or put a chat_template.jinja there"
        )
    name = str(folder)
    backbone = Backbone(PretrainedTokenizer(name), path=name, dtype=dtype, attention=attention)
    try:
        causal_lm = backbone.build(tokenizer, seed=0, device=device, lm_head=True)
    except UserError as error:
        raise UserError(f"{path} cannot be used as a policy: {error}") from error
    return causal_lm, spec or _foreign_spec(folder, causal_lm.config, tokenizer), tokenizer


def _with_adapter(
    folder: Path,
    base: str | Path | None,
    dtype: Literal["float32", "bfloat16"],
    attention: AttentionChoice,
    device: torch.device | str,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """The base with the adapter beside its weights, unmerged."""
    require_peft()
    config = read_config(folder)
    tensors, fingerprint = read_tensors(folder)
    where = base_path(config, base, folder)
    causal_lm = load_base(where, folder, dtype, attention, device, tokenizer, lm_head=True)
    refusal = f"{folder} is no adapter of {where}"
    put_adapter(causal_lm.base_model, config, tensors, fingerprint, refusal)
    return causal_lm


def _foreign_spec(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PolicySpec:
    """A spec for a model of others, whose limits share the positions it was built for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    limits = LengthLimits(positions - positions // 2, positions // 2)
    chat = ChatFormat("backbone").bind(tokenizer)
    return PolicySpec(chat, limits, folder.name, label_attributes=None)
