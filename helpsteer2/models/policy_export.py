"""Writing a policy: a plain causal LM of transformers, with what it was trained with beside it.

The folder is what ``AutoModelForCausalLM.from_pretrained`` and inference servers take: weights,
tokenizer, chat template, and a generation config that stops where the template closes an answer.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.models.export import SHARD_SIZE, no_progress_bar, replaced_folder, share
from helpsteer2.models.lora import merged
from helpsteer2.models.spec import POLICY_FILE
from helpsteer2.records import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicySpec:
    """What a policy was trained with, beside its weights.

    Attributes:
        chat: The chat format bound to the policy's tokenizer.
        limits: Longest prompt and response of the training, in tokens.
        base_model: Hub id or description of the backbone before training.
        data: What it was trained on, in words.
        objective: The loss it was trained with, in words.
    """

    chat: BoundChat
    limits: LengthLimits
    base_model: str
    data: str = ""
    objective: str = ""

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
        }


def write_policy(
    folder: str | Path,
    causal_lm: PreTrainedModel,
    spec: PolicySpec,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the whole folder beside its place, then put it there in one step.

    Args:
        folder: Where the policy shall lie; an older export there stays whole until the new one is.
        causal_lm: Decoder and LM head, of any floating type; its adapters are merged into it.
        spec: What it was trained with.
        tokenizer: The tokenizer of the spec.

    Raises:
        UserError: If the folder cannot be written (disk full, …).
        ValueError: If the tokenizer is another one.
    """
    from transformers import AutoTokenizer, GenerationConfig

    if tokenizer_hash(tokenizer) != tokenizer_hash(spec.chat.tokenizer):
        raise ValueError("this is not the tokenizer that the policy's spec was made with")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = spec.chat.template_text
    # A new one: settings for sampling that came with the backbone were made for other weights.
    causal_lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=spec.stop_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with replaced_folder(folder, POLICY_FILE) as aside:
        with no_progress_bar(), merged(causal_lm.base_model):
            causal_lm.save_pretrained(aside, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(aside)
        saved = AutoTokenizer.from_pretrained(aside, trust_remote_code=False)
        record = json.dumps(plain(spec.record(saved)), indent=2, ensure_ascii=False)
        (aside / POLICY_FILE).write_text(f"{record}\n", encoding="utf-8")
        card = policy_card(spec, type(causal_lm).__name__, causal_lm.num_parameters())
        (aside / "README.md").write_text(card, encoding="utf-8")
        share(aside)


def policy_card(spec: PolicySpec, class_name: str, n_parameters: int) -> str:
    """Write the README of an export: only what the spec knows, nothing invented.

    Args:
        spec: What the policy was trained with.
        class_name: The transformers class of the folder.
        n_parameters: Parameters, an embedding that is the LM head as well counted once.

    Returns:
        Markdown with a YAML header.
    """
    chat, limits = spec.chat, spec.limits
    system_prompt = json.dumps(chat.system_prompt, ensure_ascii=False)
    shown = "none" if chat.system_prompt is None else system_prompt
    system = (
        ""
        if chat.system_prompt is None
        else (f'{{"role": "system", "content": {system_prompt}}},\n          ')
    )
    bos = "[tokenizer.bos_token_id] + " if chat.adds_bos else ""
    stop = chat.tokenizer.convert_ids_to_tokens(spec.stop_token_id)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [helpsteer2]\n---\n\n"
        "# Policy\n\n"
        f"- Class: `{class_name}`, {n_parameters:,} parameters\n"
        f"- Backbone: {spec.base_model}\n"
        f"- Trained on: {spec.data or 'not recorded'}\n"
        f"- Objective: {spec.objective or 'not recorded'}\n"
        f"- Chat template `{chat.template_name}`, hash `{chat.template_hash}` (in "
        f"`chat_template.jinja`); an answer ends with `{stop}`\n"
        f"- System prompt: {shown}\n"
        f"- Trained on at most {limits.max_prompt_tokens} prompt and "
        f"{limits.max_response_tokens} response tokens\n\n"
        "## Use\n\n"
        "```python\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n\n"
        f'prompt = [{system}{{"role": "user", "content": "What is 2+2?"}}]\n'
        "text = tokenizer.apply_chat_template(\n"
        "    prompt, tokenize=False, add_generation_prompt=True, enable_thinking=False\n"
        ")\n"
        f"ids = torch.tensor([{bos}tokenizer(text, add_special_tokens=False).input_ids])\n"
        "answer = model.generate(ids, max_new_tokens=256)[0, ids.shape[1]:]\n"
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n"
        "```\n"
    )
