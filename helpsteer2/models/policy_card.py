"""The model cards of an exported policy: only what the spec knows, nothing invented."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from helpsteer2.data.labels import HIGHEST, INFERENCE_VALUES, AttributeLabel
from helpsteer2.models.card import ADAPTER_FOLDER, base_note

if TYPE_CHECKING:
    from helpsteer2.models.policy_export import PolicySpec


def policy_card(
    spec: PolicySpec, class_name: str, n_parameters: int, has_adapter: bool = False
) -> str:
    """Write the README of an export.

    Args:
        spec: What the policy was trained with.
        class_name: The transformers class of the folder.
        n_parameters: Parameters, an embedding that is the LM head as well counted once.
        has_adapter: Whether adapters were merged, and lie beside the weights in their own folder.

    Returns:
        Markdown with a YAML header.
    """
    chat, limits = spec.chat, spec.limits
    system = json.dumps(chat.system_prompt, ensure_ascii=False)
    stop = chat.tokenizer.convert_ids_to_tokens(spec.stop_token_id)
    adapter = (
        f"- Weights: those of {spec.base_model} with LoRA adapters merged into them, rounded to "
        f"the type of the weights. `{ADAPTER_FOLDER}/` holds the adapters alone and exact, in "
        "peft's format.\n"
    )
    load = (
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
    )
    return (
        f"{_header('transformers')}"
        "# Policy\n\n"
        f"- Class: `{class_name}`, {n_parameters:,} parameters\n"
        f"- Backbone: {spec.base_model}\n"
        f"{adapter if has_adapter else ''}"
        f"- Trained on: {spec.data or 'not recorded'}\n"
        f"- Objective: {spec.objective or 'not recorded'}\n"
        f"- Chat template `{chat.template_name}`, hash `{chat.template_hash}` (in "
        f"`chat_template.jinja`); an answer ends with `{stop}`\n"
        f"- System prompt: {'none' if chat.system_prompt is None else system}\n"
        f"{_label_line(spec)}"
        f"- Trained on at most {limits.max_prompt_tokens} prompt and "
        f"{limits.max_response_tokens} response tokens\n\n"
        "## Use\n\n"
        "```python\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"{_answering_code(spec, load)}"
        "```\n"
    )


def policy_adapter_card(spec: PolicySpec, base: str) -> str:
    """Write the README of the adapters alone.

    Args:
        spec: What the policy was trained with.
        base: Folder or Hub id of the base.

    Returns:
        Markdown with a YAML header.
    """
    load = (
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        "model = PeftModel.from_pretrained(base, folder).eval()\n"
        "model.generation_config = GenerationConfig.from_pretrained(folder)\n"
    )
    return (
        f"{_header('peft')}"
        "# Adapters of a policy\n\n"
        f"LoRA adapters for `{base}`. In an export, the folder above is the same model with the "
        f"adapters merged, and its card tells the rest.\n\n{base_note()} With plain peft:\n\n"
        "```python\n"
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n\n"
        f"{_answering_code(spec, load)}"
        "```\n"
    )


def _header(library: str) -> str:
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags: [helpsteer2]\n---\n\n"
    )


def _answering_code(spec: PolicySpec, load: str) -> str:
    """Python that loads a policy from ``folder`` and has it answer a question."""
    chat, system = spec.chat, ""
    if chat.system_prompt is not None:
        text = json.dumps(chat.system_prompt, ensure_ascii=False)
        system = f'{{"role": "system", "content": {text}}},\n          '
    bos = "[tokenizer.bos_token_id] + " if chat.adds_bos else ""
    label = _usual_label(spec)
    labelled = "" if label is None else f"text += {chat.labels.text(label)!r}\n"
    return (
        'folder = "."\n'
        f"{load}"
        "\n"
        f'prompt = [{system}{{"role": "user", "content": "What is 2+2?"}}]\n'
        "text = tokenizer.apply_chat_template(\n"
        "    prompt, tokenize=False, add_generation_prompt=True, enable_thinking=False\n"
        ")\n"
        f"{labelled}"
        f"ids = torch.tensor([{bos}tokenizer(text, add_special_tokens=False).input_ids])\n"
        # peft's generate takes its inputs by name.
        "answer = model.generate(input_ids=ids, max_new_tokens=256)[0, ids.shape[1]:]\n"
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n"
    )


def _usual_label(spec: PolicySpec) -> AttributeLabel | None:
    """The label that a labelled policy is asked with where nobody says otherwise."""
    names = spec.label_attributes
    if not names:
        return None
    return AttributeLabel.of({name: INFERENCE_VALUES.get(name, HIGHEST) for name in names})


def _label_line(spec: PolicySpec) -> str:
    """What stands behind the prompts of a labelled policy."""
    label = _usual_label(spec)
    if label is None:
        return ""
    text = json.dumps(spec.chat.labels.text(label), ensure_ascii=False)
    return (
        "- Answers behind attribute labels, whole numbers 0–4: the text of a prompt ends with "
        f"`{text}`, for example\n"
    )
