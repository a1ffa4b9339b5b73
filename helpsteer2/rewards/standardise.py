"""Rewards of mean 0 and standard deviation 1: the statistics of scores over a data set, in a file.

The mean and the covariance of the attributes are kept, from which those of every weighting follow.
So another weighting needs no other pass of the reward model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from helpsteer2.attributes import AttributeWeights
from helpsteer2.errors import UserError
from helpsteer2.records import write_json_atomic

FORMAT_VERSION = 1
"""Raised when a file of today could no longer be read by the code of yesterday."""

_ROUNDING = 1e-9
"""Share of the largest possible variance below which a variance is nothing but rounding."""


@dataclass(frozen=True)
class Standardisation:
    """``(reward − mean) / std``.

    Attributes:
        mean: Of the rewards over a data set.
        std: Their standard deviation, above 0 (divided by their number, not by one less).

    Source: arXiv 2406.08673, section 4.3 (the reward of PPO).
    """

    mean: float
    std: float

    def __call__(self, rewards: Any) -> Any:
        """Standardise rewards.

        Args:
            rewards: A number, array or tensor of any shape.

        Returns:
            The same shape and type.
        """
        return (rewards - self.mean) / self.std


@dataclass(frozen=True)
class ScoreStatistics:
    """What a reward model's scores over a data set are like.

    Attributes:
        model_hash: ``RewardScorer.model_hash`` of the model.
        data: Fingerprint of the data set.
        responses: Number of responses, at least 1.
        attribute_names: Names of the A scores.
        means: ``(A,)`` means.
        covariance: ``(A, A)`` covariances (divided by the number of responses).
        format_version: Version of the file.

    Raises:
        UserError: If a value is not possible; the message says which.
    """

    model_hash: str
    data: str
    responses: int
    attribute_names: tuple[str, ...]
    means: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        names, n = self.attribute_names, len(self.attribute_names)
        if not n or len(set(names)) != n:
            raise UserError(f"attribute_names have to be distinct names, got {list(names)}")
        if self.responses < 1:
            raise UserError(f"responses has to be 1 or more, got {self.responses}")
        if len(self.means) != n or [len(row) for row in self.covariance] != [n] * n:
            raise UserError(f"means and covariance do not fit {n} attributes")
        covariance = np.array(self.covariance)
        if not np.isfinite(covariance).all() or not np.isfinite(self.means).all():
            raise UserError("means and covariance have to be finite")
        scale = np.abs(covariance).max() * _ROUNDING
        if (
            not np.allclose(covariance, covariance.T, rtol=0, atol=scale)
            or np.linalg.eigvalsh(covariance)[0] < -scale
        ):
            raise UserError("covariance is none: not symmetric, or with a variance below 0")

    @classmethod
    def of(
        cls,
        scores: npt.NDArray[np.float32],
        attribute_names: Sequence[str],
        model_hash: str,
        data: str,
    ) -> ScoreStatistics:
        """Take the statistics of scores.

        Args:
            scores: ``(R, A)``, R ≥ 1.
            attribute_names: The A names.
            model_hash: Of the model that made them.
            data: Fingerprint of what was scored.

        Raises:
            UserError: If there is no score, or one is not finite.
        """
        values = np.asarray(scores, dtype=np.float64)
        if not len(values):
            raise UserError("there are no scores to take the mean of")
        means = values.mean(axis=0)
        centred = values - means
        covariance = centred.T @ centred / len(values)
        return cls(
            model_hash,
            data,
            len(values),
            tuple(attribute_names),
            tuple(means.tolist()),
            tuple(tuple(row) for row in covariance.tolist()),
        )

    def of_reward(self, weights: AttributeWeights) -> tuple[float, float]:
        """Mean and standard deviation of the weighted reward.

        Args:
            weights: The weighting.

        Returns:
            Both; a standard deviation of 0 is possible.

        Raises:
            UserError: If an attribute with a weight is not among the scores.
        """
        vector = np.array(weights.vector(self.attribute_names))
        covariance = np.array(self.covariance)
        largest = (np.abs(vector) @ np.sqrt(np.diag(covariance).clip(0.0))) ** 2
        variance = float(vector @ covariance @ vector)
        mean = float(vector @ np.array(self.means))
        return mean, math.sqrt(variance) if variance > _ROUNDING * largest else 0.0

    def standardisation(self, weights: AttributeWeights) -> Standardisation:
        """What gives the weighted reward mean 0 and standard deviation 1 over the data set.

        Args:
            weights: The weighting.

        Raises:
            UserError: If an attribute with a weight is not among the scores, or all rewards of the
                data set are equal.
        """
        mean, std = self.of_reward(weights)
        if std == 0:
            raise UserError(
                f"weights {weights.name!r} give all {self.responses} responses the same reward, "
                "which cannot be standardised: take more data, or another weighting"
            )
        return Standardisation(mean, std)

    def save(self, path: str | Path) -> None:
        """Write the statistics as JSON, whole or not at all.

        Raises:
            UserError: If the file cannot be written.
        """
        write_json_atomic(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> ScoreStatistics:
        """Read a file that ``save`` wrote, and nothing else.

        Raises:
            UserError: If there is no such file, or it holds anything else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}): `helpsteer2 annotate` writes "
                "such a file"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no JSON ({error}): annotate the data again") from error
        try:
            return cls._from_json(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def _from_json(cls, values: Any) -> ScoreStatistics:
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise UserError(f"expected an object of {', '.join(sorted(names))}, and no more")
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"is of format {values['format_version']!r}, this helpsteer2 reads {FORMAT_VERSION}"
            )
        rows = values["covariance"]
        texts = [values["model_hash"], values["data"], *_list(values["attribute_names"])]
        numbers = [*_list(values["means"]), *(cell for row in _list(rows) for cell in _list(row))]
        if not all(isinstance(text, str) for text in texts):
            raise UserError("model_hash, data and attribute_names have to be texts")
        if not all(_is_number(number) for number in numbers):
            raise UserError("means and covariance have to be numbers")
        if not _is_number(values["responses"]) or not isinstance(values["responses"], int):
            raise UserError(f"responses has to be a whole number, got {values['responses']!r}")
        return cls(
            **{
                **values,
                "attribute_names": tuple(values["attribute_names"]),
                "means": tuple(map(float, values["means"])),
                "covariance": tuple(tuple(map(float, row)) for row in rows),
            }
        )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError("attribute_names, means and covariance have to be lists")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
