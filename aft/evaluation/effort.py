"""How long other sets would take: from what the measured ones took, image by image.

A robust image is shown to every attack to its end, others are broken (or wrong) early. So for a set of N images with the robust share p,
``seconds = N (p full + (1 - p) early) / rate``: ``rate`` in forwards a second and ``early`` in forwards an image are measured, ``full``
follows from the attacks' steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aft.cards import Card
from aft.evaluation.report import Labelled, eps_text

#: Attacks whose forwards on an image that they do not break follow from their settings.
COUNTED = ("pgd", "apgd", "square")


@dataclass(frozen=True)
class Pace:
    """What some cards of one model, protocol and radius took.

    Args:
        rate: forwards a second, with the backward passes that belong to them, decoding and judging.
        early: forwards on an image that is wrong, or broken.
        full: forwards on a robust image.
        robust: share of robust images, 0 to 1.
    """

    rate: float
    early: float
    full: float
    robust: float

    def seconds(self, images: int, robust: float | None = None) -> float:
        """For so many images.

        Args:
            images: how many.
            robust: share of robust ones, 0 to 1; none: as measured.
        """
        share = self.robust if robust is None else robust
        return images * (share * self.full + (1 - share) * self.early) / self.rate


def full_forwards(card: Card) -> float | None:
    """Forwards on an image that every attack of a card leaves robust: its clean look, and each attack's steps and its own last look.

    Returns:
        Forwards, the mean over the images where an attack is shown some only; none for attacks that count otherwise.
    """
    total = 1.0
    for attack in card["attacks"]:
        if not attack["name"].startswith(COUNTED):
            return None
        total += min(1.0, attack["n"] / card["data"]["n"]) * (forwards_of(attack) + 1)
    return total


def forwards_of(attack: Mapping[str, Any]) -> int:
    """Forwards of one attack that breaks nothing: ``steps + 1`` for each restart and target (``steps`` where the last iterate counts),
    and one more for the clean logits of a targeted attack."""
    steps = int(attack["steps"]) + int(attack["keep"] == "best")
    times = int(attack["restarts"]) * int(attack["eot"]) * int(attack["target"] or 1)
    return steps * times + int(attack["target"] is not None)


def pace(cards: Sequence[Card]) -> Pace | None:
    """The pace of cards of one model, protocol and radius; none where nothing was run."""
    n, forwards = sum(card["data"]["n"] for card in cards), sum(card["cost"]["forwards"] for card in cards)
    seconds = sum(card["cost"]["seconds"] for card in cards)
    if not n or not forwards or seconds <= 0:
        return None
    full, rate = full_forwards(cards[0]), forwards / seconds
    robust = sum(round(card["data"]["n"] * (card["robust_accuracy"] or 0)) for card in cards)
    spared = sum(card["metrics"].get("spared", {}).get("images", 0) for card in cards)
    if full is None or not cards[0]["attacks"]:
        return Pace(rate, forwards / n, forwards / n, robust / n)
    early = max(1.0, (forwards - full * (robust - spared) - spared) / (n - robust)) if robust < n else 1.0
    return Pace(rate, early, full, robust / n)


def paces(labelled: Sequence[Labelled], label_spaces: Sequence[str]) -> list[Pace]:
    """One pace for each model, protocol, radius and label space: what a further set would have to go through.

    Args:
        labelled: cards.
        label_spaces: those that every set has.
    """
    groups: dict[tuple[str, ...], list[Card]] = {}
    for label, card in labelled:
        if card["data"]["label_space"] in label_spaces:
            key = (label, card["model"]["sha256"], card["protocol"]["name"], eps_text(card), card["data"]["label_space"])
            groups.setdefault(key, []).append(card)
    return [found for cards in groups.values() if (found := pace(cards)) is not None]


def lines(labelled: Sequence[Labelled], label_spaces: Sequence[str], sizes: Mapping[str, int], n: int | None) -> list[str]:
    """What the sets that were not measured would take, on this machine, a line each.

    Args:
        labelled: the cards of the sets that were.
        label_spaces: those that every set has.
        sizes: images of every set.
        n: images of each set that are measured; none: all.
    """
    measured, found = {card["data"]["name"] for _, card in labelled}, paces(labelled, label_spaces)
    others = {name: size for name, size in sizes.items() if name not in measured}
    if not found or not others:
        return []

    def told(images: int) -> str:
        """As measured, and if no image or every image were robust."""
        guess, least, most = (sum(one.seconds(images, share) for one in found) for share in (None, 0.0, 1.0))
        return span(guess) + (f" ({span(least)} to {span(most)})" if most > least else "")

    rates = " to ".join(dict.fromkeys(f"{rate:,.0f}" for rate in (min(p.rate for p in found), max(p.rate for p in found))))
    head = f"the {len(others)} other sets, at {rates} forwards a second and the share of robust images measured here (none to all robust):"
    rows = [f"  {name}: {size:,} images {told(size)}" for name, size in others.items()]
    total = sum(others.values())
    ends = [f"  all images, {total:,}: {told(total)}"]
    if n is not None:
        some = sum(min(n, size) for size in others.values())
        ends.append(f"  n = {n:,} of each, {some:,}: {told(some)}")
    return [head, *rows, *ends]


def span(seconds: float) -> str:
    """A time with the unit that suits it.

    Example:
        >>> span(5400)
        '1.5 h'
    """
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
