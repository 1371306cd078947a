"""One row of the table: what is compared, what is to be reached, and what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

#: Repeats of each row with ``--quick``: enough to run every line, too few for a figure.
QUICK = 2


@dataclass(frozen=True)
class Effort:
    """How much work a measurement may be.

    Args:
        quick: a few repeats only.
        device: ``cpu`` or ``cuda``.
    """

    quick: bool = False
    device: str = "cpu"

    def repeats(self, wanted: int) -> int:
        """So many, or a few."""
        return min(wanted, QUICK) if self.quick else wanted

    @property
    def on(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


@dataclass(frozen=True)
class Target:
    """What the median of a row is to reach.

    Args:
        bound: ``at most``, ``at least`` or ``exactly``.
        value: that number.
    """

    bound: Literal["at most", "at least", "exactly"]
    value: float

    def met(self, median: float) -> bool:
        """Whether it is reached."""
        return {"at most": median <= self.value, "at least": median >= self.value, "exactly": median == self.value}[self.bound]

    def __str__(self) -> str:
        return f"{ {'at most': '<=', 'at least': '>=', 'exactly': '='}[self.bound]} {self.value:g}"


@dataclass(frozen=True)
class Found:
    """What a measurement gave.

    Args:
        values: one figure a repeat.
        parts: what the figures are made of, such as the seconds of both sides, by name; one number a repeat.
        told: settings, and whatever else is to be known.
    """

    values: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


class NotHere(Exception):
    """A row cannot be measured on this machine; the message says what is missing."""


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        name: for ``--only``.
        what: what is compared with what, as the table prints it.
        measure: gives the figures, or raises NotHere.
        target: what to reach; none: a figure to know.
        on_gpu: what to reach there, where that is another number.
        unit: of the figures: a ratio, seconds, a count.
    """

    name: str
    what: str
    measure: Callable[[Effort], Found]
    target: Target | None = None
    on_gpu: Target | None = None
    unit: Literal["x", "s", "calls"] = "x"

    def aim(self, effort: Effort) -> Target | None:
        """What is to be reached on this device."""
        return self.on_gpu if effort.device == "cuda" and self.on_gpu is not None else self.target


def middle_half(values: list[float]) -> tuple[float, float]:
    """First and third quartile, by linear interpolation; of fewer than two numbers the only one, twice.

    Example:
        >>> middle_half([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Repeat by repeat: both sides of a pair were measured one after the other."""
    return [first / second for first, second in zip(above, below, strict=True)]
