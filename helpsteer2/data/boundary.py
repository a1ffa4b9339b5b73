"""How often prompt and response, encoded apart, get other ids than as one text."""

from __future__ import annotations

from collections.abc import Iterable

from helpsteer2.data.chat import BoundChat
from helpsteer2.data.groups import Group
from helpsteer2.errors import UserError


def boundary_difference(chat: BoundChat, groups: Iterable[Group]) -> float:
    """Share of groups whose ids differ from those of whole conversations encoded as one text.

    Args:
        chat: Template and tokenizer.
        groups: Groups to compare.

    Returns:
        Share, 0 to 1, of the groups with a difference in any response; 0 if there is no group.
        Groups that the template cannot write as text are left out: of sampled ones only the ids
        count.
    """
    differing = total = 0
    for group in groups:
        try:
            prompt = chat.prompt_ids(group.prompt)
            differing += any(
                chat.whole_ids(group.prompt, answer)
                != prompt + chat.response_ids(group.prompt, answer)[0]
                for answer in group.responses
                if answer.strip()  # a sampled one may be empty
            )
        except UserError:
            continue
        total += 1
    return differing / total if total else 0.0
