"""Writing a policy: a plain causal LM of transformers, with what it was trained with beside it.

The folder is what ``AutoModelForCausalLM.from_pretrained`` and inference servers take: weights,
tokenizer, chat template, and a generation config that stops where the template closes an answer.
``helpsteer2.models.policy_loading`` reads it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import UserError
from helpsteer2.models.card import ADAPTER_FOLDER
from helpsteer2.models.export import (
    SHARD_SIZE,
    adapter_base,
    no_progress_bar,
    replaced_folder,
    share,
)
from helpsteer2.models.lora import merged, write_adapter
from helpsteer2.models.policy_card import policy_adapter_card, policy_card
from helpsteer2.models.spec import POLICY_FILE
from helpsteer2.records import plain

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicySpec:
    """What a policy was trained with, beside its weights.

    Attributes:
        chat: The chat format bound to the policy's tokenizer.
        limits: Longest prompt and response of the training, in tokens.
        base_model: Hub id or description of the backbone before training.
        data: What it was trained on, in words.
        objective: The loss it was trained with, in words.
        label_attributes: What the labels behind its prompts were of, in their order; none if it was
            trained without labels, None if nobody knows (a model of others).
    """

    chat: BoundChat
    limits: LengthLimits
    base_model: str
    data: str = ""
    objective: str = ""
    label_attributes: tuple[str, ...] | None = ()

    @property
    def stop_token_id(self) -> int | None:
        """The token with which the template closes an answer, else the tokenizer's EOS."""
        special = set(self.chat.tokenizer.all_special_ids)
        closing = [token for token in self.chat.closing_ids if token in special]
        return closing[0] if closing else self.chat.tokenizer.eos_token_id

    def record(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
        """The content of ``policy.json``.

        Args:
            tokenizer: As it is read from the folder: saving may reorder its files.
        """
        return {
            "template_name": self.chat.template_name,
            "template_hash": self.chat.template_hash,
            "system_prompt": self.chat.system_prompt,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "limits": asdict(self.limits),
            "base_model": self.base_model,
            "data": self.data,
            "objective": self.objective,
            "label_form": self.chat.labels.form,
            "label_attributes": self.label_attributes,
        }

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PolicySpec | None:
        """Read ``policy.json``.

        Args:
            folder: An export, or its ``adapter`` folder.
            tokenizer: As it was read from there.

        Returns:
            The spec, or None if the folder has no such file (a model of another project).

        Raises:
            UserError: If the file is damaged, or tokenizer or chat template are not those that it
                was written with.
        """
        path = folder / POLICY_FILE
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            name, system_prompt = record["template_name"], record["system_prompt"]
            limits = LengthLimits(**record["limits"])
            hashes = record["tokenizer_hash"], record["template_hash"]
            rest = {key: record[key] for key in ("base_model", "data", "objective")}
            # Exports from before there were labels have neither.
            label_form, labels = record.get("label_form"), record.get("label_attributes", ())
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}): export again"
            ) from error
        # Text files may come back with other line ends.
        text = str(tokenizer.chat_template).replace("\r\n", "\n")
        found = tokenizer_hash(tokenizer), hashlib.sha256(text.encode()).hexdigest()
        parts = zip(("tokenizer", "chat template"), hashes, found, strict=True)
        changed = [part for part, then, now in parts if then != now]
        if changed:
            raise UserError(
                f"{folder}: the {' and the '.join(changed)} changed since {POLICY_FILE} was "
                "written, so ids would not be those of the training: restore the files or export "
                "again"
            )
        chat = BoundChat(tokenizer, name, text, system_prompt, label_form)
        label_attributes = None if labels is None else tuple(labels)
        return cls(chat, limits, **rest, label_attributes=label_attributes)


def write_policy(
    folder: str | Path,
    causal_lm: PreTrainedModel,
    spec: PolicySpec,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the whole folder beside its place, then put it there in one step.

    Args:
        folder: Where the policy shall lie; an older export there stays whole until the new one is.
        causal_lm: Decoder and LM head, of any floating type. Its adapters are merged into it, and
            lie unmerged in the folder's ``adapter`` if others can load their base.
        spec: What it was trained with.
        tokenizer: The tokenizer of the spec.

    Raises:
        UserError: If the folder cannot be written (disk full, …).
        ValueError: If the tokenizer is another one.
    """
    if tokenizer_hash(tokenizer) != tokenizer_hash(spec.chat.tokenizer):
        raise ValueError("this is not the tokenizer that the policy's spec was made with")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = spec.chat.template_text
    causal_lm.generation_config = _generation_config(spec)
    decoder = causal_lm.base_model
    base = adapter_base(decoder)
    with replaced_folder(folder, POLICY_FILE) as aside:
        with no_progress_bar(), merged(decoder):
            causal_lm.save_pretrained(aside, max_shard_size=SHARD_SIZE)
            size = causal_lm.num_parameters()
        card = policy_card(spec, type(causal_lm).__name__, size, base is not None)
        _write_beside(aside, spec, tokenizer, card)
        if base is not None:
            adapter = aside / ADAPTER_FOLDER
            write_adapter(adapter, decoder, None)
            _write_beside(adapter, spec, tokenizer, policy_adapter_card(spec, base))
            causal_lm.generation_config.save_pretrained(adapter)
        share(aside)


def _generation_config(spec: PolicySpec) -> GenerationConfig:
    """A new one: settings for sampling that came with the backbone were made for other weights."""
    from transformers import GenerationConfig

    tokenizer = spec.chat.tokenizer
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=spec.stop_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _write_beside(
    folder: Path, spec: PolicySpec, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Write what stands beside the weights: tokenizer with template, ``policy.json``, README."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    record = json.dumps(plain(spec.record(saved)), indent=2, ensure_ascii=False)
    (folder / POLICY_FILE).write_text(f"{record}\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
