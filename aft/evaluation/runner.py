"""Measures one cell, part by part, so that a killed run goes on where it was and any number of processes can share the work.

There are no collectives: rank r of W takes rows r, r + W, ..., parts are files, and whoever finds all rows done writes the card.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aft import cards
from aft.cards import Card, Verdicts, attack_success
from aft.clip.model import ZeroShotModel
from aft.evaluation import origin
from aft.evaluation.checks import failed
from aft.evaluation.corruptions import corruption_metrics
from aft.evaluation.doubts import dear_of
from aft.evaluation.judge import Cell, Cost, Judge, Survivors, scoring
from aft.evaluation.place import Place
from aft.evaluation.verdict import NEEDS_SIBLINGS, with_verdict

__all__ = ["Cell", "Parts", "Place", "card_path", "evaluate", "finished", "survivors_of"]

#: What ``keep_images`` keeps of each image, in the pixels that were attacked.
KEPT = ("clean", "adversarial")


class Parts:
    """The rows done so far of one cell: a folder of ``.npz`` files, each whole.

    Args:
        folder: of this cell alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> list[Verdicts]:
        """All parts, in the order of their names; with the columns of verdicts and the row ``cost`` (forwards, backwards, seconds)."""
        return [cards.read_arrays(path) for path in sorted(self.folder.glob("part-*.npz"))]

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Those of ``rows`` that no part holds."""
        done = {int(row) for part in self.read() for row in part["row"]}
        return [row for row in rows if row not in done]

    def write(self, verdicts: Verdicts, cost: tuple[int, int, float], images: tuple[Tensor, Tensor] | None = None) -> None:
        """Adds a part, named by its rows, so that the same work done twice is one file; ``images`` are the clean and adversarial ones."""
        name = f"part-{cards.digest(verdicts['row'].tolist())[:12]}"
        if images is not None:
            pictures = {"index": verdicts["index"], **{key: one.cpu().numpy() for key, one in zip(KEPT, images, strict=True)}}
            cards.write_arrays(self.folder / f"images-{name}.npz", pictures)
        cards.write_arrays(self.folder / f"{name}.npz", {**verdicts, "cost": np.array(cost, np.float64)})

    def remove(self) -> None:
        """Deletes the parts, and the folder unless adversarial images are kept in it."""
        if any(self.folder.glob("images-*.npz")):
            for path in self.folder.glob("part-*.npz"):
                path.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def card_path(out: Path, label: str, cell: Cell) -> Path:
    """Where a cell's card lies: ``OUT/cards/LABEL/DATA-SPLIT-SPACE-PROTOCOL[-NORM-EPS]-CELL.json``, the radius in 1/255."""
    protocol = cell.protocol
    threat = [] if protocol.eps is None else [str(protocol.norm), f"{protocol.eps * 255:.4g}"]
    parts = [cell.data.name, cell.data.split, cell.data.label_space, protocol.name, *threat, cell.id[:8]]
    return out / "cards" / _plain(label) / f"{'-'.join(_plain(part) for part in parts)}.json"


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in name)


def finished(path: Path, cell: Cell) -> Card | None:
    """The card of this cell, where it is complete."""
    if not path.exists():
        return None
    card = cards.read(path)
    return card if card["cell"] == cell.id and card["status"] == "complete" else None


def evaluate(
    cell: Cell, out: Path, label: str = "model", *, batch_size: int = 100, place: Place | None = None, keep_images: bool = False,
    command: str | None = None, checks: int = 0, siblings: Sequence[ZeroShotModel] = (), log: Callable[[str], None] = lambda _: None,
) -> Card | None:  # fmt: skip
    """Measures a cell, or what is left of it, and writes its card.

    Args:
        cell: what to measure.
        out: cards go to ``out/cards``, parts to ``out/parts`` until their card is written.
        label: the model's name in tables; the folder of its cards.
        batch_size: images a part; a kill loses at most one. It changes no verdict.
        place: this process among those that share the work.
        keep_images: keep adversarial images with the parts; parts that are done already are not made anew for it.
        command: for the card.
        checks: images for the dear doubts; 0 makes the cheap ones alone. A finished card is doubted again where more is asked than was.
        siblings: other models, for the doubt whether images carried over from them break more.
        log: told after each part.

    Returns:
        The card; none while other processes still work on their rows.
    """
    path, parts, place = card_path(out, label, cell), Parts(out / "parts" / f"{_plain(label)}-{cell.id}"), place or Place()
    if card := finished(path, cell):
        return card if checks <= _checked(card) else _doubt_again(cell, path, card, checks, siblings)
    todo = parts.missing(range(place.rank, len(cell.data), place.world))
    if todo:
        with scoring(cell.model):
            judge = Judge(cell)
            for start in range(0, len(todo), batch_size):
                _one_part(judge, todo[start : start + batch_size], parts, keep_images)
                log(f"{min(start + batch_size, len(todo))} of {len(todo)} images")
    return _close(cell, path, parts, command, checks, siblings)


def _one_part(judge: Judge, rows: list[int], parts: Parts, keep_images: bool) -> None:
    begin = time.perf_counter()
    with Cost(judge.model.visual) as cost:
        verdicts, images_nCHW = judge(rows)
    spent = (cost.forwards, cost.backwards, time.perf_counter() - begin)
    kept = (judge.cell.in_space(judge.cell.data.batch(rows).images.to(images_nCHW.device)), images_nCHW) if keep_images else None
    parts.write(verdicts, spent, kept)


def _checked(card: Card) -> int:
    """On how many images the dear doubts were made; a clean figure knows none."""
    told = card["metrics"].get("checks")
    if card["threat"] is None and told:
        return sys.maxsize
    return int(told["images"]) if told and set(dear_of(card["threat"]["norm"])) - {NEEDS_SIBLINGS} <= set(told["made"]) else 0


def _doubt_again(cell: Cell, path: Path, card: Card, checks: int, siblings: Sequence[ZeroShotModel]) -> Card:
    card = with_verdict(card, cell, cards.read_arrays(path.with_suffix(".npz")), checks, siblings)
    cards.write(path, card)
    return card


def _close(
    cell: Cell, path: Path, parts: Parts, command: str | None, checks: int, siblings: Sequence[ZeroShotModel]
) -> Card | None:
    """Joins the parts when no row is missing. Another process may do the same at this moment: both write the same card."""
    try:
        done = parts.read()
    except FileNotFoundError:
        done = []
    held = {int(row) for part in done for row in part["row"]}
    if len(held) < len(cell.data):
        return finished(path, cell)
    costs = np.sum([part.pop("cost") for part in done], axis=0)
    verdicts = cards.join(done)
    card = with_verdict(summarise(cell, verdicts, costs, command), cell, verdicts, checks, siblings)
    cards.write(path, card, verdicts)
    parts.remove()
    return card


def summarise(cell: Cell, verdicts: Verdicts, costs: NDArray[Any], command: str | None = None) -> Card:
    """The card of a cell from its verdicts and the sums of forwards, backwards and seconds."""
    n, names = len(cell.data), [planned.name for planned in cell.protocol.attacks]
    left = dict(zip(names, (float(share) for share in verdicts["right"].mean(0)), strict=True))
    clean, robust = float(verdicts["clean"].mean()), left[names[-1]] if names else None
    shares = {"clean": _largest_share(verdicts["clean_answer"]), "attacked": _largest_share(verdicts["answer"]) if names else None}
    problems, (head, dirty) = failed(verdicts, cell.data), origin.commit()
    forwards, backwards, seconds = costs
    return {
        "schema": cards.SCHEMA, "cell": cell.id, "status": "complete", "task": cell.task.name,
        "model": origin.model_block(cell.model.record), "data": origin.data_block(cell.data),
        "protocol": {"name": cell.protocol.name, "fidelity": cell.protocol.fidelity}, "threat": cell.threat, "attacks": cell.attacks,
        "defense": None if cell.defense is None else {**dict.fromkeys(cards.BLOCKS["defense"]), **cell.defense}, "seeds": cell.seeds,
        "precision": "fp32", "clean_accuracy": clean, "robust_accuracy": robust, "per_attack": left,
        "metrics": {**cell.task.metrics(verdicts, cell.data, cell.task.prepare(cell.model, cell.data)), "largest_class_shares": shares,
                    **_attacked(cell, verdicts), **attack_success(clean, robust, n),
                    **(corruption_metrics(verdicts, cell.protocol.corruptions) if cell.protocol.corruptions else {})},
        "standard_error": {"clean": cards.standard_error(clean, n), "robust": None if robust is None else cards.standard_error(robust, n)},
        "chance": cell.task.chance(cell.data), "largest_class_share": max(share for share in shares.values() if share is not None),
        "verdict": {"status": "suspect" if problems else "unchecked", "failed_checks": problems},
        "cost": {"forwards": int(forwards), "backwards": int(backwards), "seconds": round(float(seconds), 2),
                 "device": origin.device_name(next(cell.model.parameters()).device)},
        "versions": origin.versions(), "commit": head, "dirty": dirty, "command": command, "created": origin.now(), "external": None,
    }  # fmt: skip


def _largest_share(answers: NDArray[Any]) -> float:
    """The share of the answer that is given most often."""
    return float(np.unique(answers, return_counts=True)[1].max() / len(answers))


def survivors_of(card: Card, path: Path) -> Survivors:
    """The robust images of a finished cell, for a smaller radius."""
    verdicts = cards.read_arrays(path.with_suffix(".npz"))
    return Survivors(card["cell"], card["threat"]["eps"], frozenset(int(row) for row in verdicts["row"][verdicts["right"][:, -1]]))


def _attacked(cell: Cell, verdicts: Verdicts) -> dict[str, Any]:
    """For each attack the images it was shown, and those that a fresh forward judged otherwise than the attack itself.

    Where survivors of a larger radius were spared, how many, and which radius that was.
    """
    planned = cell.protocol.attacks
    names, survivors = [one.name for one in planned], cell.survivors
    spared = np.isin(verdicts["row"], list(survivors.rows) if survivors else [])
    right = np.concatenate([verdicts["clean"][:, None], verdicts["right"]], axis=1) & ~spared[:, None]
    shown = {one.name: int((right[:, place] & (verdicts["row"] < one.limit(len(cell.data)))).sum()) for place, one in enumerate(planned)}
    told = {"attacked": shown, "judged_otherwise": dict(zip(names, (~verdicts["agree"]).sum(0).tolist(), strict=True))}
    if survivors is None:
        return told
    return {**told, "spared": {"eps": survivors.eps, "images": int((spared & verdicts["clean"]).sum()), "cell": survivors.cell}}
