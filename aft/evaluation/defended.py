"""Judges a defended model image by image: candidates of every attack, chosen by some draws of the defence and judged by others.

Two rounds. In the first the undefended model is attacked and its images are shown to the defended one (A); in the second the attacks that
know the defence (B to E) try what A left. Every column depends on its image alone, or on the pilot, which depends on the cell alone.

Shapes: n images of a batch, C channels, H rows, W columns, M attacks of a round; J = candidates, the clean image first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aft.attacks import APGD, PGD, APGDTargeted, Square, sample_keys
from aft.attacks.adaptive import Evading, Expected, Meter, draw_cosines, eot_count, gate_rates, reached_cosine
from aft.attacks.base import Adversarial, Attack, Objective
from aft.attacks.objectives import LossName
from aft.attacks.sight import Dice, Sight, gated, opaque
from aft.cards import Verdicts
from aft.clip.model import at_least_fp32
from aft.clip.stages import Draw, Purpose, draws_for
from aft.evaluation.adaptive import WEIGHTS, Informed, Way
from aft.evaluation.checks import inside
from aft.evaluation.judge import Cell
from aft.evaluation.transfer import Transferred

#: What is noted of each candidate: share of the selection draws and of the scoring draws that it is right for, share of the draws for
#: which a gate opens on it, share of its gradients that were none, whether it is inside the ball, the first scoring draw's answer, and
#: whether the attack's own verdict was that of a fresh forward.
COLUMNS = ("selection", "score", "gate", "dead", "inside", "answer", "agree")
#: Numbers of dice that the pilot throws: beyond those of any attack of a protocol.
PILOT_DICE = 200


@dataclass(frozen=True)
class Shown:
    """A batch: images in the pixels that are attacked, what is true of them, and their keys."""

    images_nCHW: Tensor
    truth_n: Tensor
    keys_n: Tensor
    index_n: Tensor
    rows: tuple[int, ...]

    def only(self, places_n: Tensor) -> Shown:
        """Those at some places (int64)."""
        rows = tuple(self.rows[place] for place in places_n.tolist())
        return Shown(self.images_nCHW[places_n], self.truth_n[places_n], self.keys_n[places_n], self.index_n[places_n.cpu()], rows)


@dataclass(frozen=True)
class Tuning:
    """What the pilot found for one way of attack.

    Args:
        cosine: of two gradients of one image for one draw each, the median over the pilot's images, at the clean image or half-way through
            the attack, whichever is lower; 1 for a model without randomness.
        draws: of a gradient, by the rule ``n = ceil(9 (1 - c) / c)`` under the protocol's cap.
        reached: cosine of two means of so many.
        zero_gradients: share of the pilot's gradients that were zero.
    """

    cosine: float
    draws: int
    reached: float
    zero_gradients: float


@dataclass(frozen=True)
class Pilot:
    """What is found once for a cell, on its first images: draws of each way, the gate's best weight (none: alternating), and by the
    weight how many of the sweep's images stay right."""

    ways: dict[str, Tuning]
    weight: float | None = None
    swept: dict[str, float] | None = None

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of(cls, told: dict[str, Any]) -> Pilot:
        """From plain values."""
        return cls({way: Tuning(**one) for way, one in told["ways"].items()}, told["weight"], told["swept"])


class DefendedJudge:
    """Judges batches of one cell whose protocol is for defences; opened inside :func:`aft.evaluation.judge.scoring`.

    Args:
        cell: what to measure.
        kept: folder where A's points lie for all defences of a model; none: they are made anew.
    """

    def __init__(self, cell: Cell, kept: Path | None = None) -> None:
        assert cell.protocol.plan is not None
        self.transferred = Transferred(kept)
        self.cell, self.model, self.task, self.plan = cell, cell.model, cell.task, cell.protocol.plan
        self.moves = [move for move in cell.moves if isinstance(move, Informed)]
        self.context, self.base_context = (self.task.prepare(model, cell.data) for model in (self.model, self.model.undefended))
        self.random, self.device = self.model.stages.random, next(self.model.parameters()).device

    def show(self, rows: Sequence[int]) -> Shown:
        """The cell's images at these rows."""
        batch = self.cell.data.batch(list(rows))
        truth_n = self.task.truth(self.cell.data, list(rows))
        images_nCHW = at_least_fp32(self.cell.in_space(batch.images.to(self.device)))
        keys_n = sample_keys(self.cell.seed, 0, batch.index).to(self.device)
        return Shown(images_nCHW, truth_n.to(self.device), keys_n, batch.index, tuple(rows))

    def first(self, rows: Sequence[int]) -> Verdicts:
        """Clean images and A: the columns of ``COLUMNS`` with the clean image before the attacks, ``[n, 1 + M]``; and ``base``, whether the
        undefended model is right on the clean image and after each attack, bool ``[n, 1 + M]``.

        Images that both models get wrong are not attacked.
        """
        shown = self.show(rows)
        clean = self.candidate(shown, shown.images_nCHW)
        found, bases = [clean], [self._base_right(shown, shown.images_nCHW)]
        places_n = ((clean["selection"] > 0) | bases[0]).nonzero().flatten()
        for move in self.of_way("transfer"):
            columns, base_n = {name: column.clone() for name, column in clean.items()}, bases[-1].clone()
            if len(places_n):
                part = shown.only(places_n)
                points_nCHW = self._against_undefended(move, part)
                base_n[places_n] &= self._base_right(part, points_nCHW)
                for name, column in self._among_all(shown, places_n, points_nCHW).items():
                    columns[name][places_n] = column
            found.append(columns)
            bases.append(base_n)
        return self._table(shown, found, {"base": torch.stack(bases, 1)})

    def second(self, rows: Sequence[int], place_of: dict[int, int], pilot: Pilot, swept: Verdicts) -> Verdicts:
        """B to E on images that A left: the columns of ``COLUMNS``, ``[n, M]``, NaN for an attack that an image is not meant for.

        Args:
            rows: of the cell.
            place_of: place of each row among those that A left.
            pilot, swept: of :meth:`pilot`.
        """
        shown, found, points = self.show(rows), list[dict[str, Tensor]](), list[Tensor]()
        for move in self.moves:
            if move.way == "transfer":
                continue
            meant_n = torch.tensor([place_of[row] < move.limit(len(place_of)) for row in shown.rows], device=self.device)
            if move.way == "gate" and len(swept):
                meant_n &= torch.tensor([row not in swept["row"] for row in shown.rows], device=self.device)
            columns, points_nCHW = self._tried(move, shown, meant_n.nonzero().flatten(), pilot, points)
            if move.way == "gate" and len(swept):
                _fill(columns, shown.rows, swept)
            found.append(columns)
            if points_nCHW is not None:
                points.append(points_nCHW)
        return self._table(shown, found)

    def _among_all(self, shown: Shown, places_n: Tensor, points_nCHW: Tensor) -> dict[str, Tensor]:
        """What is noted of candidates at some places; where images see their neighbours the others stay beside them, clean."""
        if not any(stage.batch_coupled for stage in self.model.stages.declared.values()):
            return self.candidate(shown.only(places_n), points_nCHW)
        whole_nCHW = shown.images_nCHW.index_copy(0, places_n, points_nCHW)
        return {name: column[places_n] for name, column in self.candidate(shown, whole_nCHW).items()}

    def _against_undefended(self, move: Informed, part: Shown) -> Tensor:
        """A's points; those that were made for another defence of these weights are taken from there."""
        def make(places: Tensor) -> Tensor:
            """Of images that nobody has attacked yet."""
            some = part.only(places.to(self.device))
            objective = self.task.objective(self.model.undefended, self.base_context, some.truth_n, move.loss)
            return move.attack(objective, some.images_nCHW, some.keys_n).x_BCHW

        return self.transferred.of(self.cell, move, part.rows, make).to(part.images_nCHW)

    def pilot(self, rows: Sequence[int], left: Sequence[int]) -> tuple[Pilot, Verdicts]:
        """What must be known before the second round.

        Args:
            rows: right when clean, the first of them: the draws of a gradient are found on them.
            left: those that A left; the gate's weight is swept over the first of them.

        Returns:
            The pilot, and the columns of the swept images for D (empty without a sweep).
        """
        ways: dict[str, Tuning] = {move.way: self._tuned(move, rows) for move in self.moves if move.way in ("bpda", "through")}
        gates, swept = self.of_way("gate"), list(left[: self.plan.sweep or 0])
        if not gates or not swept:
            return Pilot(ways), {}
        columns, shares = self._swept(gates[0], self.show(swept), Pilot(ways), WEIGHTS)
        best = min(WEIGHTS, key=lambda weight: shares[_weight_name(weight)])
        return Pilot(ways, best, shares), self._table(self.show(swept), [columns])

    def of_way(self, way: Way) -> list[Informed]:
        """The attacks of one way."""
        return [move for move in self.moves if move.way == way]

    def candidate(self, shown: Shown, points_nCHW: Tensor) -> dict[str, Tensor]:
        """What is noted of one candidate an image; ``dead`` and ``agree`` as if there had been no attack."""
        points_nCHW = at_least_fp32(points_nCHW.detach())
        selected_n = self.right_share(shown, points_nCHW)
        scored_Sn, answer_n = self._right(shown, points_nCHW, "scoring", self.plan.scoring)
        count_n = torch.full_like(selected_n, torch.nan)
        protocol = self.cell.protocol
        within_n = inside(points_nCHW, shown.images_nCHW, protocol.norm or "linf", protocol.eps or 0.0)
        if gated(self.model.stages):
            count_n = gate_rates(self.model, points_nCHW, self.draws("selection", shown.keys_n, self.plan.selection))
        return {"selection": selected_n, "score": scored_Sn.double().mean(0), "gate": count_n, "inside": within_n,
                "dead": torch.full_like(count_n, torch.nan), "answer": answer_n, "agree": torch.ones_like(within_n)}  # fmt: skip

    def objective(
        self, way: Way, loss: LossName, shown: Shown, draws: int, dice: int, period: int | None, weight: float | None = 0.0
    ) -> Expected:
        """What an attack that knows the defence maximises.

        Args:
            way: ``bpda``, ``through``, ``gate`` or ``queries``.
            loss: of the task.
            shown: the images.
            draws: of a gradient, or of a query.
            dice: number of the dice.
            period: calls of one run of the attack.
            weight: of the gates; none: alternating.
        """
        stages = self.model.stages
        bpda = {"bpda": list(stages.declared), "queries": []}.get(way, opaque(stages))
        sight = Sight(self.model, bpda, closed=way == "gate")
        inner: Objective = self.task.objective(sight, self.context, shown.truth_n, loss)  # type: ignore[arg-type]
        if way == "gate":
            inner = Evading(inner, sight, weight)
        soft = way in ("through", "gate")
        return Expected(inner, sight, Dice(shown.keys_n, dice), draws, period=period if soft else None, meter=Meter(len(shown.keys_n)))

    def _tuned(self, move: Informed, rows: Sequence[int]) -> Tuning:
        """Draws by the rule; for a model without randomness one."""
        shown, steps = self.show(rows), _steps(move.attack)

        def objective(draws: int, dice: int) -> Expected:
            """On the margin, that of the attack."""
            return self.objective(move.way, "margin", shown, draws, PILOT_DICE + dice, steps + 1)

        single = objective(1, 0)
        cosine = float(draw_cosines(single, shown.images_nCHW).median()) if self.random else 1.0
        draws = eot_count(cosine, self.plan.most_draws) if self.random else 1
        walked = objective(draws, 1)
        half = PGD(eps=move.attack.eps, norm=self.cell.protocol.norm or "linf", steps=max(1, steps // 2), relative_step_size=0.25)
        if self.random:
            midway_nCHW = half(walked, shown.images_nCHW, shown.keys_n).x_BCHW
            cosine = min(cosine, float(draw_cosines(objective(1, 2), midway_nCHW).median()))
        else:
            replace(half, steps=1)(walked, shown.images_nCHW, shown.keys_n)
        draws = eot_count(cosine, self.plan.most_draws) if self.random else 1
        assert walked.meter is not None
        zero = float(walked.meter.dead_B.sum() / walked.meter.taken_B.sum())
        return Tuning(cosine, draws, reached_cosine(cosine, draws), zero)

    def _tried(
        self, move: Informed, shown: Shown, places_n: Tensor, pilot: Pilot, points: list[Tensor]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The columns of one attack, and its points (the clean image where there is none)."""
        columns = _nothing(len(shown.rows), self.device)
        points_nCHW = shown.images_nCHW.clone()
        if not len(places_n):
            return columns, points_nCHW
        part = shown.only(places_n)
        if move.way == "gate":
            weights = (pilot.weight,) if self.plan.sweep else WEIGHTS
            found, _ = self._swept(move, part, pilot, weights)
            for name, column in found.items():
                columns[name][places_n] = column.to(columns[name])
            return columns, None
        start_nCHW = self._best(part, [one[places_n] for one in points]) if move.name.endswith("_on") else None
        result, meter = self._run(move, part, pilot, start=start_nCHW)
        points_nCHW[places_n] = result.x_BCHW
        for name, column in self._noted(part, result, meter).items():
            columns[name][places_n] = column.to(columns[name])
        return columns, points_nCHW

    def _run(
        self, move: Informed, part: Shown, pilot: Pilot, weight: float | None = 0.0, start: Tensor | None = None
    ) -> tuple[Adversarial, Meter]:
        """One attack on images that are all meant for it."""
        attack, tuning = move.attack, pilot.ways.get("bpda" if "through" not in pilot.ways or move.way == "bpda" else "through")
        draws = self.plan.query_draws if move.way == "queries" else tuning.draws if tuning else 1
        if tuning and move.way != "queries" and self.random and eot_count(tuning.cosine, 1 << 30) > tuning.draws:
            attack = _longer(attack, self.plan.lengthen)
        dice = self.moves.index(move) * (len(WEIGHTS) + 1) + (WEIGHTS.index(weight) if move.way == "gate" else 0)
        objective = self.objective(move.way, move.loss, part, draws if self.random else 1, dice, _steps(attack) + 1, weight)
        assert objective.meter is not None
        if start is not None and isinstance(attack, Square):
            return attack.going_on(objective, part.images_nCHW, part.keys_n, start), objective.meter
        return attack(objective, part.images_nCHW, part.keys_n), objective.meter

    def _swept(
        self, move: Informed, part: Shown, pilot: Pilot, weights: Sequence[float | None]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """D with each weight: the columns of each image's best candidate, and by the weight the share that stays right."""
        best: dict[str, Tensor] | None = None
        shares: dict[str, float] = {}
        for weight in weights:
            found = self._noted(part, *self._run(move, part, pilot, weight))
            shares[_weight_name(weight)] = float(found["selection"].mean())
            lower_n = None if best is None else found["selection"] < best["selection"]
            best = found if best is None or lower_n is None else {k: torch.where(lower_n, found[k], best[k]) for k in best}
        assert best is not None
        return best, shares

    def _noted(self, part: Shown, result: Adversarial, meter: Meter) -> dict[str, Tensor]:
        """The columns of an attack's points."""
        columns = self.candidate(part, result.x_BCHW)
        columns["dead"] = (meter.dead_B / meter.taken_B).to(self.device, torch.float64)  # NaN where no gradient was taken
        if result.broken_B is not None:
            columns["agree"] = result.broken_B == (columns["selection"] == 0)
        return columns

    def _best(self, part: Shown, points: list[Tensor]) -> Tensor:
        """The candidate of each image that fewest selection draws get right."""
        if not points:
            return part.images_nCHW
        shares_Jn = torch.stack([self.right_share(part, one) for one in points])
        return torch.stack(points)[shares_Jn.argmin(0), torch.arange(len(part.rows), device=self.device)]

    def draws(self, purpose: Purpose, keys_n: Tensor, count: int) -> list[Draw | None]:
        """The defence's draws for a purpose; for a model without randomness none, once."""
        return [*draws_for(purpose, keys_n, count)] if self.random else [None]

    def right_share(self, shown: Shown, points_nCHW: Tensor) -> Tensor:
        """The share of the selection draws for which the defended model is right, ``[n]``."""
        return self._right(shown, points_nCHW, "selection", self.plan.selection)[0].double().mean(0)

    def _right(self, shown: Shown, points_nCHW: Tensor, purpose: Purpose, count: int) -> tuple[Tensor, Tensor]:
        """Whether the defended model is right for each draw, bool ``[S, n]``, and what it says for the first."""
        rights, first_n = [], None
        with torch.no_grad():
            for draw in self.draws(purpose, shown.keys_n, count):
                outputs = self.task.forward(self.model, points_nCHW, self.context, [draw] if draw else [])
                first_n = self.task.answer(outputs) if first_n is None else first_n
                rights.append(self.task.score(outputs, shown.truth_n))
        assert first_n is not None
        return torch.stack(rights), first_n

    def _base_right(self, shown: Shown, points_nCHW: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = self.task.forward(self.model.undefended, points_nCHW, self.base_context)
        return self.task.score(outputs, shown.truth_n)

    def _table(self, shown: Shown, found: list[dict[str, Tensor]], more: dict[str, Tensor] | None = None) -> Verdicts:
        columns = {name: torch.stack([one[name] for one in found], 1) for name in COLUMNS} if found else {}
        columns |= {"row": torch.tensor(shown.rows), "index": shown.index_n, **(more or {})}
        return {name: column.cpu().numpy() for name, column in columns.items()}


def _nothing(count: int, device: torch.device) -> dict[str, Tensor]:
    """The columns of an attack that was shown no image."""
    nan_n = torch.full((count,), torch.nan, dtype=torch.float64, device=device)
    yes_n = torch.ones(count, dtype=torch.bool, device=device)
    none_n = torch.full((count,), -1, dtype=torch.int64, device=device)
    return {"selection": nan_n, "score": nan_n.clone(), "gate": nan_n.clone(), "dead": nan_n.clone(), "inside": yes_n, "answer": none_n,
            "agree": yes_n.clone()}  # fmt: skip


def _fill(columns: dict[str, Tensor], rows: Sequence[int], swept: Verdicts) -> None:
    """Takes the columns of swept images over."""
    where = {int(row): place for place, row in enumerate(swept["row"])}
    for place, row in enumerate(rows):
        if row in where:
            for name in COLUMNS:
                columns[name][place] = torch.as_tensor(np.asarray(swept[name])[where[row], 0])


def _steps(attack: Attack) -> int:
    steps = attack.describe()["steps"]
    assert isinstance(steps, int)
    return steps


def _longer(attack: Attack, factor: int) -> Attack:
    return replace(attack, steps=attack.steps * factor) if isinstance(attack, (PGD, APGD, APGDTargeted)) else attack


def _weight_name(weight: float | None) -> str:
    return "alternating" if weight is None else f"{weight:g}"
