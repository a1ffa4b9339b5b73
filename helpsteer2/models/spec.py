"""What a reward model remembers beside its weights, so that a score means the same everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer2.attributes import AttributeWeights
from helpsteer2.data.lengths import LengthLimits
from helpsteer2.errors import UserError
from helpsteer2.records import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpsteer2.data.chat import BoundChat

FORMAT_VERSION = 1
"""Raised when a folder of today could no longer be read by the code of yesterday."""

SPEC_FILE = "reward_model.json"
POLICY_FILE = "policy.json"


@dataclass(frozen=True)
class Extrapolation:
    """How weights were made of two other models': ``weak + alpha · (strong − weak)``.

    Attributes:
        alpha: 0 is the weak model, 1 the strong one, more is beyond it.
        weak: Hash of the weak model's weights, as ``helpsteer2.models.expo`` computes it.
        strong: Hash of the strong model's.
    """

    alpha: float
    weak: str
    strong: str


@dataclass(frozen=True)
class RewardSpec:
    """Everything a score depends on, other than the weights of the network.

    Attributes:
        attribute_names: Names of the A outputs, in their order.
        template_name: Name of the chat template the responses were trained with.
        template_text: Its Jinja text, as given to the tokenizer.
        template_hash: Hash of the text, as in every ``result.json``.
        system_prompt: System prompt put before every conversation, None for none.
        limits: Longest prompt and response, in tokens; longer ones are cut.
        tokenizer_hash: Hash of the vocabulary and its special tokens.
        base_model: Hub id or description of the backbone before training.
        data: What it was trained on, in words; empty if not known.
        objective: The loss it was trained with, in words; empty if not known.
        weights: Weighting that makes one reward of the A scores, None if there is no usual one.
        rating_means: Mean training rating of each attribute, 0–4, NaN for one without ratings;
            None if not known.
        rating_stds: Its standard deviation.
        format_version: Version of the folder format.
        extrapolation: How the weights were made, None if they were trained.
    """

    attribute_names: tuple[str, ...]
    template_name: str
    template_text: str
    template_hash: str
    system_prompt: str | None
    limits: LengthLimits
    tokenizer_hash: str
    base_model: str
    data: str = ""
    objective: str = ""
    weights: AttributeWeights | None = None
    rating_means: tuple[float, ...] | None = None
    rating_stds: tuple[float, ...] | None = None
    format_version: int = FORMAT_VERSION
    extrapolation: Extrapolation | None = None

    def __post_init__(self) -> None:
        names = self.attribute_names
        if not names or len(set(names)) != len(names) or not all(names):
            raise UserError(f"a reward model needs distinct attribute names, got {list(names)}")
        for what, values in (
            ("rating_means", self.rating_means),
            ("rating_stds", self.rating_stds),
        ):
            if values is not None and len(values) != len(names):
                raise UserError(f"{what} has {len(values)} values for {len(names)} attributes")
        if self.weights is not None:
            self.weights.vector(names)

    @classmethod
    def of(
        cls,
        attribute_names: Sequence[str],
        chat: BoundChat,
        tokenizer: PreTrainedTokenizerBase,
        limits: LengthLimits,
        base_model: str,
        **rest: Any,
    ) -> RewardSpec:
        """Take the template and the hashes from the objects that training uses.

        Args:
            attribute_names: Names of the A outputs.
            chat: The chat format bound to ``tokenizer``.
            tokenizer: The backbone's tokenizer.
            limits: The length rules of training.
            base_model: Hub id, folder or description of the backbone. Of an absolute path only the
                name is kept: exports are published.
            **rest: The other attributes of the class, by name.

        Returns:
            The spec.
        """
        from helpsteer2.data.tokenizer import tokenizer_hash

        for name in ("rating_means", "rating_stds"):
            if rest.get(name) is not None:
                rest[name] = tuple(map(float, rest[name]))
        return cls(
            attribute_names=tuple(attribute_names),
            template_name=chat.template_name,
            template_text=chat.template_text,
            template_hash=chat.template_hash,
            system_prompt=chat.system_prompt,
            limits=limits,
            tokenizer_hash=tokenizer_hash(tokenizer),
            base_model=Path(base_model).name if Path(base_model).is_absolute() else base_model,
            **rest,
        )

    def write(self, folder: Path) -> None:
        """Write ``reward_model.json`` into a folder."""
        text = json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / SPEC_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RewardSpec | None:
        """Read ``reward_model.json``.

        Returns:
            The spec, or None if the folder has no such file (a model of another project).

        Raises:
            UserError: If the file is damaged or of a newer format.
        """
        path = folder / SPEC_FILE
        if not path.is_file():
            return None
        try:
            return cls._from_dict(json.loads(path.read_text(encoding="utf-8")), path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}): export again"
            ) from error

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any], path: Path) -> RewardSpec:
        version = values["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} is of format {version}, and this helpsteer2 reads up to {FORMAT_VERSION}: "
                "update helpsteer2"
            )
        # Exports of earlier versions lack it.
        known = {"extrapolation": None, **values}
        known = {field.name: known[field.name] for field in fields(cls)}
        known["attribute_names"] = tuple(known["attribute_names"])
        for name in ("rating_means", "rating_stds"):
            if known[name] is not None:  # JSON has no NaN: it was written as null
                known[name] = tuple(math.nan if x is None else float(x) for x in known[name])
        known["limits"] = LengthLimits(**known["limits"])
        if known["weights"] is not None:
            known["weights"] = AttributeWeights(**known["weights"])
        if known["extrapolation"] is not None:
            known["extrapolation"] = Extrapolation(**known["extrapolation"])
        return cls(**known)
