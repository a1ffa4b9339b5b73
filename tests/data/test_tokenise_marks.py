"""What a reward model is trained on has no marks, and what is said of the ids is what was found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sample_tokenizers as sample
from given_groups import GivenGroups

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, Message
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenise import tokenise

LIMITS = LengthLimits(200, 40)

REFUSING = """\
{%- for message in messages %}
{%- if message.content == 'Unspeakable.' %}{{- raise_exception('unspeakable') }}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def conversation(i: int, train: bool) -> Group:
    prompt = (
        Message(role="user", content=f"question {i}"),
        Message(role="assistant", content="Which egg? " * (i % 4 + 1), train=train),
        Message(role="user", content="That one. " * (i % 40)),
    )
    return Group(f"id-{i}", f"rows.jsonl:{i + 1}", prompt, ("Six.", "\n\nTwo."))


@pytest.mark.parametrize("family", ["metaspace", "chatml", "qwen3_like"])
def test_marks_change_nothing_of_what_a_reward_model_is_trained_on(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = getattr(sample, family)()
    chat = ChatFormat("auto" if tokenizer.chat_template else "plain").bind(tokenizer)
    sources = [
        GivenGroups(tuple(conversation(i, train) for i in range(50))) for train in (True, False)
    ]
    marked, plain = (tokenise(one, "train", chat, LIMITS, (), tmp_path) for one in sources)
    assert marked.fingerprint != plain.fingerprint
    assert marked.report == plain.report
    assert plain.report["prompts_cut"] > 0
    assert "marked for training" not in caplog.text
    for i in range(50):
        assert np.array_equal(marked[i].prompt_ids, plain[i].prompt_ids)
        assert marked[i].prompt_mask is None


def test_groups_that_cannot_be_written_as_text_do_not_count_as_differing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "refusing.jinja"
    template.write_text(REFUSING)
    chat = ChatFormat(str(template)).bind(sample.chatml())
    # Sampled, so that only the ids count. Newlines join over the boundary; half cannot be rendered.
    answers = ("Unspeakable.", "\n\nTwo.", "Unspeakable.", "Two.")
    prompt = (Message(role="user", content="How many?"),)
    groups = tuple(
        Group(
            f"id-{i}", f"rows.jsonl:{i + 1}", prompt, (answers[i % 4],),
            response_ids=((5, 6),), tokenizer=chat.ids_hash, finish_reasons=("length",),
        )
        for i in range(64)
    )  # fmt: skip
    with caplog.at_level("INFO", "helpsteer2.data.tokenise"):
        stored = tokenise(GivenGroups(groups), "train", chat, LIMITS, (), tmp_path, close_cut=False)
    assert stored.report["boundaries_differing"] == 16
    assert "in 16 of the first 64 groups the ids differ" in caplog.text
