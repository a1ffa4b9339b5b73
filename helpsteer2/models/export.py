"""Writing a reward model: one folder for scoring, further training and plain transformers.

The folder is an ordinary sequence classifier of transformers (``LlamaForSequenceClassification`` or
one like it, labels named after the attributes, no remote code) with tokenizer and chat template,
plus ``reward_model.json`` and a model card. ``helpsteer2.models.loading`` reads it.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import UserError
from helpsteer2.models.card import ADAPTER_FOLDER, adapter_card, model_card
from helpsteer2.models.lora import adapter_config, merged, write_adapter
from helpsteer2.models.spec import POLICY_FILE, SPEC_FILE, RewardSpec
from helpsteer2.records import reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SHARD_SIZE = "5GB"
"""Larger models are cut into several safetensors files with an index."""


def check_pad_token(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a model whose padding cannot be told from text.

    Plain transformers finds the token to score as the rightmost one that is not padding: with
    pad == eos it reads the token *before* the closing one.

    Args:
        config: The model's config.
        tokenizer: Its tokenizer.
        name: Where the model lies, for the message.

    Raises:
        UserError: If the pad token is an end-of-sequence token, or the two disagree about it.
    """
    pad = config.get_text_config().pad_token_id
    eos = config.get_text_config().eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    if pad is not None and pad in ends:
        raise UserError(
            f"{name}: the pad token (id {pad}) is also an end-of-sequence token, so the token to "
            "score cannot be told from padding: give config.json and the tokenizer a pad token of "
            "their own (any unused special token)"
        )
    if pad != tokenizer.pad_token_id and None not in (pad, tokenizer.pad_token_id):
        raise UserError(
            f"{name}: config.json pads with id {pad}, the tokenizer with {tokenizer.pad_token_id}"
        )


def write_export(
    folder: str | Path,
    backbone: PreTrainedModel,
    head: nn.Linear,
    spec: RewardSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the whole folder beside its place, then put it there in one step.

    Args:
        folder: Where the model shall lie; an older export there stays whole until the new one is.
        backbone: Decoder without LM head, of any floating type. Its adapters are merged into it,
            and lie unmerged in the folder's ``adapter`` if others can load their base.
        head: fp32 ``(A, H)`` without bias.
        spec: What the scores depend on.
        tokenizer: The backbone's tokenizer, with a pad token of its own.

    Raises:
        UserError: If the model has no plain form, or the folder cannot be written (disk full, …).
        ValueError: If the tokenizer is another one, or the head is not fp32.
    """
    from transformers import AutoTokenizer

    if tokenizer_hash(tokenizer) != spec.tokenizer_hash:
        raise ValueError("this is not the tokenizer that the model's spec was made with")
    classifier = _classifier(backbone, head, spec, tokenizer)
    check_pad_token(classifier.config, tokenizer, "the model to save")
    chat = BoundChat(tokenizer, spec.template_name, spec.template_text, spec.system_prompt)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = spec.template_text
    base = adapter_base(backbone)
    with replaced_folder(folder, SPEC_FILE) as aside:
        with merged(backbone), no_progress_bar():
            classifier.save_pretrained(aside, max_shard_size=SHARD_SIZE)
            size = sum(parameter.numel() for parameter in classifier.parameters())
        tokenizer.save_pretrained(aside)
        # Saving puts the chat template in and may reorder things: the hash is that of the files.
        saved = AutoTokenizer.from_pretrained(aside, trust_remote_code=False)
        spec = replace(spec, tokenizer_hash=tokenizer_hash(saved))
        spec.write(aside)
        card = model_card(spec, type(classifier).__name__, size, chat.adds_bos, base is not None)
        readme = aside / "README.md"
        readme.write_text(card, encoding="utf-8")
        if base is not None:
            adapter = aside / ADAPTER_FOLDER
            write_adapter(adapter, backbone, head)
            tokenizer.save_pretrained(adapter)
            spec.write(adapter)
            (adapter / "README.md").write_text(adapter_card(spec, base, chat.adds_bos), "utf-8")
        share(aside)


def adapter_base(backbone: PreTrainedModel) -> str | None:
    """Where others find the base of a decoder's adapters; None without adapters or such a base."""
    config = adapter_config(backbone)
    if config is not None and config.base_model_name_or_path is None:
        logger.info(
            "no folder with the adapters alone is written: their base is random, or a changed one, "
            "which nobody could load"
        )
    return None if config is None else config.base_model_name_or_path


def _classifier(
    backbone: PreTrainedModel,
    head: nn.Linear,
    spec: RewardSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """The plain transformers model around the very same weights: nothing is copied."""
    from transformers import AutoModelForSequenceClassification

    if head.bias is not None:
        raise UserError("a head with a bias has no place in transformers' sequence classifiers")
    if head.weight.dtype != torch.float32:
        raise ValueError(f"the reward head must stay fp32, it is {head.weight.dtype}")
    config = copy.deepcopy(backbone.config)
    names = spec.attribute_names
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "regression"
    pad, rows = tokenizer.pad_token_id, backbone.get_input_embeddings().num_embeddings
    if pad is None or pad >= rows:
        raise UserError(f"a reward model needs a pad token id below {rows}, got {pad}")
    config.pad_token_id = config.get_text_config().pad_token_id = pad
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(
                config, attn_implementation="eager"
            )
    except ValueError as error:
        raise UserError(
            f"transformers has no sequence classifier for {type(backbone).__name__}, so it cannot "
            "be exported: choose another backbone"
        ) from error
    prefix = classifier.base_model_prefix
    if type(getattr(classifier, prefix)) is not type(backbone) or not has_score_head(classifier):
        raise UserError(
            f"{type(classifier).__name__} is no {type(backbone).__name__} with a linear `score`, "
            "so it cannot be exported: choose another backbone"
        )
    setattr(classifier, prefix, backbone)
    classifier.score = head
    return classifier


def has_score_head(classifier: PreTrainedModel) -> bool:
    """Whether a transformers classifier is a decoder with one linear ``score`` layer."""
    encoder = getattr(classifier.config, "is_encoder_decoder", False)
    return not encoder and isinstance(getattr(classifier, "score", None), nn.Linear)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar while it saves: it would break into that of training."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def share(folder: Path) -> None:
    """Give the weights of a folder the mode of its other files: safetensors makes them private."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def previous_folder(folder: Path) -> Path:
    """Where an old folder lies for the moment in which the new one takes its place."""
    return folder.with_name(f".{folder.name}.previous")


@contextmanager
def replaced_folder(folder: str | Path, marker: str) -> Iterator[Path]:
    """Write a folder aside; put it in place only when it is whole and on the disk.

    Args:
        folder: The final place: missing, empty, or an older export.
        marker: File that tells an older export from other folders.

    Yields:
        An empty folder to write into.

    Raises:
        UserError: If the place holds other things, or writing fails; the old folder is as it was.
    """
    folder = Path(folder).resolve()
    aside, previous = folder.with_name(f".{folder.name}.writing"), previous_folder(folder)
    try:
        if previous.exists() and not folder.exists():  # killed between the two renames below
            previous.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if folder.exists() and any(folder.iterdir()) and not (folder / marker).exists():
            raise UserError(
                f"{folder} holds other files: choose an empty folder or an older export"
            )
        yield aside
        _sync(aside)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        aside.rename(folder)
        _sync_path(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors tells a full disk in its own error
        told = reason(error) if isinstance(error, OSError) else error
        raise UserError(
            f"cannot write {folder}: {told}; what was there before is untouched"
        ) from error
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have every file of a folder, and the folder itself, reach the disk."""
    for path in folder.rglob("*"):
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload an export to the Hugging Face Hub.

    Args:
        folder: An export of a reward model or a policy.
        repo_id: ``owner/name``; made if it does not exist.
        private: Whether a new repository is private.

    Returns:
        Address of the commit.

    Raises:
        UserError: If the folder is no export, or at once if the Hub is out of reach.
    """
    from helpsteer2.data.hub import require_hub

    if RewardSpec.read(Path(folder)) is None and not (Path(folder) / POLICY_FILE).is_file():
        raise UserError(f"{folder} is no export: it has no {SPEC_FILE} and no {POLICY_FILE}")
    require_hub(f"a place for {repo_id!r}", f"the model stays usable in {folder}")
    from huggingface_hub import create_repo, upload_folder

    create_repo(repo_id, exist_ok=True, private=private)
    return str(upload_folder(repo_id=repo_id, folder_path=str(folder)))
