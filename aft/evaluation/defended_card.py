"""The card of a defended model: its figures beside those of the undefended one on the same images, each with its n, and what they mean.

Shapes: N images of a cell, J candidates (clean, then every attack in turn).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aft import cards
from aft.attacks.adaptive import WANTED_COSINE
from aft.cards import Card, Verdicts
from aft.clip.stages import draws_for
from aft.evaluation import origin
from aft.evaluation.adaptive import Informed
from aft.evaluation.checks import ALLOWED_DISAGREEMENTS
from aft.evaluation.defended import Pilot
from aft.evaluation.doubts import FEWEST, operations
from aft.evaluation.judge import Cell

Shares = NDArray[np.float64]

#: Resamples of the images for an interval, and the fewest images on which one is believed.
RESAMPLES, FEWEST_IMAGES = 2000, 100
#: Images on which the cost of a look is counted.
COSTED = 16
#: A defence's gradients may be zero on this share; queries may find so much more than gradients.
ZERO_GRADIENTS, QUERIES_MORE = 0.01, 0.002


def summarise(
    cell: Cell, verdicts: Verdicts, left: Sequence[int], pilot: Pilot, costs: NDArray[Any], command: str | None = None
) -> Card:
    """The card of a cell.

    Args:
        cell: whose protocol is for defences.
        verdicts: of all its images; the columns that other cards have too (``clean``, ``right``, ``answer`` ...) are added.
        left: rows that the second round saw.
        pilot: of the second round.
        costs: forwards, backwards and seconds.
        command: for the card.
    """
    moves = [move for move in cell.moves if isinstance(move, Informed)]
    figures = figures_of(cell, verdicts, moves, left)
    _add_columns(verdicts)
    tuning = pilot.ways.get("through") or pilot.ways.get("bpda")
    zero = _zero_gradients(verdicts, moves, tuning.zero_gradients if tuning else None)
    robust = figures.get("adaptive") or figures["oblivious"]
    problems = failed_checks(cell, verdicts, moves, figures, zero, tuning.reached if tuning else None)
    checks = {"images": 0, "made": list(CHECKS), "failed": problems}
    head, dirty = origin.commit()
    forwards, backwards, seconds = costs
    random, plan = cell.model.stages.random, cell.protocol.plan
    assert plan is not None
    shares = {"clean": _largest_share(verdicts["clean_answer"]), "attacked": _largest_share(verdicts["answer"])}
    defense = {**(cell.defense or {}), "gate_rates": _gate_rates(verdicts), "eot_cosine": tuning.reached if tuning and random else None,
               "zero_gradient_fraction": zero, "draws": plan.scoring if random else 1,
               "cost_multiplier": cost_multiplier(cell)}  # fmt: skip
    return {
        "schema": cards.SCHEMA, "cell": cell.id, "status": "complete", "task": cell.task.name,
        "model": origin.model_block(cell.model.record), "data": origin.data_block(cell.data),
        "protocol": {"name": cell.protocol.name, "fidelity": cell.protocol.fidelity}, "threat": cell.threat,
        "attacks": _attacks(cell, verdicts, moves, pilot), "defense": defense, "seeds": cell.seeds, "precision": "fp32",
        "clean_accuracy": figures["clean"]["accuracy"], "robust_accuracy": robust["accuracy"],
        "per_attack": {name: told["accuracy"] for name, told in figures["per_attack"].items()},
        "metrics": {"largest_class_shares": shares,
                    "defended": {**figures, "pilot": pilot.describe(), "words": words(figures, cell.protocol.name)},
                    "checks": checks},
        "standard_error": {"clean": figures["clean"]["standard_error"], "robust": robust["standard_error"]},
        "chance": cell.task.chance(cell.data), "largest_class_share": max(shares.values()),
        "verdict": {"status": "suspect" if problems else "unchecked", "failed_checks": list(problems)},
        "cost": {"forwards": int(forwards), "backwards": int(backwards), "seconds": round(float(seconds), 2),
                 "device": origin.device_name(next(cell.model.parameters()).device)},
        "versions": origin.versions(), "commit": head, "dirty": dirty, "command": command, "created": origin.now(), "external": None,
    }  # fmt: skip


def figures_of(cell: Cell, verdicts: Verdicts, moves: Sequence[Informed], left: Sequence[int]) -> dict[str, Any]:
    """Every figure with its n, standard error and, where it is a mean over draws, the two stricter counts.

    ``undefended`` has the same weights under A alone, on all images (as ``oblivious``); ``undefended_there`` on those of ``adaptive``.
    ``adaptive`` is the union: each image's worst candidate by the selection draws, judged by the scoring draws, over the first images up
    to the first one that not every attack has seen. ``broke`` counts the images that each attack alone turns wrong for most selection
    draws, ``worst`` those whose worst candidate is that attack's.
    """
    selection, score, base = verdicts["selection"], verdicts["score"], verdicts["base"].astype(np.float64)
    names = [move.name for move in moves]
    transfer = 1 + sum(move.way == "transfer" for move in moves)
    plan = cell.protocol.plan
    assert plan is not None
    oblivious = _worst(selection[:, :transfer])
    told: dict[str, Any] = {
        "clean": share(score[:, 0]), "undefended_clean": share(base[:, 0]), "undefended": share(base[:, -1]),
        "oblivious": _of_draws(_at(score, oblivious)), "per_attack": _per_attack(verdicts, moves),
    }  # fmt: skip
    informed = transfer < 1 + len(moves)
    worst, n = oblivious, len(selection)
    if informed:
        counted = [0, *(1 + place for place, move in enumerate(moves) if plan.headline or move.way != "queries")]
        limited = [move for move in moves if plan.headline or move.way != "queries"]
        n = rows_decided(verdicts, transfer, left, min([move.limit(len(left)) for move in limited if move.way != "transfer"]))
        worst = np.array(counted)[_worst(selection[:, counted])]
        told["adaptive"] = _of_draws(_at(score, worst)[:n])
        told["undefended_there"] = share(base[:n, -1])
        told["gain"] = gain(_at(score, worst)[:n] - base[:n, -1])
        if not plan.headline and any(move.way == "queries" for move in moves):
            seen = min(move.limit(len(left)) for move in moves)
            last = rows_decided(verdicts, transfer, left, seen)
            told["with_queries"] = _of_draws(_at(score, _worst(selection))[:last])
            told["without_queries_there"] = share(_at(score, worst)[:last])
    right = selection[:, 0] > 0.5
    told["broke"] = {name: int((right & (selection[:, 1 + place] <= 0.5)).sum()) for place, name in enumerate(names)}
    told["worst"] = {name: int((worst[:n] == 1 + place).sum()) for place, name in enumerate(names)}
    told["unbroken"] = int((worst[:n] == 0).sum())
    return told


def rows_decided(verdicts: Verdicts, transfer: int, left: Sequence[int], seen: int) -> int:
    """How many of the first images have seen every attack, or are broken for all draws by the clean image or by A.

    Args:
        verdicts: of all images.
        transfer: candidates of the first round.
        left: the rows of the second round, of which all attacks saw the first ``seen``.
        seen: how many.
    """
    known = set(left[:seen])
    open_rows = verdicts["row"][verdicts["selection"][:, :transfer].min(1) > 0]
    return next((int(row) for row in open_rows if int(row) not in known), len(verdicts["row"]))


def share(values: Shares) -> dict[str, Any]:
    """Mean of one number an image, its n, and its standard error over images."""
    n = len(values)
    if not n:
        return {"accuracy": None, "n": 0, "standard_error": None}
    return {"accuracy": float(values.mean()), "n": n, "standard_error": float(values.std() / n**0.5)}


def gain(differences: Shares, seed: int = 0) -> dict[str, Any]:
    """Defended minus undefended on the same images: mean, n and the 95 % interval over resampled images.

    ``helps`` is true where the whole interval is above zero, false where not, none for fewer than 100 images.
    """
    n = len(differences)
    if not n:
        return {"mean": None, "n": 0, "low": None, "high": None, "helps": None}
    generator = np.random.default_rng(seed)
    means = np.array([differences[generator.integers(0, n, n)].mean() for _ in range(RESAMPLES)])
    low, high = (float(np.quantile(means, at)) for at in (0.025, 0.975))
    return {"mean": float(differences.mean()), "n": n, "low": low, "high": high, "helps": bool(low > 0) if n >= FEWEST_IMAGES else None}


def words(figures: dict[str, Any], protocol: str) -> str:
    """What the figures say of the defence, in one sentence."""
    told = figures.get("gain")
    if told is None:
        return f"{protocol} does not know the defence: its figure says nothing of an attacker who does"
    if told["helps"] is None:
        return f"n = {told['n']} images are too few to say whether the defence helps ({FEWEST_IMAGES} or more)"
    mean, low, high = (f"{100 * told[name]:+.1f}" for name in ("mean", "low", "high"))
    verb = "helps" if told["helps"] else "harms" if told["high"] < 0 else "does not help"
    return f"{verb}: {mean} points against the undefended model (95 % interval {low} to {high}, n = {told['n']})"


def failed_checks(
    cell: Cell, verdicts: Verdicts, moves: Sequence[Informed], figures: dict[str, Any], zero: float | None, reached: float | None
) -> dict[str, str]:
    """What fails of the checks that every evaluation of a defence must pass (numbers as in ``docs/checks.md``)."""
    plan = cell.protocol.plan
    assert plan is not None
    index = verdicts["index"]
    queries = [1 + place for place, move in enumerate(moves) if move.way == "queries"]
    others = [place for place in range(1 + len(moves)) if place not in queries]
    seen = ~np.isnan(verdicts["selection"][:, queries]).all(1) if queries else np.zeros(len(index), dtype=bool)
    more = 0
    if seen.any():
        by_queries, by_others = (np.nanmin(verdicts["selection"][seen][:, some], axis=1) for some in (queries, others))
        more = int(((by_queries <= 0.5) & (by_others > 0.5)).sum())
    disagree = int((~verdicts["agree"]).sum())
    found = {
        "E1": not verdicts["inside"].all() and "an attacked image is outside the ball or [0, 1]",
        "E2": disagree > ALLOWED_DISAGREEMENTS and f"{disagree} verdicts of attacks are not those of a fresh forward",
        "E4": not (len(np.unique(index)) == len(index) == len(cell.data)) and "the images scored are not those of the set, each once",
        "E8": any(stage.batch_coupled for stage in cell.model.stages.declared.values())
        and "the defence declares that an image's result depends on its neighbours: score images alone",
        "E10": zero is not None and zero > ZERO_GRADIENTS and f"{100 * zero:.0f} % of the gradients are zero: they are masked",
        "E18": more > FEWEST and more / int(seen.sum()) > QUERIES_MORE
        and f"queries break {more} of {int(seen.sum())} images that no gradient broke: the gradient attacks are too weak",
        "E32": cell.model.stages.random and reached is not None and reached < WANTED_COSINE - 1e-6
        and f"two gradients by as many draws as were allowed have a cosine of {reached:.2f}, not {WANTED_COSINE}",
        "E33": "adaptive" not in figures and f"{cell.protocol.name} does not know the defence: measure it by adaptive_small or adaptive",
    }  # fmt: skip
    return {name: str(text) for name, text in found.items() if text}


#: The checks that :func:`failed_checks` makes.
CHECKS = ("E1", "E2", "E4", "E8", "E10", "E18", "E32", "E33")


def cost_multiplier(cell: Cell) -> float:
    """Floating-point operations of one defended forward, gradients of its own included, over those of an undefended one; the mean over the
    first images, since a gate spares some."""
    few = range(min(COSTED, len(cell.data)))
    images_nCHW = cell.in_space(cell.data.batch(few).images.to(next(cell.model.parameters()).device))
    keys_n = cell.data.index_N[: len(few)].to(images_nCHW.device)
    contexts = [cell.task.prepare(model, cell.data) for model in (cell.model, cell.model.undefended)]
    draws = draws_for("selection", keys_n)
    defended = operations(lambda x: cell.task.forward(cell.model, x, contexts[0], draws), images_nCHW)
    return round(defended / max(1, operations(lambda x: cell.task.forward(cell.model.undefended, x, contexts[1]), images_nCHW)), 2)


def _per_attack(verdicts: Verdicts, moves: Sequence[Informed]) -> dict[str, Any]:
    """What each attack alone leaves of the images that it saw."""
    found = {}
    for place, move in enumerate(moves):
        score = verdicts["score"][:, 1 + place]
        found[move.name] = share(score[~np.isnan(score)])
    return found


def _of_draws(scores: Shares) -> dict[str, Any]:
    """The mean over draws (headline), and the shares of images that are right for most and for all of them."""
    return {**share(scores), "majority": share((scores > 0.5).astype(float))["accuracy"],
            "strict": share((scores >= 1).astype(float))["accuracy"]}  # fmt: skip


def _worst(selection: Shares) -> NDArray[np.int64]:
    """The candidate that fewest selection draws get right; the first of several."""
    return np.asarray(np.nanargmin(selection, axis=1), dtype=np.int64)


def _at(columns: Shares, chosen: NDArray[np.int64]) -> Shares:
    return np.asarray(columns[np.arange(len(chosen)), chosen], dtype=np.float64)


def _zero_gradients(verdicts: Verdicts, moves: Sequence[Informed], piloted: float | None) -> float | None:
    """The share of zero gradients of C (of B where there is no C); of the pilot where A left nothing to attack."""
    for way in ("through", "bpda"):
        places = [1 + place for place, move in enumerate(moves) if move.way == way]
        dead = verdicts["dead"][:, places]
        if places and not np.isnan(dead).all():
            return float(np.nanmean(dead))
    return piloted


def _gate_rates(verdicts: Verdicts) -> dict[str, float] | None:
    """How often a gate opens on clean images and on each image's worst candidate; none without a gate."""
    gate = verdicts["gate"]
    if np.isnan(gate).all():
        return None
    return {"clean": float(np.nanmean(gate[:, 0])), "adversarial": float(np.nanmean(_at(gate, _worst(verdicts["selection"]))))}


def _attacks(cell: Cell, verdicts: Verdicts, moves: Sequence[Informed], pilot: Pilot) -> list[dict[str, Any]]:
    """A card's ``attacks``: as planned, with the images that each was shown and the draws of its gradients."""
    plan, found = cell.protocol.plan, []
    assert plan is not None
    random = cell.model.stages.random
    for place, move in enumerate(moves):
        tuning = pilot.ways.get("through" if move.way == "gate" and "through" in pilot.ways else move.way) or pilot.ways.get("bpda")
        draws = {"transfer": 1, "queries": plan.query_draws if random else 1}.get(move.way, tuning.draws if tuning else 1)
        found.append({**move.describe(len(cell.data)), "eot": draws, "n": int((~np.isnan(verdicts["selection"][:, 1 + place])).sum())})
    return found


def _add_columns(verdicts: Verdicts) -> None:
    """What every table of verdicts has: by majority of the selection draws, in the order of the attacks."""
    selection = np.where(np.isnan(verdicts["selection"]), np.inf, verdicts["selection"])
    course = np.minimum.accumulate(selection, axis=1) > 0.5
    verdicts["clean"], verdicts["right"] = course[:, 0], course[:, 1:]
    verdicts["clean_answer"] = verdicts["answer"][:, 0]
    verdicts["answer"] = verdicts["answer"][np.arange(len(selection)), _worst(verdicts["selection"])]


def _largest_share(answers: NDArray[Any]) -> float:
    return float(np.unique(answers, return_counts=True)[1].max() / len(answers))
