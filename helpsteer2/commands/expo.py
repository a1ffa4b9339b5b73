"""``helpsteer2 expo``: a reward model extrapolated from two stages of another (ExPO)."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from helpsteer2.attributes import AttributeWeights
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.data.groups import Group
from helpsteer2.evaluation.alpha_search import AlphaSearch
from helpsteer2.evaluation.scoring import EvaluationContext
from helpsteer2.records import environment
from helpsteer2.rewards.rewarder import Scorer, Scores

if TYPE_CHECKING:
    from helpsteer2.models.expo import Parents

WIDTH = 100
"""Columns of the table where the output is no terminal."""


def expo(
    run_dir: str,
    seed: int,
    weak: str,
    strong: str,
    alpha: float | Literal["search"],
    search: AlphaSearch,
    weights: AttributeWeights,
    dtype: Literal["float32", "bfloat16"],
    attention: Literal["auto", "sdpa", "flex", "flash"],
    tokens_per_microbatch: int,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write ``weak + alpha · (strong − weak)`` as an export, all weights and the head alike.

    Args:
        run_dir: Folder of the export (``export``) and the record (``result.json``).
        seed: Seed of the search's halves and of its bootstrap.
        weak: Folder of the first stage's export, or its Hub id.
        strong: Of the second stage, trained from the first on all or some of its attributes.
        alpha: How far to go from weak (0) to strong (1) and beyond; or ``search``.
        search: What ``alpha=search`` tries, and on which pairs.
        weights: Weighting that makes one reward of the scores, for the search.
        dtype: Type of the backbone's weights in the search. The export has that of the parents.
        attention: Attention backend of the search.
        tokens_per_microbatch: Most tokens of one forward pass of the search.
        config: The whole configuration, kept in the result.

    Raises:
        UserError: If the two models do not belong together, the data of the search cannot be used,
            another process uses the folder, or the export cannot be written.
    """
    from helpsteer2.models.expo import open_parents, write_extrapolated

    started, start = datetime.now(timezone.utc), time.monotonic()
    folder = RunFolder(run_dir)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    with folder.locked("expo"):
        parents = open_parents(weak, strong)
        found = None
        if alpha == "search":
            settings = {
                "dtype": dtype,
                "attention": attention,
                "tokens_per_microbatch": tokens_per_microbatch,
            }
            candidates = _Candidates(parents, folder.path / "candidate", settings)
            scores_dir = folder.path / "scores"
            context = EvaluationContext((weights,), scores_dir, None, seed, console)
            found = search.run(candidates.of, context)
            console.print(search.table(found))
        value = float(alpha) if found is None else float(found["alpha"])
        write_extrapolated(parents, value, folder.export)
        folder.write_result(
            {
                "kind": "expo",
                "metrics": {"alpha": value, "search": found},
                "weak": {"path": weak, "weights": parents.weak_hash},
                "strong": {"path": strong, "weights": parents.strong_hash},
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    console.print(f"wrote {folder.export} with alpha = {value:g}", soft_wrap=True)


class _Candidates:
    """The models of a search, each made when it is asked for scores, and removed after that."""

    def __init__(self, parents: Parents, folder: Path, settings: Mapping[str, Any]) -> None:
        self.parents = parents
        self.folder = folder
        self.settings = settings

    def of(self, alpha: float) -> tuple[Scorer, str]:
        """The scorer of an α, and a key of all that its scores depend on."""
        parents = self.parents
        parts = (parents.weak_hash, parents.strong_hash, parents.strong.spec, alpha, self.settings)
        return _Candidate(self, alpha), hashlib.sha256(repr(parts).encode()).hexdigest()


class _Candidate:
    """One model of a search."""

    def __init__(self, candidates: _Candidates, alpha: float) -> None:
        self.candidates = candidates
        self.alpha = alpha

    @property
    def attribute_names(self) -> tuple[str, ...]:
        return self.candidates.parents.strong.spec.attribute_names

    def score(self, groups: Iterable[Group]) -> Iterator[Scores]:
        """Write the model as it would be exported, and score with that: rounding included."""
        from helpsteer2.models.expo import write_extrapolated
        from helpsteer2.rewards.scorer import RewardScorer

        folder = self.candidates.folder
        write_extrapolated(self.candidates.parents, self.alpha, folder)
        try:
            scorer = RewardScorer.from_pretrained(folder, **self.candidates.settings)
            yield from scorer.score(groups)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
