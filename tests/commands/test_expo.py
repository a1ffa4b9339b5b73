"""``helpsteer2 expo``: two exports in, one out, with α given or searched for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from helpsteer2.commands import CONFIG_COMMANDS
from helpsteer2.commands.launch import launch
from helpsteer2.config.checked import check
from helpsteer2.data.chat import ChatFormat
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.tokenizer import TrainedTokenizer
from helpsteer2.errors import ConfigError, UserError
from helpsteer2.models.attention import implementation_name
from helpsteer2.models.reward import RewardModel, RewardSpec
from helpsteer2.rewards.scorer import RewardScorer

WORLD = [
    "data@search.pairs.data=world",
    "search.pairs.data.validation_groups=24",
    "search.grid=[1.2,1.5]",
    "search.resamples=50",
]

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two exports that differ in all weights."""
    root = tmp_path_factory.mktemp("expo")
    tokenizer = TrainedTokenizer(300).build(lambda: iter(["to be or not to be"]), root)
    config = AutoConfig.for_model(
        "llama", vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    chat = ChatFormat().bind(tokenizer)
    spec = RewardSpec.of(
        ("helpfulness",), chat, tokenizer, LengthLimits(600, 400), "random", objective="made up"
    )
    for seed, name in enumerate(("weak", "strong")):
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(config, attn_implementation=implementation_name("sdpa"))
        RewardModel(backbone, spec).save_pretrained(root / name, tokenizer)
    return root / "weak", root / "strong"


@pytest.fixture
def run(stages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sys, "argv", ["helpsteer2"])

    def call(*overrides: str) -> dict[str, Any]:
        given = [f"run_dir={tmp_path / 'run'}", f"weak={stages[0]}", f"strong={stages[1]}"]
        try:
            assert launch(CONFIG_COMMANDS["expo"], [*given, *overrides]) == 0
        finally:
            GlobalHydra.instance().clear()
        result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
        return result

    return call


def test_the_published_alpha_is_the_default(
    run: Run, stages: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run()
    assert result["kind"] == "expo"
    assert result["metrics"] == {"alpha": 1.52, "search": None}
    assert result["config"]["alpha"] == 1.52
    assert {"packages", "git", "hardware"} <= result["environment"].keys()
    weak, strong, made = (
        load_file(folder / "model.safetensors") for folder in (*stages, tmp_path / "run/export")
    )
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, weak[name] + 1.52 * (strong[name] - weak[name]))
    spec = RewardSpec.read(tmp_path / "run/export")
    assert spec is not None
    assert spec.extrapolation is not None
    assert spec.extrapolation.strong == result["strong"]["weights"]
    RewardScorer.from_pretrained(tmp_path / "run/export")
    assert "alpha = 1.52" in capsys.readouterr().out


def test_a_search_exports_the_alpha_it_chose(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("alpha=search", *WORLD)
    search = result["metrics"]["search"]
    assert [figures["alpha"] for figures in search["alphas"]] == [1.0, 1.2, 1.5]
    assert search["weighting"] == "helpfulness_only"
    best = max(search["alphas"], key=lambda figures: figures["choosing"]["value"])
    assert best["choosing"]["value"] == next(
        figures["choosing"]["value"]
        for figures in search["alphas"]
        if figures["alpha"] == result["metrics"]["alpha"]
    )
    spec = RewardSpec.read(tmp_path / "run/export")
    assert spec is not None
    assert spec.extrapolation is not None
    assert spec.extrapolation.alpha == result["metrics"]["alpha"]
    output = capsys.readouterr().out
    assert "pair accuracy in % by α" in output
    assert max(len(line) for line in output.splitlines() if "wrote" not in line) <= 100
    # Models of the search are gone; their scores are kept, and a second run reads them again.
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {
        "export", "scores"
    }  # fmt: skip
    monkeypatch.setattr(RewardScorer, "from_pretrained", None)
    assert run("alpha=search", *WORLD)["metrics"] == result["metrics"]


def test_pairs_of_a_file(run: Run, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"what is {i}", "chosen": "to be", "rejected": "not " * (i % 3 + 1)}
        for i in range(8)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = run(
        "alpha=search", "pairs@search.pairs=file", f"search.pairs.path={path}",
        "search.grid=[2.0]", "search.resamples=20",
    )  # fmt: skip
    assert result["metrics"]["search"]["pairs"] == {"choosing": 4, "reporting": 4}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strong=/nowhere/at/all"], "there is no file or folder /nowhere/at/all"),
        (["alpha=serch"], "did you mean search"),
        (["alpha=null"], "alpha: expected"),
        (["search.grid=1.5"], "search.grid: expected"),
        (["search.pairs.path=x"], "search.pairs.path"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    stages: tuple[Path, Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check(CONFIG_COMMANDS["expo"], [f"weak={stages[0]}", f"strong={stages[1]}", *overrides])
    assert message in str(error.value)


def test_both_models_have_to_be_given() -> None:
    with pytest.raises(ConfigError, match=r"(?s)weak: has no value yet.*strong: has no value yet"):
        check(CONFIG_COMMANDS["expo"], [])


def test_models_that_do_not_belong_together_leave_nothing(
    run: Run, stages: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="very same weights"):
        run(f"weak={stages[1]}")
    assert not (tmp_path / "run" / "export").exists()
    assert not (tmp_path / "run" / "result.json").exists()
