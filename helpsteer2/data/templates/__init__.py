"""The chat templates of this package, as Jinja files, and how a template is found by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer2.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = ("plain", "extra_id")
"""Templates that can be chosen by name with any tokenizer."""

LABEL_FORMS = {"extra_id": "<extra_id_2>{label}\n"}
"""How a template carries an attribute label behind its generation prompt, as NeMo-Aligner has it.

Source: NVIDIA/NeMo-Aligner at af2b3bd9, docs/user-guide/steerlm.rst.
"""

PLAIN_LABEL_FORM = "{label}\n"
"""The same for every other template: a line of its own, before the answer."""

DATE_FREEZE = (
    "{% macro strftime_now(format) %}"
    "{{ format.replace('%d', '26').replace('%b', 'Jul').replace('%B', 'July')"
    ".replace('%Y', '2024').replace('%m', '07').replace('%y', '24').replace('%A', 'Friday')"
    ".replace('%a', 'Fri').replace('%H', '00').replace('%M', '00').replace('%S', '00') }}"
    "{% endmacro %}\n"
)
"""Put before templates that ask for today's date: else rewards would change from day to day.

26 July 2024 is the date that Llama 3.1's own template falls back to. It is part of the template's
text, so an exported template writes the same date wherever it is rendered. It leaves the text after
it as it was: transformers renders with ``trim_blocks``, which drops its newline.
"""


def shipped_template(name: str) -> str:
    """Jinja source of a template in this package."""
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")


def find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Jinja source of a template.

    Args:
        name: A name in ``SHIPPED``, ``backbone`` for the tokenizer's own, or the path of a file.
        tokenizer: Whose own template ``backbone`` means.

    Returns:
        The template's text.

    Raises:
        UserError: If there is no such template.
    """
    if name in SHIPPED:
        return shipped_template(name)
    if name == "backbone":
        if not tokenizer.chat_template:
            raise UserError(
                "the backbone's tokenizer has no chat template: set chat.template to plain, "
                "extra_id or a .jinja file"
            )
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:
            raise UserError(f"chat.template=backbone: {error}") from None
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the chat template {name!r}: {error}") from None


def freeze_date(text: str) -> str:
    """A template that writes the same date every day; others are left as they are."""
    if "strftime_now" in text and not text.startswith(DATE_FREEZE):
        return DATE_FREEZE + text
    return text
