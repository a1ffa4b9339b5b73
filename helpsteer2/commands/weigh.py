"""``helpsteer2 weigh``: how much each sample of a policy counts, for ``module=steerlm2``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from helpsteer2 import plots
from helpsteer2.commands.run_folder import RunFolder
from helpsteer2.data.chat import BoundChat, ChatFormat
from helpsteer2.data.groups import Group, GroupSource, Unlabelled, read_all
from helpsteer2.data.labels import AttributeLabel
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.reference import Reference, ReferenceInputs
from helpsteer2.data.rows import problem_at
from helpsteer2.data.sources.group_files import write_groups
from helpsteer2.data.tokenise import tokenise
from helpsteer2.data.tokenizer import PretrainedTokenizer
from helpsteer2.errors import DataError, Problem, UserError
from helpsteer2.evaluation.report import named_table
from helpsteer2.models.backbone import Backbone
from helpsteer2.models.start import PolicyStart
from helpsteer2.records import environment, write_atomic
from helpsteer2.rewards.likelihood import BetaLikelihood, outside
from helpsteer2.rewards.weighing import ImportanceTerms, collapse_warning

logger = logging.getLogger(__name__)

GROUPS_FILE, WEIGHTS_FILE = "groups.jsonl", "weights.jsonl"


def weigh(
    run_dir: str,
    model: str,
    tokenizer: PretrainedTokenizer,
    data: GroupSource,
    split: str,
    prior: str,
    proposal: str,
    likelihood: BetaLikelihood,
    chat: ChatFormat,
    cache_dir: str,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Join the three log-probabilities of samples, as SteerLM 2.0 weighs them.

    The ``rewards`` of the groups that it writes are log P(a|x,y) + log P(y|x), nats a response.
    ``helpsteer2 train module=steerlm2 data=groups data.path=RUN/groups.jsonl reference=PROPOSAL``
    reads them.

    Args:
        run_dir: Folder of the groups (``groups.jsonl``), of all terms and weights
            (``weights.jsonl``), of a plot and the record (``result.json``).
        model: Folder of the policy that sampled, or its Hub id, for its tokenizer.
        tokenizer: Its tokenizer.
        data: Groups with labels, their samples, and the scores of a reward model.
        split: The split of them to read.
        prior: Folder of log P(y|x), made by ``helpsteer2 reference labels=false``.
        proposal: Folder of log Q′(y|a,x), made by ``helpsteer2 reference``.
        likelihood: How likely a label is by the scores.
        chat: How conversations become text.
        cache_dir: Folder for tokenised data.
        config: The whole configuration, kept in the result.

    Raises:
        DataError: If a row of the data is bad, or has no label or no scores.
        UserError: If the log-probabilities are not of these samples or not of the same part of
            them, the scores lack an attribute of the labels, another process uses the folder, or
            it cannot be written.
    """
    started, start = datetime.now(timezone.utc), time.monotonic()
    folder, console = RunFolder(run_dir), Console()
    with folder.locked("weigh"):
        prior_of, proposal_of = Reference.open(prior), Reference.open(proposal)
        scored = _read(data, split)
        bound = PolicyStart().chat(chat, Backbone(tokenizer, model), lambda: iter(()), cache_dir)
        terms = ImportanceTerms(
            label=np.concatenate(
                likelihood.log_probabilities(scored.scores, scored.names, scored.labels)
            ),
            prior=_sums(prior_of, proposal_of, Unlabelled(data), split, bound, cache_dir),
            proposal=_sums(proposal_of, proposal_of, data, split, bound, cache_dir),
            n_responses=np.array([len(scores) for scores in scored.scores]),
        )
        path = folder.path / GROUPS_FILE
        write_groups(path, _rewarded(read_all(data, split), terms), data.attribute_names)
        write_atomic(folder.path / WEIGHTS_FILE, lambda file: _write_terms(file, scored, terms))
        summary = terms.summary()
        metrics = {
            "groups": len(scored.ids),
            "responses": len(terms.label),
            **summary,
            "scores_outside": dict(
                zip(scored.names, outside(np.concatenate(scored.scores)).tolist(), strict=True)
            ),
        }
        plots.save(_figure(terms), folder.path / "plots" / "weights.png")
        folder.write_result(
            {
                "kind": "weigh",
                "metrics": metrics,
                "likelihood": asdict(likelihood),
                "prior": {"weights": prior_of.weights, "inputs": asdict(prior_of.inputs)},
                "proposal": {"weights": proposal_of.weights, "inputs": asdict(proposal_of.inputs)},
                "fingerprint": data.fingerprint(split),
                "config": config,
                "environment": environment(),
                "started": started.isoformat(timespec="seconds"),
                "wall_seconds": round(time.monotonic() - start, 3),
            }
        )
    console.print(weights_table(metrics))
    if (warning := collapse_warning(summary)) is not None:
        logger.warning("%s", warning)
    console.print(f"wrote {path}", soft_wrap=True)


@dataclass(frozen=True)
class _Scored:
    """What the labels' likelihood is computed from, a group each."""

    ids: list[str]
    scores: list[npt.NDArray[np.float64]]
    labels: list[AttributeLabel]
    names: tuple[str, ...]


def _read(data: GroupSource, split: str) -> _Scored:
    """Scores and labels of all groups; those that lack one are told all at once."""
    problems: list[Problem] = []
    read = _Scored([], [], [], ())
    for group in read_all(data, split):
        if group.label is None:
            problems.append(problem_at(group.source, f"group {group.id!r} has no label"))
        elif group.scores is None or group.score_names is None:
            why = "has no scores: helpsteer2 annotate makes them"
            problems.append(problem_at(group.source, f"group {group.id!r} {why}"))
        elif read.names and group.score_names != read.names:
            why = f"has scores of {', '.join(group.score_names)}, others of {', '.join(read.names)}"
            problems.append(problem_at(group.source, f"group {group.id!r} {why}"))
        else:
            read = replace(read, names=group.score_names)
            read.ids.append(group.id)
            read.scores.append(np.array(group.scores, dtype=np.float64))
            read.labels.append(group.label)
    if problems:
        raise DataError(problems)
    return read


def _sums(
    reference: Reference,
    proposal: Reference,
    data: GroupSource,
    split: str,
    chat: BoundChat,
    cache_dir: str,
) -> npt.NDArray[np.float64]:
    """Log-probability of every response, if it is one of the whole response as it was sampled."""
    given = proposal.inputs
    limits = LengthLimits(given.max_prompt_tokens, given.max_response_tokens)
    labels = not isinstance(data, Unlabelled)
    inputs = ReferenceInputs.of(chat, limits, given.dtype, given.precision, labels)
    reference.require(inputs)
    groups = tokenise(data, split, chat, limits, (), cache_dir, PolicyStart.closes_cut_responses)
    if cut := groups.report["responses_cut"] + groups.report["prompts_cut"]:
        raise UserError(
            f"{cut} prompts and responses are longer than the limits of {reference.folder} "
            f"({limits.max_prompt_tokens} and {limits.max_response_tokens} tokens): the "
            "log-probabilities would be of less text than was sampled and scored. Raise "
            "lengths.max_prompt_tokens and lengths.max_response_tokens there, or sample shorter"
        )
    return reference.sums(groups, split).astype(np.float64)


def _rewarded(groups: Iterator[Group], terms: ImportanceTerms) -> Iterator[Group]:
    """The groups with the log of their targets as rewards."""
    first = 0
    for group in groups:
        rows = slice(first, first + len(group.responses))
        first = rows.stop
        yield replace(group, rewards=tuple(terms.log_targets[rows].tolist()))


def _write_terms(file: BinaryIO, scored: _Scored, terms: ImportanceTerms) -> None:
    """A line a group: its label, the terms of its responses, and their weights."""
    for group_id, label, row in zip(scored.ids, scored.labels, terms.rows(), strict=True):
        line = {"id": group_id, "label": label.as_dict(), **row}
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def _figure(terms: ImportanceTerms) -> Any:
    """How the weights are distributed, and how many samples they are worth."""
    return plots.histograms(
        {
            "weight of a response": np.exp(terms.log_weights).tolist(),
            "effective samples of a prompt": terms.effective_samples.tolist(),
            "log P(a|x,y), nats": terms.label.tolist(),
            "log P(y|x) − log Q′(y|a,x), nats": (terms.prior - terms.proposal).tolist(),
        },
        title="importance weights",
    )


def weights_table(metrics: Mapping[str, Any]) -> Table:
    """The figures of the weights.

    Args:
        metrics: As in the record.
    """
    effective, spread = metrics["effective_samples"], metrics["spread"]
    table = named_table(
        f"weights of {metrics['responses']:,} responses to {metrics['groups']:,} prompts",
        ["", "value"],
        caption="D: KL of the weights from equal ones, what training starts from.",
    )
    rows = {
        "samples a prompt": f"{metrics['samples']:.1f}",
        "effective samples, mean": f"{effective['mean']:.2f}",
        "effective samples, median": f"{effective['median']:.2f}",
        "effective samples, lowest tenth": f"{effective['p10']:.2f}",
        "largest weight, mean": f"{metrics['largest_weight']:.2f}",
        "prompts with one weight above 0.9": f"{metrics['collapsed']:.1%}",
        "D, nats": f"{metrics['distance']:.2f}",
        "spread of log P(a|x,y) in a prompt": f"{spread['label']:.2f}",
        "spread of log P(y|x) − log Q′": f"{spread['prior_to_proposal']:.2f}",
        "scores outside 0–4": f"{sum(metrics['scores_outside'].values()):,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
