"""Settings of the defences, chosen on held-out training images: ``python -m bench.calibrate_defenses``.

``bench/calibrate_defenses.yaml`` has the candidates and the rules. What needs no attack is always measured: TTC's threshold by the share of
clean images that its gate lets through, AOM's noise by the drift that it causes, CLIPure-Diff's climb by how well embeddings of noisy
images are restored, and for CLIPure-Cos the angles and the class biases that its lemma speaks of. With ``--attack`` every
candidate is attacked through its stages, and the best one is chosen. Results go to ``results/defenses/calibration.json``.

Shapes: n images, C channels, H height, W width, D embedding width, K classes.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor

from aft.attacks import PGD, sample_keys
from aft.attacks.adaptive import Expected, draw_cosines, eot_count
from aft.attacks.noise import uniform
from aft.attacks.sight import Dice, Sight
from aft.attacks.threat_model import pixel_fraction
from aft.cards import digest, standard_error, write_whole
from aft.clip import ZeroShotModel, load_model
from aft.clip.stages import Draw, draws_for, encode_in_stages
from aft.defenses import defend, open_gates
from aft.errors import ConfigError, ending_calmly
from aft.evaluation import first
from aft.evaluation.judge import scoring
from aft.evaluation.tasks import Classification, ClassText
from datamodules import ImageFolder

HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE / "bench" / "calibrate_defenses.yaml"
OUT = HERE / "results" / "defenses" / "calibration.json"
#: Candidates that are done; ignored by git, and can be deleted.
KEPT = HERE / "runs" / "calibrate_defenses.json"
MOST_CANDIDATES = 6
#: Draws that the attack's gradient is a mean of, at the most, and the place of the dice that find out how many are needed.
MOST_DRAWS, PILOT = 9, 1
#: Of the noise that stands on images before a defence sees them: not a number of any purpose.
NOISE_NUMBER = 1 << 20


class Attacker(Protocol):
    """An attack that knows the stages: BPDA with the mean over draws (attack B)."""

    def __call__(
        self, model: ZeroShotModel, text_KD: Tensor, images_nCHW: Tensor, labels_n: Tensor, keys_n: Tensor, *, eps: float, steps: int
    ) -> Tensor:
        """Adversarial images ``[n, C, H, W]`` in the ball of ``eps``, found with draws of the purpose ``attack``."""


class Images:
    """Held-out training images, their classes and keys, and the texts that they are classified among.

    Args:
        model: whose texts.
        data: an evaluation set of held-out training images.
        count: the first of its fixed balanced order.
        seed: of the keys.
    """

    def __init__(self, model: ZeroShotModel, data: Any, count: int, seed: int) -> None:
        part = first(data, count)
        batch = part.batch(range(count))
        assert batch.labels is not None
        self.names, self.templates = part.class_names, part.templates
        self.shown_nCHW, self.labels_n, self.keys_n = batch.images, batch.labels, sample_keys(seed, 0, batch.index)
        self.text_KD = model.text_bank(self.names, self.templates)

    def only(self, chosen_n: Tensor) -> Images:
        """Those where ``chosen_n`` (bool), with the texts of all."""
        part = copy.copy(self)
        part.shown_nCHW, part.labels_n, part.keys_n = self.shown_nCHW[chosen_n], self.labels_n[chosen_n], self.keys_n[chosen_n]
        return part

    def draws(self, count: int) -> list[Draw]:
        """Draws of the choice of settings; the verdict's own are never looked at."""
        return draws_for("selection", self.keys_n, count)

    def noisy(self, radius: float) -> Tensor:
        """The images under uniform noise that no defence draws."""
        noise_nCHW = 2 * uniform(self.keys_n, NOISE_NUMBER, self.shown_nCHW.shape[1:]) - 1
        return (self.shown_nCHW + radius * noise_nCHW).clamp(0, 1)

    def right(self, model: ZeroShotModel, images_nCHW: Tensor, count: int = 1) -> Tensor:
        """The share of draws for which each image is right, ``[n]``."""
        model.text_bank(self.names, self.templates)
        with torch.no_grad():
            looks = [model.logits(encode_in_stages(model, images_nCHW, draw), self.text_KD) for draw in self.draws(count)]
        return torch.stack([logits_nK.argmax(1) == self.labels_n for logits_nK in looks]).float().mean(0)


def share(right_n: Tensor) -> dict[str, float]:
    """A mean with its standard error over images, in %."""
    mean = float(right_n.float().mean())
    return {"percent": round(100 * mean, 2), "standard_error": round(100 * standard_error(mean, len(right_n)), 2)}


def units(model: ZeroShotModel, images_nCHW: Tensor, draw: Draw | None = None) -> Tensor:
    """Unit embeddings ``[n, D]``, through the stages."""
    with torch.no_grad():
        return encode_in_stages(model, images_nCHW, draw).unit_BD


def angles(one_nD: Tensor, other_nD: Tensor) -> Tensor:
    """Degrees between unit vectors, ``[n]``."""
    return (one_nD * other_nD).sum(1).clamp(-1, 1).acos().rad2deg()


def ttc_threshold(model: ZeroShotModel, seen: Images, given: Mapping[str, Any]) -> dict[str, Any]:
    """The drift of clean and of noisy images, and the threshold that lets a given share of clean ones be counterattacked."""
    gate = defend(model, "ttc").stages.pixels
    assert gate is not None and gate.gate is not None
    (draw,) = seen.draws(1)
    with torch.no_grad():
        drift = {str(radius): -gate.gate(seen.noisy(pixel_fraction(radius)), draw).statistic_n for radius in given["noise"]}
    threshold = round(float(drift[str(given["noise"][0])].quantile(given["quantile"])), 4)
    ways = {str(value): defend(model, "ttc", threshold=value) for value in (threshold, 0.2)}
    rates = {value: {key: round(float((moved < float(value)).float().mean()), 3) for key, moved in drift.items()} for value in ways}
    return {"threshold": threshold, "median_drift": {key: round(float(value.median()), 4) for key, value in drift.items()},
            "gate_rates": rates,
            "clean_accuracy": {value: share(seen.right(way, seen.shown_nCHW)) for value, way in ways.items()}}  # fmt: skip


def aom_sigma(model: ZeroShotModel, seen: Images, given: Mapping[str, Any]) -> dict[str, Any]:
    """Angles between images and their anchors for each noise, and the largest noise whose anchors stay near."""
    clean_nD = units(model, seen.shown_nCHW)
    apart = float(angles(clean_nD, clean_nD.roll(1, 0)).median())
    found = {}
    for sigma in given["sigma"]:
        anchor = defend(model, "aom", sigma=sigma, samples=given["samples"], strength=1.0)
        moved_nD = units(anchor, seen.shown_nCHW, seen.draws(1)[0])
        median = round(float(angles(clean_nD, moved_nD).median()), 2)
        found[sigma] = {"median_degrees": median, **share(answers(moved_nD, seen))}
    near = [sigma for sigma in given["sigma"] if found[sigma]["median_degrees"] <= given["share"] * apart]
    return {"sigma": near[-1] if near else given["sigma"][0], "degrees_between_images": round(apart, 2), "anchors": found}


def diff_climb(model: ZeroShotModel, seen: Images, given: Mapping[str, Any]) -> dict[str, Any]:
    """By how many degrees each climb brings embeddings of noisy images nearer to those of the clean ones; the best of them."""
    clean_nD, noisy_nCHW = units(model, seen.shown_nCHW), seen.noisy(pixel_fraction(given["noisy"]))
    noisy_nD = units(model, noisy_nCHW)
    before, found = angles(clean_nD, noisy_nD), []
    for begin, end, step in given["climbs"]:
        settings = {"first": begin, "last": end, "step": step}
        defended = defend(model, "clipure_diff", **settings)
        kept_nD, restored_nD = (units(defended, images, seen.draws(1)[0]) for images in (seen.shown_nCHW, noisy_nCHW))
        found.append({"settings": settings, "degrees_gained": round(float((before - angles(clean_nD, restored_nD)).mean()), 2),
                      "clean": share(answers(kept_nD, seen)), "noisy": share(answers(restored_nD, seen))})  # fmt: skip
    best = max(found, key=lambda one: float(one["degrees_gained"]))
    return {**best["settings"], "degrees_noisy": round(float(before.mean()), 2), "undefended_noisy": share(answers(noisy_nD, seen)),
            "climbs": found}  # fmt: skip


def answers(unit_nD: Tensor, seen: Images) -> Tensor:
    """Which embeddings are right, ``[n]``."""
    return (unit_nD @ seen.text_KD.T).argmax(1) == seen.labels_n


def cos_lemma(model: ZeroShotModel, seen: Images) -> dict[str, Any]:
    """The angles to the blank template, and the cosines of classes with it: all that CLIPure-Cos can act by."""
    clean_nD = units(model, seen.shown_nCHW)
    blank_D = defend(model, "clipure_cos_closed").blank(clean_nD)  # type: ignore[attr-defined]
    theta = (clean_nD @ blank_D).acos().rad2deg()
    bias_K = seen.text_KD @ blank_D
    forms = {str(degrees): defend(model, "clipure_cos_closed", degrees=degrees) for degrees in (5, 11.46, 28.62)}
    kept = {degrees: share(seen.right(form, seen.shown_nCHW)) for degrees, form in forms.items()}
    return {"degrees_to_the_template": {"median": round(float(theta.median()), 2), "smallest": round(float(theta.min()), 2),
                                        "largest": round(float(theta.max()), 2)},
            "class_cosines": {"mean": round(float(bias_K.mean()), 4), "spread": round(float(bias_K.std()), 4)}, "clean": kept}  # fmt: skip


def attacked(
    model: ZeroShotModel, seen: Images, given: Mapping[str, Any], settled: Mapping[str, Mapping[str, Any]], attack: Attacker,
    kept: Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Clean and robust accuracy of every candidate under the attack that knows it, and its gate rates on clean and attacked images.

    Args:
        model: undefended.
        seen: the images.
        given: ``candidates``, ``eps``, ``steps``, ``draws``.
        settled: settings that were chosen without an attack, by defence; a candidate's own come first.
        attack: attack B.
        kept: file of the candidates that are done, so that a killed run goes on; none: none is kept.

    Raises:
        ConfigError: more candidates than six of a defence.
    """
    def row(name: str, full: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One candidate, measured or taken from the file."""
        told = {"settings": dict(settings)} if settings is not None else {}
        how = {key: given[key] for key in ("eps", "steps", "draws")}
        way = defend(model, name, **full) if name != "undefended" else model
        shown = [seen.keys_n.tolist(), seen.labels_n.tolist(), list(seen.names), list(seen.templates)]
        key = digest([model.record.sha256, shown, name, way.defense, how])[:16]
        before = {} if kept is None or not kept.exists() else json.loads(kept.read_text())
        if key not in before:
            before[key] = measured(way, seen, given, attack)
            if kept is not None:
                write_whole(kept, json.dumps(before).encode())
            print(name, dict(full), {kind: before[key][kind]["percent"] for kind in ("clean", "robust")}, flush=True)
        return told | before[key]

    rows: dict[str, list[dict[str, Any]]] = {"undefended": [row("undefended", {})]}
    for name, candidates in given["candidates"].items():
        if len(candidates) > MOST_CANDIDATES:
            raise ConfigError(f"{name} has {len(candidates)} candidates: {MOST_CANDIDATES} are allowed, so that none is tuned longer.")
        rows[name] = [row(name, {**settled.get(name, {}), **settings}, settings) for settings in candidates]
    return rows


def measured(model: ZeroShotModel, seen: Images, given: Mapping[str, Any], attack: Attacker) -> dict[str, Any]:
    """One candidate. An image is robust as often as it is right when clean and under attack; what no draw gets right is not attacked."""
    text_KD = model.text_bank(seen.names, seen.templates)
    eps = pixel_fraction(given["eps"])
    clean_n = seen.right(model, seen.shown_nCHW, given["draws"])
    robust_n, right = torch.zeros_like(clean_n), seen.only(clean_n > 0)
    if not len(right.labels_n):
        return {"clean": share(clean_n), "robust": share(robust_n), "attacked": 0, "gate_rates": {}}
    shown_nCHW = attack(model, text_KD, right.shown_nCHW, right.labels_n, right.keys_n, eps=eps, steps=given["steps"])
    if float((shown_nCHW - right.shown_nCHW).abs().max()) > eps + 1e-6:
        raise ConfigError("the attack left the ball: its images are farther than eps from the clean ones.")
    robust_n[clean_n > 0] = torch.minimum(clean_n[clean_n > 0], right.right(model, shown_nCHW, given["draws"]))
    gates = {}
    for kind, part, images in (("clean", seen, seen.shown_nCHW), ("attacked", right, shown_nCHW)):
        with torch.no_grad():
            opened = open_gates(model, images, part.draws(1)[0])
        gates[kind] = {stage: round(float(open_n.float().mean()), 3) for stage, open_n in opened.items()}
    return {"clean": share(clean_n), "robust": share(robust_n), "attacked": len(right.labels_n), "gate_rates": gates}


def chosen(rows: Mapping[str, Sequence[Mapping[str, Any]]], clean_loss: float) -> dict[str, Any]:
    """Of each defence the most robust candidate that costs at most ``clean_loss`` points of clean accuracy; none where all cost more.

    One whose gates never open is no candidate: nothing of the defence is left but its noise.
    """
    base = rows["undefended"][0]["clean"]["percent"]
    best: dict[str, Any] = {}
    for name, candidates in rows.items():
        allowed = [row for row in candidates if row["clean"]["percent"] >= base - clean_loss and acts(row["gate_rates"])]
        if name != "undefended":
            best[name] = max(allowed, key=lambda row: (row["robust"]["percent"], row["clean"]["percent"]))["settings"] if allowed else None
    return best


def acts(gate_rates: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a gate opens for some images, clean or attacked; true of a defence without gates.

    Example:
        >>> acts({"clean": {"pixels": 0.0}, "attacked": {"pixels": 0.1}}), acts({"clean": {"pixels": 0.0}, "attacked": {"pixels": 0.0}})
        (True, False)
    """
    rates = [rate for stages in gate_rates.values() for rate in stages.values()]
    return not rates or max(rates) > 0


def bpda_and_eot(
    model: ZeroShotModel, text_KD: Tensor, images_nCHW: Tensor, labels_n: Tensor, keys_n: Tensor, *, eps: float, steps: int
) -> Tensor:
    """Attack B: PGD on the margin with steps of eps / 4, gradients past every stage, the mean over as many draws as the rule asks for."""
    sight = Sight(model, bpda=list(model.stages.declared))
    inner = Classification().objective(sight, ClassText(text_KD), labels_n, "margin")  # type: ignore[arg-type]
    draws = 1
    if model.stages.random:
        pilot = Expected(inner, sight, Dice(keys_n, PILOT))
        draws = eot_count(float(draw_cosines(pilot, images_nCHW).median()), MOST_DRAWS)
    objective = Expected(inner, sight, Dice(keys_n), draws)
    return PGD(eps=eps, step_size=eps / 4, steps=steps, keep="best")(objective, images_nCHW, keys_n).x_BCHW


def run(recipe: Mapping[str, Any], attack: Attacker | None, out: Path = OUT) -> dict[str, Any]:
    """Measures, chooses, writes and returns."""
    model = load_model(recipe["model"])
    data = ImageFolder(**recipe["data"]).evaluation_set("holdout")
    with scoring(model):
        seen = Images(model, data, recipe["free"]["images"], recipe["seed"])
        free = {"ttc": ttc_threshold(model, seen, recipe["free"]), "aom": aom_sigma(model, seen, recipe["free"]),
                "clipure_diff": diff_climb(model, seen, recipe["free"]), "clipure_cos": cos_lemma(model, seen)}  # fmt: skip
        told: dict[str, Any] = {
            "model": model.record.sha256, "data": f"{data.name}, {data.split}", "images": len(seen.labels_n),
            "undefended_clean": share(seen.right(model, seen.shown_nCHW)), "without_attack": free,
        }  # fmt: skip
        if attack is not None:
            given = recipe["attacked"]
            settled = {"ttc": {"threshold": free["ttc"]["threshold"]}, "aom": {"sigma": free["aom"]["sigma"]},
                       "clipure_diff": {key: free["clipure_diff"][key] for key in ("first", "last", "step")}}  # fmt: skip
            rows = attacked(model, Images(model, data, given["images"], recipe["seed"]), given, settled, attack, KEPT)
            told["with_attack"] = {"images": given["images"], "eps": given["eps"], "steps": given["steps"], "rows": rows,
                                   "chosen": chosen(rows, given["clean_loss"])}  # fmt: skip
    write_whole(out, (json.dumps(told, indent=1) + "\n").encode())
    return told


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--attack", action="store_true", help="also choose by the attack that knows the stages")
    given = parser.parse_args(args)
    told = run(yaml.safe_load(RECIPE.read_text()), bpda_and_eot if given.attack else None)
    print(json.dumps(told, indent=1))
    return told


if __name__ == "__main__":
    with ending_calmly():
        main()
