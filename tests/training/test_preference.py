"""Training on preferences: decided pairs alone, exact steps, figures by strength, plain exports."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpsteer2.commands.train import train
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.datamodule import Batching, GroupDataModule
from helpsteer2.data.groups import Group
from helpsteer2.data.packing import pack
from helpsteer2.data.sources.helpsteer import HelpSteer2
from helpsteer2.data.sources.hh_rlhf import HHRLHF
from helpsteer2.data.tokenise import tokenise
from helpsteer2.errors import UserError
from helpsteer2.losses.preference import BradleyTerry, MarginBradleyTerry, ScaledBradleyTerry
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.models.start import RewardStart
from helpsteer2.modules.preference import PreferenceModule
from helpsteer2.rewards.scorer import RewardScorer
from tests.training.runs import ToyGroups, arguments, backbone, start_ranks
from tests.training.runs import run as run_command
from tests.training.test_step import LIMITS, fit, relative

LOSSES = (BradleyTerry(), MarginBradleyTerry(), ScaledBradleyTerry())


def make_data(
    cache: Path, tokens: int, max_steps: int = 1, batch: int = 12
) -> tuple[GroupDataModule, Any, Any]:
    tokenizer = backbone().tokenizer.build(lambda: iter(["red green blue sun moon"]), cache)
    chat = ChatFormat().bind(tokenizer)
    train_split, validation = (
        PreferenceModule.usable(
            tokenise(ToyGroups(), split, chat, LIMITS, ("reward",), cache), split
        )
        for split in ("train", "validation")
    )
    batching = Batching(global_batch=batch, tokens_per_microbatch=tokens, max_steps=max_steps)
    return GroupDataModule(train_split, validation, batching, seed=3), tokenizer, chat


def make_module(
    tokenizer: Any, chat: Any, names: tuple[str, ...] = ("reward",), **options: Any
) -> PreferenceModule:
    model = backbone().build(tokenizer, seed=5)
    torch.manual_seed(7)
    spec = RewardSpec.of(names, chat, tokenizer, LIMITS, "toy")
    settings: dict[str, Any] = {
        "loss": ScaledBradleyTerry(),
        "optimizer": partial(torch.optim.SGD, lr=0.01),
        "gradient_clip": None,
    }
    return PreferenceModule(RewardModel(model, spec), **settings | options)


def step_gradient(cache: Path, tokens: int, **options: Any) -> dict[str, torch.Tensor]:
    data, tokenizer, chat = make_data(cache, tokens)
    module = make_module(tokenizer, chat)
    fit(module, data, **options)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def rank_gradient(cache: Path, path: Path, tokens: int) -> None:
    gradient = step_gradient(cache, tokens, devices=2, strategy="ddp")
    if torch.distributed.get_rank() == 0:
        torch.save(gradient, path)


def test_step_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for tokens in (1, 150, 400):
        assert relative(step_gradient(tmp_path, tokens), whole) <= 1e-5


@pytest.mark.slow
def test_step_gradient_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    whole = step_gradient(tmp_path, tokens=100_000)
    for rank in start_ranks(rank_gradient, tmp_path, tmp_path, tmp_path / "gradient.pt", 1):
        rank.join()
    assert relative(torch.load(tmp_path / "gradient.pt"), whole) <= 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_that_of_the_stated_mean_over_pairs(tmp_path: Path, loss: BradleyTerry) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=150)
    trained = make_module(tokenizer, chat, loss=loss)
    fit(trained, data)
    module = make_module(tokenizer, chat)
    total, pairs = torch.zeros(()), data.plan(1).groups(0)
    for i in pairs:
        group = data.train[int(i)]
        scores = module.model(pack([group]))[:, 0]
        m = abs(group.preference_strength)
        better = int(group.preference_strength > 0)
        gain = scores[better] - scores[1 - better]
        scale = m if isinstance(loss, ScaledBradleyTerry) else 1
        margin = m if isinstance(loss, MarginBradleyTerry) else 0
        total = total + scale * torch.log1p(torch.exp(margin - gain))
    (total / len(pairs)).backward()
    ours, theirs = ({name: p.grad for name, p in of.named_parameters()} for of in (trained, module))
    assert relative(ours, theirs) <= 1e-5


def test_undecided_pairs_take_no_place_in_a_step(tmp_path: Path) -> None:
    groups = list(ToyGroups().read("train", None))
    undecided = sum(group.preference_strength == 0 for group in groups)
    assert undecided > 0
    data, tokenizer, chat = make_data(tmp_path, tokens=100_000, max_steps=20)
    assert len(data.train) == len(groups) - undecided
    module, plan = make_module(tokenizer, chat), data.plan(1)
    steps = [pack([data.train[int(i)] for i in plan.groups(step)]) for step in range(20)]
    assert {int(module.count(step)) for step in steps} == {12}


def test_a_run_learns_what_is_preferred_and_records_what_it_left_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 30, "validate_every": 30, "lr": 1e-2}
    value = train(**arguments(tmp_path / "run", module="preference", **options))
    result = json.loads((tmp_path / "run/result.json").read_text())
    metrics = result["metrics"]
    assert value == metrics["val/loss"] < math.log(2)
    assert metrics["val/strength_3/pair_accuracy"] == 1
    assert metrics["val/strength_pearson"] > 0.8
    groups = list(ToyGroups().read("train", None))
    undecided = sum(group.preference_strength == 0 for group in groups)
    report = result["data"]["train"]
    assert report["pairs_undecided"] == undecided
    assert report["pairs_decided"] == len(groups) - undecided
    assert report["groups_without_preference"] == 0
    assert "without a winner (strength 0)" in (tmp_path / "run/run.log").read_text()


def test_the_export_is_a_plain_classifier_with_one_label(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    train(**arguments(tmp_path / "run", module="preference", max_steps=4))
    export = tmp_path / "run/export"
    classifier = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32)
    assert classifier.config.num_labels == 1
    scorer = RewardScorer.from_pretrained(export)
    assert scorer.attribute_names == ("reward",)
    assert "scaled Bradley–Terry" in scorer.model.spec.objective
    group = next(ToyGroups().read("validation", None))
    (scores,) = scorer.score([group])
    encoded = scorer.encode(group)
    for response, score in zip(encoded.response_ids, scores[:, 0], strict=True):
        ids = torch.from_numpy(np.concatenate([encoded.prompt_ids, response]).astype(np.int64))
        with torch.no_grad():
            theirs = classifier(ids[None], attention_mask=torch.ones_like(ids)[None]).logits
        assert theirs.item() == pytest.approx(score, abs=1e-5)
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "scaled Bradley–Terry" in card


def test_validation_is_one_set_of_figures_over_the_split(tmp_path: Path) -> None:
    figures = []
    for tokens in (1, 100_000):
        data, tokenizer, chat = make_data(tmp_path, tokens)
        module = make_module(tokenizer, chat, optimizer=partial(torch.optim.SGD, lr=0.0))
        trainer = fit(module, data, limit_val_batches=1.0)
        figures.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    pairs = [data.validation[i] for i in range(len(data.validation))]
    with torch.no_grad():
        scores = module.model(pack(pairs))[:, 0].reshape(-1, 2)
    strength = np.array([pair.preference_strength for pair in pairs])
    difference = (scores[:, 1] - scores[:, 0]).numpy()
    won = np.sign(difference) == np.sign(strength)
    assert figures[0]["val/pair_accuracy"] == pytest.approx(won.mean())
    gain = difference * np.sign(strength)
    loss = (np.abs(strength) * np.log1p(np.exp(-gain))).mean()
    assert figures[0]["val/loss"] == pytest.approx(loss, rel=1e-4)
    assert figures[0]["val/strength_pearson"] == pytest.approx(
        np.corrcoef(difference, strength)[0, 1], rel=1e-3
    )
    for m in set(np.abs(strength)):
        share = won[np.abs(strength) == m].mean()
        assert figures[0][f"val/strength_{m:.0f}/pair_accuracy"] == pytest.approx(share)


def test_equal_scores_are_misses_and_told_apart(tmp_path: Path) -> None:
    data, tokenizer, chat = make_data(tmp_path, tokens=1000)
    module = make_module(tokenizer, chat, optimizer=partial(torch.optim.SGD, lr=0.0))
    module.model.head.weight.data.zero_()
    figures = fit(module, data, limit_val_batches=1.0).callback_metrics
    assert figures["val/pair_accuracy"] == 0
    by_strength = [name for name in figures if name.startswith("val/strength_")]
    assert len(by_strength) > 1
    assert all(figures[name] == 0 for name in by_strength if name.endswith("/pair_accuracy"))
    assert figures["val/predicted_ties"] == len(data.validation)
    assert math.isnan(figures["val/strength_pearson"])
    _, sums = module.loss_sums(pack([data.train[i] for i in range(len(data.train))]))
    assert module.step_metrics(sums.tolist()) == {"train/pair_accuracy": 0}


def regression_run(folder: Path) -> Path:
    train(**arguments(folder / "first", max_steps=6))
    return folder / "first/export"


def test_the_second_stage_goes_on_from_the_head_of_the_first(tmp_path: Path) -> None:
    export = regression_run(tmp_path)
    first, _, _ = RewardModel.from_pretrained(export)
    second = {
        "module": "preference", "validate_every": None, "max_steps": 1, "lr": 1e-12,
        "optimized_metric": None,
    }  # fmt: skip
    changes = {"model": RewardStart(str(export)), "attributes": ["verbosity"]}
    train(**arguments(tmp_path / "second", **second) | changes)
    model, _, _ = RewardModel.from_pretrained(tmp_path / "second/export")
    assert model.spec.attribute_names == ("verbosity",)
    column = first.spec.attribute_names.index("verbosity")
    assert torch.allclose(model.head.weight[0], first.head.weight[column], atol=1e-6)
    # And the backbone is the trained one, so scores begin as those of the first stage.
    group = next(ToyGroups().read("validation", None))
    scores = [
        next(iter(RewardScorer.from_pretrained(folder).score([group])))
        for folder in (export, tmp_path / "second/export")
    ]
    assert np.allclose(scores[0][:, column], scores[1][:, 0], atol=1e-4)


def test_an_attribute_that_the_first_stage_lacks_is_refused(tmp_path: Path) -> None:
    export = regression_run(tmp_path)
    changes = {"model": RewardStart(str(export)), "attributes": ["coherence"]}
    with pytest.raises(UserError, match=r"scores helpfulness, verbosity.* coherence"):
        train(**arguments(tmp_path / "second", module="preference") | changes)


def test_several_scores_are_refused(tmp_path: Path) -> None:
    _, tokenizer, chat = make_data(tmp_path, tokens=1000)
    with pytest.raises(UserError, match=r"one score, the model has 2 \(a, b\)"):
        make_module(tokenizer, chat, names=("a", "b"))


@dataclass(frozen=True)
class Told(ToyGroups):
    """The same pairs, all with one preference."""

    told: int | None = None

    def read(self, split: str, report: Any) -> Iterator[Group]:
        for group in super().read(split, report):
            yield replace(group, preference_strength=self.told)

    def fingerprint(self, split: str) -> str:
        return f"{super().fingerprint(split)} {self.told}"


@pytest.mark.parametrize(
    ("told", "message"),
    [(0, "every preference_strength of the train data"), (None, "none is made up from ratings")],
)
def test_data_without_a_winner_are_refused_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int | None, message: str
) -> None:
    monkeypatch.setattr(RewardStart, "build", lambda *_: pytest.fail("built"))
    changes = {"data": Told(told=told)}
    with pytest.raises(UserError, match=message):
        train(**arguments(tmp_path / "run", module="preference") | changes)


def test_ratings_of_other_attributes_are_refused_for_regression_alone(tmp_path: Path) -> None:
    changes = {"attributes": ["toxicity"]}
    with pytest.raises(UserError, match="none of the wanted attributes toxicity"):
        train(**arguments(tmp_path / "run") | changes)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))


def test_published_schemas_train(tmp_path: Path) -> None:
    start = "\n\nHuman: say {}\n\nAssistant:"
    for split in ("train", "test"):
        dialogues = [
            {"chosen": f"{start.format(i)} yes {i}", "rejected": f"{start.format(i)} {split}"}
            for i in range(8)
        ]
        write_rows(tmp_path / f"{split}.jsonl.gz", dialogues)
    rows = [
        {
            "split": ("train", "validation")[i % 2],
            "prompt": f"say {i}",
            "response_1": "no",
            "response_2": f"yes {i}",
            "preference_strength": i % 4,
        }
        for i in range(40)
    ]
    write_rows(tmp_path / "preference.jsonl.gz", rows)
    sources = {
        "hh": HHRLHF(str(tmp_path)),
        "preference": HelpSteer2(str(tmp_path), config="preference"),
    }
    for name, source in sources.items():
        changes = {"data": source}
        options: dict[str, Any] = {"module": "preference", "max_steps": 2}
        train(**arguments(tmp_path / name, **options) | changes)
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["steps"] == 2
        expected = {"hh": (8, 0), "preference": (10, 10)}[name]
        report = result["data"]["train"]
        assert (report["pairs_decided"], report["pairs_undecided"]) == expected
    assert not any("strength_2" in key for key in result["metrics"])


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    options = {"module": "preference", "devices": 2, "max_steps": 4, "validate_every": 4}
    for rank in start_ranks(run_command, tmp_path, tmp_path / "ranks", options):
        rank.join()
    train(**arguments(tmp_path / "one", **{**options, "devices": 1}))
    ours, theirs = (
        json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        for name in ("ranks", "one")
    )
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)
