"""What one of several processes says of an evaluation that they share, and which of them shows the table."""

from __future__ import annotations

from pathlib import Path

from aft.evaluation.collect import Labelled
from aft.evaluation.judge import Cell
from aft.evaluation.place import Place
from aft.evaluation.runner import card_path, finished


class Share:
    """One process's part of an evaluation, which knows of the others only what they have written.

    Args:
        out: folder of the cards.
        place: this process among those that share the work.
    """

    def __init__(self, out: Path, place: Place) -> None:
        self.out, self.place = out, place
        self.cells: list[tuple[str, Cell, Path]] = []
        self.worked = self.waits = False

    def say(self, text: str) -> None:
        """Prints a line, with the rank before it where there are several: their lines may come to one screen."""
        print(f"rank {self.place.rank}: {text}" if self.place.world > 1 else text, flush=True)

    def begin(self, label: str, cell: Cell) -> None:
        """Notes a cell of a model before this process works on it."""
        path = card_path(self.out, label, cell)
        self.worked |= finished(path, cell) is None
        self.cells.append((label, cell, path))

    def later(self) -> None:
        """Notes that a cell cannot be named yet: what it takes over from a larger radius is still under way."""
        self.waits = True

    def to_show(self) -> list[Labelled]:
        """All cards where this process shows them: the one that ends last, or rank 0 where nothing was left to do; none on the others.

        (Two that end at the same moment both show them.)
        """
        if self.waits or (self.place.rank and not self.worked):
            return []
        found = [(label, finished(path, cell)) for label, cell, path in self.cells]
        cards = [(label, card) for label, card in found if card is not None]
        return cards if len(cards) == len(found) else []
