"""Log-probabilities of a reference policy on the disk: written once, joined to the same groups.

A folder holds one ``SPLIT.safetensors`` a split (``logprobs`` of every response token, response
after response, and ``lengths``, the tokens of each response) and ``reference.json``, which says
what they are of. ``helpsteer2 reference`` makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from helpsteer2.data.lengths import LengthLimits
from helpsteer2.data.token_store import TokenisedGroups
from helpsteer2.data.tokenizer import tokenizer_hash
from helpsteer2.errors import UserError
from helpsteer2.records import plain

if TYPE_CHECKING:
    from helpsteer2.data.chat import BoundChat

REFERENCE_FILE = "reference.json"

FORMAT_VERSION = 2
"""Raised whenever the same policy and groups would be stored as something else."""


@dataclass(frozen=True)
class ReferenceInputs:
    """What the log-probabilities of a text depend on, beside the weights of the policy.

    Attributes:
        tokenizer: Hash of the tokenizer.
        template: Hash of the chat template.
        system_prompt: System prompt put before every conversation, None for none.
        max_prompt_tokens: Longest prompt.
        max_response_tokens: Longest response.
        dtype: Type of the weights, ``float32`` or ``bfloat16``.
        precision: ``32-true``, or ``bf16-mixed`` for matrix products in bf16.
        label_form: How attribute labels are written behind prompts; None if they are not read.
        labels: Whether the labels of the groups are read.
    """

    tokenizer: str
    template: str
    system_prompt: str | None
    max_prompt_tokens: int
    max_response_tokens: int
    dtype: str
    precision: str
    label_form: str | None
    labels: bool = True

    @classmethod
    def of(
        cls,
        chat: BoundChat,
        limits: LengthLimits,
        dtype: str,
        precision: str,
        labels: bool = True,
    ) -> ReferenceInputs:
        """Take the hashes from the objects that make the ids."""
        return cls(
            tokenizer=tokenizer_hash(chat.tokenizer),
            template=chat.template_hash,
            system_prompt=chat.system_prompt,
            max_prompt_tokens=limits.max_prompt_tokens,
            max_response_tokens=limits.max_response_tokens,
            dtype=dtype,
            precision=precision,
            label_form=chat.labels.form if labels else None,
            labels=labels,
        )


KEYS = {
    "tokenizer": "tokenizer",
    "template": "chat.template",
    "system_prompt": "chat.system_prompt",
    "max_prompt_tokens": "lengths.max_prompt_tokens",
    "max_response_tokens": "lengths.max_response_tokens",
    "dtype": "backbone.dtype",
    "precision": "trainer.precision",
    "label_form": "chat.label_form",
    "labels": "labels of helpsteer2 reference",
}
"""What decides each input in the configuration of a training run."""


@dataclass(frozen=True)
class ReferenceSplit:
    """The log-probabilities of a split.

    Attributes:
        logprobs: ``(N,)`` float32 nats of every response token, response after response.
        lengths: ``(R,)`` int32, tokens of each response.
    """

    logprobs: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int32]

    def sums(self) -> npt.NDArray[np.float32]:
        """``(R,)`` float32, log-probability of each response, summed in fp64."""
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        return np.add.reduceat(self.logprobs.astype(np.float64), starts).astype(np.float32)


class Reference:
    """A folder of log-probabilities.

    Args:
        folder: Where it lies.
        content: Its ``reference.json``.

    Attributes:
        weights: Hash of the weights of the policy.
        inputs: What they depend on beside it.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.weights: str = content["weights"]
        self.inputs = ReferenceInputs(**content["inputs"])
        self._splits: dict[str, dict[str, str]] = content["splits"]

    @classmethod
    def open(cls, folder: str | Path) -> Reference:
        """Open a folder that ``helpsteer2 reference`` has finished.

        Raises:
            UserError: If there is none, or it is damaged or of another version.
        """
        folder = Path(folder).expanduser()
        try:
            content = json.loads((folder / REFERENCE_FILE).read_text(encoding="utf-8"))
            if content["format"] != FORMAT_VERSION:
                raise UserError(
                    f"reference={folder} was written by another version of helpsteer2: make it "
                    "again with helpsteer2 reference"
                )
            return cls(folder, content)
        except FileNotFoundError as error:
            raise UserError(
                f"reference={folder} has no {REFERENCE_FILE}: make it with helpsteer2 reference "
                "model=POLICY run_dir=DIR, and give reference=DIR/reference"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"reference={folder} is damaged ({error!r}): make it again") from error

    def require(self, inputs: ReferenceInputs) -> None:
        """Refuse log-probabilities that a run would not compare with its own.

        Args:
            inputs: Those of the run.

        Raises:
            UserError: If one differs; all that differ are named.
        """
        theirs, ours = asdict(self.inputs), asdict(inputs)
        differing = [name for name in ours if ours[name] != theirs[name]]
        if "labels" in differing and "label_form" in differing:
            differing.remove("label_form")  # one side reads none
        lines = [
            f"  {KEYS[name]}: {theirs[name]!r} there, {ours[name]!r} here" for name in differing
        ]
        if lines:
            raise self._refusal("was made with other settings:\n" + "\n".join(lines) + "\n", inputs)

    def join(self, groups: TokenisedGroups, split: str) -> TokenisedGroups:
        """Join the log-probabilities to the groups that they are of.

        Args:
            groups: All groups of a split, none selected.
            split: Its name.

        Returns:
            The groups, each with ``ref_logprobs``.

        Raises:
            UserError: As ``sums``.
        """
        return groups.with_ref_logprobs(self.sums(groups, split))

    def sums(self, groups: TokenisedGroups, split: str) -> npt.NDArray[np.float32]:
        """Log-probability of every response of a split as a whole.

        Args:
            groups: All groups of the split, none selected.
            split: Its name.

        Returns:
            ``(R,)`` float32 nats.

        Raises:
            UserError: If the split is not in the folder, is of other data, or its file is damaged.
        """
        entry = self._splits.get(split)
        if entry is None:
            there = ", ".join(self._splits)
            raise self._refusal(f"has no {split} split, only {there} ", self.inputs)
        if entry["ids"] != groups.ids_hash:
            raise self._refusal(f"is of other {split} data than this run ", self.inputs)
        content = self._read(split, entry["sha256"])
        if not np.array_equal(content.lengths, groups.response_lengths):
            raise UserError(f"reference={self.folder} does not fit the {split} data: make it again")
        return content.sums()

    def _read(self, split: str, checksum: str) -> ReferenceSplit:
        from safetensors.numpy import load

        try:
            content = (self.folder / f"{split}.safetensors").read_bytes()
        except OSError as error:
            raise UserError(f"reference={self.folder} lacks {split}.safetensors") from error
        if hashlib.sha256(content).hexdigest() != checksum:
            raise UserError(
                f"reference={self.folder}: {split}.safetensors has changed since it was written: "
                "make it again"
            )
        values = ReferenceSplit(**load(content))
        if not np.isfinite(values.logprobs).all():
            raise UserError(
                f"reference={self.folder}: {split}.safetensors has log-probabilities that are not "
                "finite: the policy is broken, or they were not made by helpsteer2 reference"
            )
        return values

    def _refusal(self, what: str, inputs: ReferenceInputs) -> UserError:
        """What is wrong, and the command that makes the right ones."""
        return UserError(
            f"reference={self.folder} {what}so its log-probabilities are not those of this run's "
            "texts. Make them with the data and chat settings of this run: helpsteer2 reference "
            f"model=POLICY dtype={inputs.dtype} precision={inputs.precision} "
            f"lengths.max_prompt_tokens={inputs.max_prompt_tokens} "
            f"lengths.max_response_tokens={inputs.max_response_tokens}"
            f"{'' if inputs.labels else ' labels=false'} run_dir=DIR"
        )


def write_reference(
    folder: Path,
    weights: str,
    inputs: ReferenceInputs,
    splits: Mapping[str, tuple[TokenisedGroups, ReferenceSplit]],
) -> None:
    """Write the files of a folder, ``reference.json`` last.

    Args:
        folder: Exists, and is put in place when this is done.
        weights: Hash of the policy's weights.
        inputs: What the log-probabilities depend on beside them.
        splits: Groups and log-probabilities of each split.

    Raises:
        OSError: If it cannot be written.
    """
    from safetensors.numpy import save

    entries = {}
    for split, (groups, content) in splits.items():
        data = save({"logprobs": content.logprobs, "lengths": content.lengths})
        (folder / f"{split}.safetensors").write_bytes(data)
        entries[split] = {
            "ids": groups.ids_hash,
            "sha256": hashlib.sha256(data).hexdigest(),
            "responses": len(content.lengths),
            "tokens": len(content.logprobs),
        }
    record = {
        "format": FORMAT_VERSION,
        "weights": weights,
        "inputs": asdict(inputs),
        "splits": entries,
    }
    text = json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n"
    (folder / REFERENCE_FILE).write_text(text, encoding="utf-8")
