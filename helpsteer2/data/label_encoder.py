"""How a chat carries an attribute label: a text behind the generation prompt, and its ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpsteer2.data.groups import Message
from helpsteer2.data.labels import HIGHEST, LOWEST, AttributeLabel
from helpsteer2.data.templates import LABEL_FORMS, PLAIN_LABEL_FORM, shipped_template
from helpsteer2.errors import UserError

if TYPE_CHECKING:
    from helpsteer2.data.chat import BoundChat

_ANSWER = "a7f3c1e9"


class LabelEncoder:
    """Encodes labels apart from what stands before and behind them.

    Args:
        chat: Template and tokenizer.
        form: How a label is written, ``{label}`` standing for it; None as the template has it.

    Attributes:
        form: How a label is written.
    """

    def __init__(self, chat: BoundChat, form: str | None) -> None:
        self.form = form or _usual_form(chat.template_text)
        self._chat = chat
        self._ids: dict[AttributeLabel, list[int]] = {}

    def text(self, label: AttributeLabel) -> str:
        """A label as it stands behind the generation prompt."""
        return self.form.replace("{label}", label.text)

    def ids(self, label: AttributeLabel) -> list[int]:
        """Ids of a label.

        Raises:
            UserError: If the template cannot carry labels, or the tokenizer cannot tell this one
                from others.
        """
        if not self._ids:
            self._require_template()
        if label not in self._ids:
            self._ids[label] = self._encoded(label)
        return self._ids[label]

    def _require_template(self) -> None:
        """An answer that begins with a label has to be written as it is."""
        chat, question = self._chat, [Message(role="user", content="a")]
        begins = self.form.replace("{label}", "helpfulness:4,verbosity:2") + _ANSWER
        whole = chat.render([*question, Message(role="assistant", content=begins)], False)
        if not whole.startswith(chat.render(question, True) + begins):
            raise UserError(
                f"chat template {chat.template_name!r} cannot carry attribute labels: it does not "
                f"write an answer that begins with {begins!r} as it is, behind its generation "
                "prompt; chat.template=plain and extra_id can, and so can most others"
            )

    def _encoded(self, label: AttributeLabel) -> list[int]:
        """Ids of a label, after a look at all labels that differ from it in one rating."""
        others = [
            (name, AttributeLabel(label.names, (*label.values[:i], level, *label.values[i + 1 :])))
            for i, (name, value) in enumerate(label.as_dict().items())
            for level in range(LOWEST, HIGHEST + 1)
            if level != value
        ]
        texts = [self.text(label), *(self.text(other) for _, other in others)]
        ids, *of_others = self._chat.encode(texts)
        for (name, _), of_other in zip(others, of_others, strict=True):
            if of_other == ids:
                raise UserError(
                    f"the tokenizer gives labels that differ in {name} the same ids, so no policy "
                    "could tell them apart: choose another backbone"
                )
        return ids


def _usual_form(template_text: str) -> str:
    """How a template has labels; it is known by its text, for exports have it as their own."""
    for name, form in LABEL_FORMS.items():
        if template_text == shipped_template(name):
            return form
    return PLAIN_LABEL_FORM
