"""The model cards of an exported reward model: only what the spec knows, nothing invented."""

from __future__ import annotations

import json
import math

from helpsteer2.models.spec import SPEC_FILE, RewardSpec

ADAPTER_FOLDER = "adapter"
"""Folder of an export with the adapters alone."""


def model_card(
    spec: RewardSpec,
    class_name: str,
    n_parameters: int,
    adds_bos: bool,
    has_adapter: bool = False,
) -> str:
    """Write the README of an export.

    Args:
        spec: What the scores depend on.
        class_name: The transformers class of the folder.
        n_parameters: Parameters of backbone and head together.
        adds_bos: Whether the ids begin with a BOS that the template does not write.
        has_adapter: Whether adapters were merged, and lie beside the weights in their own folder.

    Returns:
        Markdown with a YAML header.
    """
    parts = [
        _header(),
        "# Reward model\n",
        _what(spec, class_name, n_parameters),
        _merged(spec) if has_adapter else "",
        "## Scores\n",
        _attributes(spec),
        _weights(spec),
        "## Input\n",
        _input(spec),
        "## Use\n",
        _use(spec, adds_bos),
    ]
    return "\n".join(part for part in parts if part)


def adapter_card(spec: RewardSpec, base: str, adds_bos: bool) -> str:
    """Write the README of the adapters alone.

    Args:
        spec: What the scores depend on.
        base: Folder or Hub id of the base.
        adds_bos: Whether the ids begin with a BOS that the template does not write.

    Returns:
        Markdown with a YAML header.
    """
    load = (
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "base = AutoModelForSequenceClassification.from_pretrained(\n"
        f"    {base!r}, num_labels={len(spec.attribute_names)}, dtype=torch.float32\n"
        ")\n"
        "base.config.pad_token_id = tokenizer.pad_token_id\n"
        "model = PeftModel.from_pretrained(base, folder).eval()\n"
    )
    return (
        f"{_header('peft')}\n"
        "# Adapters of a reward model\n\n"
        f"LoRA adapters for `{base}` and a linear head without bias, which give the scores "
        f"{', '.join(spec.attribute_names)}. In an export, the folder above is the same model with "
        "the adapters merged, and its card tells the rest.\n\n"
        f"{_score_command()}"
        f"{base_note()} The same scores with plain peft:\n\n"
        "```python\n"
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f"{_scoring_code(load, spec, adds_bos)}"
        "```\n"
    )


def base_note() -> str:
    """Where ``helpsteer2`` looks for the base of adapters, for their cards."""
    return (
        "`helpsteer2` loads the base from where `base_model_name_or_path` in "
        "`adapter_config.json` says. If it lies elsewhere on your machine, write its path there "
        "(in Python, `from_pretrained` takes `base=` too): weights other than those of the "
        "training are refused."
    )


def _header(library: str = "transformers") -> str:
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-classification\n"
        "tags: [reward-model, helpsteer2]\n---\n"
    )


def _what(spec: RewardSpec, class_name: str, n_parameters: int) -> str:
    lines = [
        f"- Class: `{class_name}`, {n_parameters:,} parameters; the linear head without bias reads "
        "the last token of the response and is stored in fp32.",
        f"- Backbone: {spec.base_model}",
        f"- Trained on: {spec.data or 'not recorded'}",
        f"- Objective: {spec.objective or 'not recorded'}",
    ]
    if spec.extrapolation is not None:
        made = spec.extrapolation
        lines.append(
            f"- Weights: weak + {made.alpha!r} · (strong − weak), extrapolated, not trained (ExPO, "
            f"arXiv 2404.16792). Hashes of the weights: weak `{made.weak}`, strong "
            f"`{made.strong}`. Training data and objective are the strong model's."
        )
    return "\n".join(lines) + "\n"


def _attributes(spec: RewardSpec) -> str:
    unknown = ("not recorded",) * len(spec.attribute_names)
    means = unknown if spec.rating_means is None else [_figure(x) for x in spec.rating_means]
    stds = unknown if spec.rating_stds is None else [_figure(x) for x in spec.rating_stds]
    lines = [
        "| output | attribute | mean training rating | standard deviation |",
        "|---|---|---|---|",
    ]
    rows = zip(spec.attribute_names, means, stds, strict=True)
    lines += [f"| {i} | {name} | {mean} | {std} |" for i, (name, mean, std) in enumerate(rows)]
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    return "no ratings" if math.isnan(value) else f"{value:.3f}"


def _weights(spec: RewardSpec) -> str:
    if spec.weights is None:
        return "No weighting of the attributes is recorded.\n"
    terms = ", ".join(f"{name} {value:g}" for name, value in spec.weights.values.items() if value)
    return f"One reward is made of them by the weighting `{spec.weights.name}`: {terms}.\n"


def _input(spec: RewardSpec) -> str:
    system = (
        "none" if spec.system_prompt is None else json.dumps(spec.system_prompt, ensure_ascii=False)
    )
    limits = spec.limits
    return (
        f"- Chat template `{spec.template_name}`, hash `{spec.template_hash}` (in "
        "`chat_template.jinja`).\n"
        f"- System prompt: {system}\n"
        f"- At most {limits.max_prompt_tokens} prompt and {limits.max_response_tokens} response "
        "tokens; longer text is cut.\n"
        "- The prompt through its generation prompt and the response with its closing tokens are "
        "tokenised apart, and their ids are joined.\n"
    )


def _use(spec: RewardSpec, adds_bos: bool) -> str:
    load = (
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)\n"
        "model.eval()\n"
    )
    return (
        f"{_score_command()}"
        "The same scores with plain transformers:\n\n"
        "```python\n"
        "import torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f"{_scoring_code(load, spec, adds_bos)}"
        "```\n\n"
        "Several texts go in one batch, padded at either side with `tokenizer.pad_token_id` and "
        "with an attention mask. Loaded in bf16, transformers rounds the head too; `helpsteer2` "
        f"keeps it in fp32. `{SPEC_FILE}` holds all of this in a form that programs can read.\n"
    )


def _score_command() -> str:
    return (
        "```sh\n"
        'echo \'{"prompt": "What is 2+2?", "response": "4."}\' | helpsteer2 score --model .\n'
        "```\n\n"
    )


def _scoring_code(load: str, spec: RewardSpec, adds_bos: bool) -> str:
    """Python that loads a model from ``folder`` and scores a response with it."""
    system = ""
    if spec.system_prompt is not None:
        text = json.dumps(spec.system_prompt, ensure_ascii=False)
        system = f'{{"role": "system", "content": {text}}},\n          '
    bos = "[tokenizer.bos_token_id] + " if adds_bos else ""
    return (
        'folder = "."\n'
        f"{load}"
        "\n"
        f'prompt = [{system}{{"role": "user", "content": "What is 2+2?"}}]\n'
        'answer = {"role": "assistant", "content": "4."}\n'
        'options = {"tokenize": False, "enable_thinking": False}\n'
        "before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)\n"
        "whole = tokenizer.apply_chat_template([*prompt, answer], **options)\n"
        "parts = tokenizer([before, whole[len(before):]], add_special_tokens=False).input_ids\n"
        f"ids = torch.tensor([{bos}parts[0] + parts[1]])\n"
        "with torch.no_grad():\n"
        f"    scores = model(ids).logits  # (1, {len(spec.attribute_names)}), in the order above\n"
    )


def _merged(spec: RewardSpec) -> str:
    return (
        f"The weights are those of {spec.base_model} with LoRA adapters merged into them, rounded "
        f"to the type of the weights. `{ADAPTER_FOLDER}/` holds adapters and head alone and exact, "
        "in peft's format, and tells how to load them.\n"
    )
