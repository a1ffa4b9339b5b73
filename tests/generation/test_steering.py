"""Policies behind labels: what they say, what samplers ask them, and what an export keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.group_encoder import GroupEncoder
from helpsteer2.data.groups import Group
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.packing import pack
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.data.tokens import TokenGroup
from helpsteer2.errors import UserError
from helpsteer2.generation.local import LocalEngine, LocalSampler
from helpsteer2.generation.openai import OpenAIEngine, OpenAISampler
from helpsteer2.generation.sampling import Sample, SamplingParams, sampled_group, with_labels
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec
from helpsteer2.models.start import PolicyStart
from tests.data import sample_tokenizers

from .local_policies import make_policy, make_prompts, plain_model
from .openai_helpers import serving

NAMES = ("helpfulness", "verbosity")
LABELS = [None, *(AttributeLabel(NAMES, values) for values in ((4, 0), (0, 4), (2, 2)))]


def labelled(n: int) -> list[Group]:
    """Prompts, three of four with a label."""
    return [
        replace(group, label=LABELS[i % len(LABELS)])
        for i, group in enumerate(make_prompts(n, turns=3))
    ]


def prompt_and_label_ids(tokenizer: PreTrainedTokenizerFast, group: Group) -> list[int]:
    """By the template in plain transformers, and the text of the label."""
    text = tokenizer.apply_chat_template(
        list(group.prompt), add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if group.label is not None:
        ratings = zip(group.label.names, group.label.values, strict=True)
        label = ",".join(f"{name}:{value}" for name, value in ratings) + "\n"
        ids += tokenizer(label, add_special_tokens=False)["input_ids"]
    return [int(token) for token in ids]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_log_probabilities_are_conditioned_on_the_label(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    policy = make_policy(tokenizer, model_type)
    plain = plain_model(policy)
    answers = ("to be", "or not to be, why?")
    groups = [replace(group, responses=answers) for group in labelled(8)]
    encoder = GroupEncoder(policy.spec.chat, LengthLimits(400, 100), (), for_policy=True)
    encoded = list(encoder.encode(groups, 0))
    rows = [row for row in encoded if isinstance(row, TokenGroup)]
    assert len(rows) == 8
    with torch.no_grad():
        ours = policy.response_logprobs(pack(rows)).logprobs
    theirs = []
    for group in groups:
        prompt = prompt_and_label_ids(tokenizer, group)
        for answer in answers:
            response = tokenizer(answer + "<|end|>", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                logprobs = plain(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            theirs.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=0, atol=1e-5)
    # The same prompt behind another label has other probabilities.
    asked = [replace(groups[0], label=label) for label in LABELS]
    rows = [row for row in encoder.encode(asked, 0) if isinstance(row, TokenGroup)]
    with torch.no_grad():
        found = policy.response_logprobs(pack(rows))
    sums = found.sum_by_response(found.logprobs)[::2]
    assert len({round(float(value), 3) for value in sums}) == len(LABELS)


def test_local_samples_are_drawn_behind_the_label(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(tokenizer)
    plain, stop = plain_model(policy), policy.spec.stop_token_id
    prompts = labelled(8)
    sampler = LocalSampler(policy, LocalEngine(max_rows=5))
    params = SamplingParams(n=1, temperature=0, max_tokens=20)
    for group, (one,) in sampler.sample(prompts, params):
        ids = torch.tensor([prompt_and_label_ids(tokenizer, group)])
        theirs = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert list(one.ids) == theirs[0, ids.shape[1] :].tolist()


def test_log_probabilities_of_samples_are_those_of_their_training(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    policy = make_policy(tokenizer, initializer_range=0.1)
    sampler = LocalSampler(policy, LocalEngine())
    params = SamplingParams(n=3, max_tokens=20, seed=1)
    encoder = GroupEncoder(policy.spec.chat, LengthLimits(400, 100), (), for_policy=True)
    for group, samples in sampler.sample(labelled(8), params):
        made = sampled_group(group, samples, sampler.ids_hash)
        assert made.label == group.label
        (row,) = encoder.encode([made], 0)
        assert isinstance(row, TokenGroup)
        with torch.no_grad():
            found = policy.response_logprobs(pack([row])).logprobs
        known = [value for one in samples for value in one.logprobs or ()]
        np.testing.assert_allclose(found.numpy(), known, rtol=0, atol=1e-5)


class TestWithLabels:
    """Which label a policy is asked with, by what the prompt, the user and the policy say."""

    BARE, OWN = make_prompts(1)[0], replace(make_prompts(1)[0], label=LABELS[1])
    PARTLY = replace(BARE, label=AttributeLabel.of({"verbosity": 1}))
    STEERING = AttributeLabel.of({"verbosity": 3})

    @pytest.mark.parametrize(
        ("prompt", "steering", "attributes", "expected"),
        [
            (BARE, None, (), None),
            (OWN, None, NAMES, "helpfulness:4,verbosity:0"),
            (OWN, STEERING, NAMES, "helpfulness:4,verbosity:3"),
            (BARE, STEERING, NAMES, "helpfulness:4,verbosity:3"),
            (BARE, STEERING, ("verbosity",), "verbosity:3"),
            # What is left out has the levels that the paper asks for.
            (PARTLY, None, NAMES, "helpfulness:4,verbosity:1"),
            (PARTLY, None, ("verbosity", "complexity", "toxicity"),
             "toxicity:0,complexity:2,verbosity:1"),
        ],
    )  # fmt: skip
    def test_label(
        self,
        prompt: Group,
        steering: AttributeLabel | None,
        attributes: tuple[str, ...],
        expected: str | None,
    ) -> None:
        (made,) = with_labels([prompt], steering, attributes)
        assert (made.label.text if made.label else None) == expected
        assert replace(made, label=None) == replace(prompt, label=None)

    @pytest.mark.parametrize(
        ("prompts", "steering", "attributes", "told"),
        [
            (
                [OWN, BARE],
                None,
                NAMES,
                r"made up: .*label of helpfulness, verbosity.* set steering",
            ),
            ([BARE], STEERING, (), r"without labels and cannot be asked for verbosity:3"),
            ([OWN], None, (), r"without labels and cannot be asked for helpfulness:4,verbosity:0"),
            ([OWN], None, ("verbosity",), r"was not trained with helpfulness: .* of verbosity"),
            ([BARE], AttributeLabel.of({"wit": 4}), NAMES, r"was not trained with wit"),
            ([PARTLY], None, ("verbosity", "wit"), r"says nothing of wit.*no usual value"),
        ],
    )
    def test_refusal(
        self,
        prompts: Sequence[Group],
        steering: AttributeLabel | None,
        attributes: tuple[str, ...],
        told: str,
    ) -> None:
        with pytest.raises(UserError, match=told):
            with_labels(prompts, steering, attributes)


Export = Callable[..., Path]


@pytest.fixture
def export(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Export:
    def make(chat: ChatFormat | None = None, attributes: tuple[str, ...] = NAMES) -> Path:
        policy = make_policy(tokenizer)
        bound = (chat or ChatFormat()).bind(tokenizer)
        spec = PolicySpec(bound, LengthLimits(400, 100), "random", label_attributes=attributes)
        Policy(policy.causal_lm, spec).save_pretrained(tmp_path / "export", tokenizer)
        return tmp_path / "export"

    return make


def bodies(folder: Path, kind: Any, prompts: Sequence[Group]) -> list[dict[str, Any]]:
    """What a server of a kind is asked; it answers n samples to each."""
    with serving(lambda count, body: answer(body)) as server:
        engine = OpenAIEngine(server.url, kind, timeout=20, deadline=20, concurrency=1)
        sampler = engine.open(str(folder))
        assert sampler.label_attributes == NAMES
        given: list[tuple[Group, list[Sample]]] = list(
            sampler.sample(prompts, SamplingParams(n=1, max_tokens=5))
        )
        assert [group.label for group, _ in given] == [group.label for group in prompts]
        return server.bodies


def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    choice = {"text": "x", "finish_reason": "stop", "token_ids": [50, 2]}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


class TestServers:
    def test_ids_hold_the_label(self, export: Export, tokenizer: PreTrainedTokenizerFast) -> None:
        prompts = labelled(4)
        sent = [body["prompt"] for body in bodies(export(), "vllm", prompts)]
        assert sent == [prompt_and_label_ids(tokenizer, group) for group in prompts]

    def test_text_holds_the_label(self, export: Export, tokenizer: PreTrainedTokenizerFast) -> None:
        prompts = labelled(4)
        for body, group in zip(bodies(export(), "openai", prompts), prompts, strict=True):
            expected = prompt_and_label_ids(tokenizer, group)
            assert body["prompt"] == tokenizer.decode(expected).removeprefix("<|bos|>")
            # The server puts the BOS before it again.
            assert tokenizer(body["prompt"])["input_ids"] == expected

    def test_text_whose_label_would_get_other_ids_is_refused(self) -> None:
        # This tokenizer begins every text with a space, and so a label that is encoded apart.
        chat = ChatFormat("plain").bind(sample_tokenizers.metaspace())
        # Nothing listens there: what is refused is refused before it is sent.
        engine = OpenAIEngine("http://127.0.0.1:9/v1", "openai", timeout=0.1, deadline=0.1)
        sampler = OpenAISampler(engine, None, chat, chat.closing_ids, len(chat.tokenizer), NAMES)
        told = []
        for label in LABELS[:2]:
            prompt = replace(make_prompts(1)[0], label=label)
            with pytest.raises(UserError) as caught:
                list(sampler.sample([prompt], SamplingParams(n=1, max_tokens=5)))
            told.append(str(caught.value))
        assert "no answer" in told[0]
        assert "a token spans its end and its label" in told[1]


class TestExports:
    def read(self, folder: Path) -> PolicySpec:
        spec = PolicySpec.read(folder, AutoTokenizer.from_pretrained(folder))
        assert spec is not None
        return spec

    @pytest.mark.parametrize("form", [None, "<{label}>"])
    @pytest.mark.parametrize("template", ["auto", "plain", "extra_id"])
    def test_an_export_keeps_labels_and_their_form(
        self, export: Export, template: str, form: str | None
    ) -> None:
        folder = export(ChatFormat(template, label_form=form))
        spec = self.read(folder)
        assert spec.label_attributes == NAMES
        usual = "<extra_id_2>{label}\n" if template == "extra_id" else "{label}\n"
        assert spec.chat.labels.form == (form or usual)
        sampler = LocalEngine().open(str(folder), "float32", "sdpa")
        assert sampler.label_attributes == NAMES
        assert sampler.chat.labels.form == spec.chat.labels.form

    def test_an_export_from_before_there_were_labels_loads(self, export: Export) -> None:
        folder = export(attributes=())
        path = folder / "policy.json"
        record = json.loads(path.read_text())
        del record["label_form"], record["label_attributes"]
        path.write_text(json.dumps(record))
        spec = self.read(folder)
        assert (spec.label_attributes, spec.chat.labels.form) == ((), "{label}\n")
        assert LocalEngine().open(str(folder), "float32", "sdpa").label_attributes == ()

    def start(self, folder: Path, chat: ChatFormat) -> str:
        """How labels are written by a training that goes on from a policy."""
        backbone = Backbone(PretrainedTokenizer(str(folder)), str(folder))
        return PolicyStart().chat(chat, backbone, lambda: iter(()), str(folder)).labels.form

    def test_training_goes_on_with_the_same_form(self, export: Export) -> None:
        folder = export(ChatFormat(label_form="<{label}>"))
        told = r"labels written as '<\{label\}>', and .*: set chat\.label_form to the same"
        with pytest.raises(UserError, match=told):
            self.start(folder, ChatFormat())
        assert self.start(folder, ChatFormat(label_form="<{label}>")) == "<{label}>"

    @pytest.mark.parametrize("template", ["auto", "plain", "extra_id"])
    def test_the_usual_form_need_not_be_said_again(self, export: Export, template: str) -> None:
        # An export has its template as its own: it is no longer known by its name.
        folder = export(ChatFormat(template))
        assert self.start(folder, ChatFormat()) == self.read(folder).chat.labels.form

    def test_a_policy_without_labels_may_learn_any(self, export: Export) -> None:
        folder = export(ChatFormat(label_form="<{label}>"), attributes=())
        assert self.start(folder, ChatFormat(label_form="#{label}#")) == "#{label}#"
