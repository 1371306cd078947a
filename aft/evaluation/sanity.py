"""What must hold of an attack on a defended model before its figure is called reliable. Numbers as in ``docs/checks.md``.

Shapes: n images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aft.attacks import PGD
from aft.attacks.threat_model import threat_model
from aft.cards import Verdicts
from aft.evaluation.defended import DefendedJudge, Pilot, Shown
from aft.evaluation.doubts import FEWEST

#: The radius at which nothing may be left (E21), at least so many times the cell's own; steps there; random points of E22.
FAR, TIMES, STEPS, POINTS = 32 / 255, 8.0, 40, 10


def sane(judge: DefendedJudge, rows: Sequence[int], verdicts: Verdicts, pilot: Pilot) -> dict[str, str]:
    """What is wrong, by the number of the check, on images that are right when clean.

    Args:
        judge: of the cell, inside :func:`aft.evaluation.judge.scoring`.
        rows: the images, the first that are right.
        verdicts: of the whole cell.
        pilot: of its second round.
    """
    shown = judge.show(rows)
    checks: dict[str, Callable[[], str | None]] = {
        "E8": lambda: _neighbours(judge, shown), "E21": lambda: _far_away(judge, shown, pilot),
        "E22": lambda: _noise(judge, shown, verdicts["selection"][list(rows)]),
    }  # fmt: skip
    found = {name: check() for name, check in checks.items()}
    return {name: text for name, text in found.items() if text is not None}


MADE = ("E8", "E21", "E22")


def _neighbours(judge: DefendedJudge, shown: Shown) -> str | None:
    """E8: for one draw an image's outputs are those it has alone, beyond a thousandth of their spread."""
    few = shown.only(torch.arange(min(8, len(shown.rows)), device=judge.device))

    def look(part: Shown) -> Tensor:
        """For the first selection draw; the answer alone where outputs are no tensor."""
        draws = [draw for draw in judge.draws("selection", part.keys_n, 1) if draw is not None]
        with torch.no_grad():
            outputs = judge.task.forward(judge.model, part.images_nCHW, judge.context, draws)
        return outputs if isinstance(outputs, Tensor) and outputs.ndim == 2 else judge.task.answer(outputs)[:, None].double()

    together = look(few)
    alone = torch.cat([look(few.only(torch.tensor([place], device=judge.device))) for place in range(len(few.rows))])
    most = float((together - alone).abs().max() / together.double().std(-1, unbiased=False).mean().clamp_min(1e-12))
    return f"an image's outputs change by {most:.2g} of their spread with its neighbours: score images alone" if most > 1e-3 else None


def _far_away(judge: DefendedJudge, shown: Shown, pilot: Pilot) -> str | None:
    """E21: with a radius of 32/255, or eight times the cell's, the attack leaves at most one point."""
    protocol, way = judge.cell.protocol, "through" if "through" in pilot.ways else "bpda"
    radius = max(FAR, TIMES * (protocol.eps or 0.0))
    attack = PGD(eps=min(radius, 1.0), norm=protocol.norm or "linf", steps=STEPS, relative_step_size=0.1, keep="best")
    objective = judge.objective("through" if way == "through" else "bpda", "margin", shown, pilot.ways[way].draws, 250, STEPS + 1)
    left = float(judge.right_share(shown, attack(objective, shown.images_nCHW, shown.keys_n).x_BCHW).mean())
    if left > 0.01 and left * len(shown.rows) > FEWEST:
        return f"at eps = {255 * attack.threat.radius:.3g}/255 {100 * left:.0f} % are still right: the attack fails, not the images"
    return None


def _noise(judge: DefendedJudge, shown: Shown, selection: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str | None:
    """E22: the attacks leave fewer images than the worst of ten random points does, by more than one point."""
    threat = threat_model(judge.cell.protocol.norm or "linf", judge.cell.protocol.eps or 0.0)
    worst_n = torch.ones(len(shown.rows), dtype=torch.float64, device=judge.device)
    for draw in range(POINTS):
        worst_n = torch.minimum(worst_n, judge.right_share(shown, threat.random_start(shown.images_nCHW, shown.keys_n, 1000 + draw)))
    noise, attacked = float(worst_n.mean()), float(np.nanmin(selection, axis=1).mean())
    if noise - attacked <= 0.01 and attacked < 1:
        return f"random noise leaves {100 * noise:.1f} %, the attacks {100 * attacked:.1f} %: they do no more than noise"
    return None
