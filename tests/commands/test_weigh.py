"""``helpsteer2 weigh``: three log-probabilities of each sample, and what cannot be weighed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from scipy.stats import beta
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch
from helpsteer2.commands.reference import reference
from helpsteer2.commands.weigh import weights_table
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.groups import Group, read_all
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.sources.group_files import GroupFiles, write_groups
from helpsteer2.data.tokenizer import PretrainedTokenizer, TrainedTokenizer
from helpsteer2.errors import DataError, UserError
from helpsteer2.generation.local import LocalEngine
from helpsteer2.generation.sampling import SamplingParams, sampled_group
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.policy import Policy
from helpsteer2.models.policy_export import PolicySpec

NAMES = ("helpfulness", "verbosity")
SCORED = ("verbosity", "wit", "helpfulness")
LIMITS = LengthLimits(120, 24)


@dataclass(frozen=True)
class Made:
    """Policies, samples behind labels, and what the policies say of them.

    Attributes:
        root: Holds ``prior`` and ``proposal``, with a folder ``reference`` beside each policy.
        groups: The samples with their scores.
    """

    root: Path
    groups: list[Group]

    def refer(self, name: str, policy: str, **changes: Any) -> str:
        settings: dict[str, Any] = {
            "model": str(self.root / policy), "data": GroupFiles(str(self.root / "samples.jsonl")),
            "tokenizer": PretrainedTokenizer(str(self.root / policy)), "splits": ["train"],
            "chat": ChatFormat(), "lengths": LIMITS, "dtype": "float32", "precision": "32-true",
            "attention": "auto", "tokens_per_microbatch": 300,
            "cache_dir": str(self.root / "cache"),
        }  # fmt: skip
        reference(run_dir=str(self.root / name), **settings | changes)
        return str(self.root / name / "reference")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
    )  # fmt: skip
    for seed, (name, attributes) in enumerate((("prior", ()), ("proposal", NAMES))):
        torch.manual_seed(seed)
        causal_lm = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation_name("sdpa")
        )
        bound = ChatFormat().bind(tokenizer)
        spec = PolicySpec(bound, LIMITS, "random", label_attributes=attributes)
        Policy(causal_lm, spec).save_pretrained(root / name, tokenizer)
    rng = np.random.default_rng(0)
    prompts = [
        Group(
            f"g{i}", f"s:{i}", ({"role": "user", "content": "to be " * (i + 1)},), (),
            label=AttributeLabel(NAMES, (i % 5, (i + 3) % 5)),
        )
        for i in range(6)
    ]  # fmt: skip
    sampler = LocalEngine().open(str(root / "proposal"), "float32", "sdpa")
    params = SamplingParams(n=5, max_tokens=24, seed=1)
    groups = []
    for group, samples in sampler.sample(prompts, params):
        kept = samples[: {"g1": 1, "g2": 2, "g4": 3, "g5": 1}.get(group.id, 5)]
        sampled = sampled_group(group, kept, sampler.ids_hash)
        scores = tuple(map(tuple, rng.uniform(-0.5, 4.5, (len(kept), 3)).tolist()))
        groups.append(replace(sampled, scores=scores, score_names=SCORED))
    groups.sort(key=lambda group: group.id)  # they come as they are finished
    write_groups(
        root / "samples.jsonl", (replace(g, scores=None, score_names=None) for g in groups), ()
    )
    found = Made(root, groups)
    found.refer("log_prior", "prior", labels=False)
    found.refer("log_proposal", "proposal")
    return found


Run = Callable[..., Path]


@pytest.fixture
def run(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on groups, those of ``made`` if none are given; the folder it writes."""
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])

    def call(*overrides: str, groups: list[Group] | None = None, folder: str = "run") -> Path:
        write_groups(tmp_path / "scored.jsonl", made.groups if groups is None else groups, ())
        given = [
            f"run_dir={tmp_path / folder}", f"model={made.root / 'proposal'}",
            f"data.path={tmp_path / 'scored.jsonl'}", f"cache_dir={tmp_path / 'cache'}",
            f"prior={made.root / 'log_prior' / 'reference'}",
            f"proposal={made.root / 'log_proposal' / 'reference'}",
        ]  # fmt: skip
        try:
            assert launch(CONFIG_COMMANDS["weigh"], [*given, *overrides]) == 0
        finally:
            GlobalHydra.instance().clear()
        return tmp_path / folder

    return call


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())["metrics"]
    return found


def plain_logprobs(folder: Path, group: Group, with_label: bool) -> list[float]:
    """Of each response, by transformers' own model and template."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = list(group.prompt)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    if with_label:
        assert group.label is not None
        prompt += tokenizer(f"{group.label.text}\n", add_special_tokens=False)["input_ids"]
    found = []
    for ids in group.response_ids or ():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum()))
    return found


def log_likelihood(group: Group) -> list[float]:
    """log P(a|x,y), arXiv 2406.08673, section 4.5: fifths of Beta(24·u, 24·(1−u))."""
    assert group.label is not None
    found = []
    for row in group.scores or ():
        total = 0.0
        for name, level in group.label.as_dict().items():
            rating = min(4.0, max(0.0, row[SCORED.index(name)]))
            u = (rating + 0.5) / 5
            of = beta(24 * u, 24 * (1 - u))
            low, high = level / 5, (level + 1) / 5
            # The tail of the side on which it is small keeps its digits.
            upper = of.sf(low) - of.sf(high) if low > u else of.cdf(high) - of.cdf(low)
            total += math.log(upper)
        found.append(total)
    return found


def test_terms_are_those_of_plain_transformers_and_of_the_paper(run: Run, made: Made) -> None:
    folder = run()
    written = list(read_all(GroupFiles(str(folder / "groups.jsonl")), "train"))
    rows = lines(folder)
    assert [row["id"] for row in rows] == [group.id for group in made.groups]
    for row, group, out in zip(rows, made.groups, written, strict=True):
        assert group.label is not None
        assert row["label"] == group.label.as_dict()
        prior = plain_logprobs(made.root / "prior", group, with_label=False)
        proposal = plain_logprobs(made.root / "proposal", group, with_label=True)
        assert row["log_prior"] == pytest.approx(prior, abs=1e-4)
        assert row["log_proposal"] == pytest.approx(proposal, abs=1e-4)
        assert row["log_likelihood"] == pytest.approx(log_likelihood(group), abs=1e-9)
        # What the policy said when it sampled: the very proposal.
        assert proposal == pytest.approx([sum(of) for of in group.logprobs or ()], abs=1e-4)
        likely = np.array(row["log_likelihood"]) + row["log_prior"]
        assert out.rewards == pytest.approx(likely.tolist(), rel=1e-12)
        w = np.exp(likely - row["log_proposal"])
        assert row["weights"] == pytest.approx((w / w.sum()).tolist(), rel=1e-6)
        assert replace(out, rewards=None) == group
    found = metrics(folder)
    assert (found["groups"], found["responses"]) == (6, 17)
    assert found["samples"] == pytest.approx(17 / 6)
    assert (folder / "plots/weights.png").stat().st_size > 1000


def test_scores_outside_the_scale_are_clamped_and_counted(run: Run, made: Made) -> None:
    base = [
        replace(g, scores=tuple(tuple(min(4.0, max(0.0, x)) for x in r) for r in g.scores or ()))
        for g in made.groups
    ]
    clean, given = run(groups=base, folder="clean"), run()
    ours = [row["log_likelihood"] for row in lines(given)]
    assert ours == [row["log_likelihood"] for row in lines(clean)]
    scores = np.array([row for group in made.groups for row in group.scores or ()])
    expected = ((scores < 0) | (scores > 4)).sum(axis=0)
    assert list(metrics(given)["scores_outside"].items()) == list(
        zip(SCORED, expected.tolist(), strict=True)
    )
    assert expected.sum() > 0
    assert set(metrics(clean)["scores_outside"].values()) == {0}


def test_the_same_command_gives_the_same_bytes(run: Run) -> None:
    one, other = run(), run(folder="again")
    for name in ("groups.jsonl", "weights.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    before = (one / "weights.jsonl").read_bytes()
    run("likelihood.combine=mean")  # weighed anew in the same folder
    assert (one / "weights.jsonl").read_bytes() != before


def test_weights_that_collapse_are_told(
    run: Run, made: Made, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    near = made.refer("near", "proposal", labels=False)
    run("likelihood.concentration=1", f"prior={near}")
    assert "the weights have collapsed" not in caplog.text + capsys.readouterr().out
    groups = []
    for group in (g for g in made.groups if len(g.responses) == 5):
        assert group.label is not None
        ratings = {**group.label.as_dict(), "wit": 1}
        hit = tuple(float(ratings[name]) for name in SCORED)
        miss = tuple((rating + 2.0) % 4 for rating in hit)
        groups.append(replace(group, scores=(miss, miss, hit, miss, miss)))
    refer = {
        name: made.refer(f"few_{name}", name, data=Given(tuple(groups)), labels=name == "proposal")
        for name in ("prior", "proposal")
    }
    folder = run(
        *(f"{name}={path}" for name, path in refer.items()),
        "likelihood.concentration=500",
        groups=groups,
        folder="few",
    )
    assert all(row["weights"][2] > 0.9 for row in lines(folder))
    found = metrics(folder)
    assert found["collapsed"] == 1.0
    assert found["effective_samples"]["mean"] == pytest.approx(1.0, abs=0.05)
    told = caplog.text + capsys.readouterr().out
    assert "the weights have collapsed: 1.0 of 5 samples a prompt count" in told
    assert "lower likelihood.concentration" in told


@dataclass(frozen=True)
class Given:
    """Groups of one split, as a source."""

    groups: tuple[Group, ...]
    attribute_names: tuple[str, ...] = ()

    def read(self, split: str, report: Any) -> Any:
        yield from self.groups

    def prompts(self, split: str, report: Any) -> Any:
        yield from self.groups

    def fingerprint(self, split: str) -> str:
        return f"given {len(self.groups)}"


def test_groups_without_label_or_scores_are_told_at_once(run: Run, made: Made) -> None:
    groups = list(made.groups)
    groups[1] = replace(groups[1], label=None)
    groups[3] = replace(groups[3], scores=None, score_names=None)
    other = tuple((1.0, 2.0) for _ in groups[4].responses)
    groups[4] = replace(groups[4], scores=other, score_names=("wit", "helpfulness"))
    with pytest.raises(DataError) as caught:
        run(groups=groups)
    told = {problem.message for problem in caught.value.problems}
    assert told == {
        "group 'g1' has no label",
        "group 'g3' has no scores: helpsteer2 annotate makes them",
        "group 'g4' has scores of wit, helpfulness, others of verbosity, wit, helpfulness",
    }


def test_a_label_that_the_reward_model_does_not_score_is_told(run: Run, made: Made) -> None:
    groups = [
        replace(
            group,
            scores=tuple(row[:2] for row in group.scores or ()),
            score_names=SCORED[:2],
        )
        for group in made.groups
    ]
    with pytest.raises(UserError, match=r"judged by helpfulness, which .* does not score .*, wit"):
        run(groups=groups)
    folder = run("likelihood.attributes=[verbosity]", groups=groups)
    assert len(lines(folder)) == 6


def test_log_probabilities_of_something_else_are_refused(run: Run, made: Made) -> None:
    labelled = made.refer("labelled_prior", "prior")
    with pytest.raises(UserError, match=r"labels .*: True there, False here") as caught:
        run(f"prior={labelled}")
    assert "labels=false run_dir=DIR" in str(caught.value)
    assert "label_form" not in str(caught.value)
    bare = made.refer("bare_proposal", "proposal", labels=False)
    with pytest.raises(UserError, match=r"labels .*: False there, True here"):
        run(f"proposal={bare}")
    longer = made.refer("longer", "prior", labels=False, lengths=LengthLimits(120, 25))
    with pytest.raises(UserError, match=r"lengths\.max_response_tokens: 25 there, 24 here"):
        run(f"prior={longer}")
    with pytest.raises(UserError, match=r"/nowhere"):
        run("prior=/nowhere")
    groups = [made.groups[0], *made.groups[2:]]
    with pytest.raises(UserError, match=r"is of other train data than this run"):
        run(groups=groups)


def test_samples_that_were_cut_are_refused(run: Run, made: Made) -> None:
    short = {
        name: made.refer(
            f"short_{name}", name, labels=name == "proposal", lengths=LengthLimits(120, 8)
        )
        for name in ("prior", "proposal")
    }
    longer = sum(len(ids) > 8 for group in made.groups for ids in group.response_ids or ())
    with pytest.raises(
        UserError, match=rf"{longer} prompts and responses are longer than .* 8 tok"
    ):
        run(*(f"{name}={path}" for name, path in short.items()))


def test_the_table_fits(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    output = capsys.readouterr().out
    assert "weights of 17 responses to 6 prompts" in output
    assert max(len(line) for line in output.splitlines() if "─" in line) <= 100
    assert weights_table(metrics(folder)).row_count == 10


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("likelihood.concentration=0.1", r"has to be 0\.5 to 2000, got 0\.1"),
        ("likelihood.clamp=0.1", r"above 0 and below 0\.1, got 0\.1"),
        ("likelihood.floor=0", r"-708 or more and below 0, got 0"),
        ("likelihood.scaling=third", r"likelihood\.scaling"),
    ],
)
def test_options_out_of_range_are_told_before_anything_is_read(
    run: Run, override: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        run(override, "data.path=some/file.jsonl")
