"""The images of attack A, which knows no defence: made once for a model's weights and shown to every defence of them.

Shapes: n images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aft import cards
from aft.evaluation.judge import MODEL_IDENTITY, Cell
from aft.evaluation.origin import data_block, model_block
from aft.evaluation.planned import Planned


def transfer_id(cell: Cell, planned: Planned) -> str:
    """What decides the points of an attack on the *undefended* model: 16 hexadecimal digits, the same for every defence of the weights."""
    model = model_block(cell.model.record)
    return cards.cell_of({
        "task": cell.task.name, "task_settings": cell.task.describe(cell.data), "scale": cell.protocol.scale, "seed": cell.seed,
        "model": {key: model[key] for key in MODEL_IDENTITY}, "data": data_block(cell.data), "threat": cell.threat,
        "attack": planned.attack.describe(), "going_on": not getattr(planned.attack, "drop_broken", False), "loss": planned.loss,
        "precision": str(next(cell.model.parameters()).dtype),
    })  # fmt: skip


class Transferred:
    """Points that are kept in files, so that the second defence of a model finds those of the first.

    A file is whole or not there, and says which rows it has, so processes may share a folder. It may be deleted at any time.

    Args:
        folder: for all cells; none: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def of(self, cell: Cell, planned: Planned, rows: Sequence[int], make: Callable[[Tensor], Tensor]) -> Tensor:
        """The points of these rows of a cell, ``[n, C, H, W]``.

        Args:
            cell: with the defended model.
            planned: the attack.
            rows: of the cell.
            make: points for the places (int64) among ``rows`` that are not kept.
        """
        name = transfer_id(cell, planned)
        known = self._kept(name, rows)
        places = torch.tensor([place for place, row in enumerate(rows) if row not in known], dtype=torch.long)
        if len(places):
            made_nCHW = make(places)
            added = np.array([rows[place] for place in places.tolist()])
            if self.folder is not None:
                path = self.folder / name / f"part-{cards.digest(added.tolist())[:12]}.npz"
                cards.write_arrays(path, {"row": added, "points": made_nCHW.cpu().numpy()})
            known |= dict(zip(added.tolist(), made_nCHW.cpu(), strict=True))
        return torch.stack([torch.as_tensor(known[row]) for row in rows])

    def _kept(self, name: str, rows: Sequence[int]) -> dict[int, Tensor]:
        """The points of one attack that are there, by their row, of these rows."""
        found: dict[int, Tensor] = {}
        wanted = set(rows)
        for path in [] if self.folder is None else sorted((self.folder / name).glob("part-*.npz")):
            try:
                held = cards.read_arrays(path, ["row"])["row"].tolist()
                if wanted.isdisjoint(held):
                    continue
                points = torch.from_numpy(cards.read_arrays(path, ["points"])["points"])
            except FileNotFoundError:  # deleted since
                continue
            found |= {row: point for row, point in zip(held, points, strict=True) if row in wanted}
        return found
