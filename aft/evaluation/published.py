"""Protocols of the literature as data: what each one does, and how sure we are of it.

A field is ``exact`` (read in the released code or configuration), ``described`` (read elsewhere, or ours stands in for it) or ``unknown``.
A protocol with any field that is not exact is printed as ``NAME-like``. Where protocols differ, and what that does to a number, is in
``docs/protocols.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aft.attacks import APGD, PGD, APGDTargeted
from aft.attacks.base import Attack
from aft.attacks.objectives import CLASSES_NEEDED, LossName

Mark = Literal["exact", "described", "unknown"]
#: Where the attack's ball lies: in the pixels of the data, or after the resize to the model's input.
Space = Literal["native", "model"]
FIELDS = ("attacks", "eps", "steps", "reduction", "space", "resize", "templates", "class_names", "samples")

THIS_IS = ("This is a photo of a {}",)
GREY = 1 / 255


@dataclass(frozen=True)
class Published:
    """One protocol of the literature.

    Args:
        name: the paper's.
        source: where it was read.
        kind: ``pgd`` or ``apgd`` (CE and targeted DLR).
        eps: radius that its tables are at, in units of the pixel range.
        steps: of each attack.
        step_size: of PGD.
        space: where the ball lies, for images as small as ours (CIFAR, STL).
        templates: of the class texts; none: the data set's own.
        scale: factor on cosines; none: the model's.
        marks: how sure each of ``FIELDS`` is.
        notes: what else differs, in words.
    """

    name: str
    source: str
    kind: Literal["pgd", "apgd"]
    eps: float
    steps: int
    space: Space
    marks: dict[str, Mark]
    step_size: float = GREY
    templates: tuple[str, ...] | None = THIS_IS
    scale: float | None = None
    notes: str = ""

    @property
    def fidelity(self) -> Literal["exact", "like"]:
        """``exact`` if every field is."""
        return "exact" if all(mark == "exact" for mark in self.marks.values()) else "like"

    def attacks(self, classes: int) -> list[tuple[str, LossName, Attack, int | None]]:
        """Name, loss, attack and targets of each, in turn, for a label space of so many classes."""
        if self.kind == "pgd":
            return [(f"pgd{self.steps}_last", "ce", PGD(eps=self.eps, steps=self.steps, step_size=self.step_size), None)]
        untargeted, targets = APGD(eps=self.eps, steps=self.steps), min(9, classes - 1)
        planned: list[tuple[str, LossName, Attack, int | None]] = [("apgd_ce", "ce", untargeted, None)]
        if classes >= CLASSES_NEEDED["dlr_targeted"]:
            aimed = APGDTargeted(eps=self.eps, steps=self.steps, targets=targets)
            planned.append(("apgd_t", "dlr_targeted", aimed, targets))
        return planned


def printed(protocol: Mapping[str, str]) -> str:
    """The name of a card's protocol in tables: ``NAME-like`` where it is not exactly what the name says."""
    return protocol["name"] if protocol["fidelity"] == "exact" else f"{protocol['name']}-like"


def marks(**other: Mark) -> dict[str, Mark]:
    """All fields exact but for those named; class names and sample counts are those of the data at hand, so at best described."""
    usual: dict[str, Mark] = dict.fromkeys(FIELDS, "exact")
    return {**usual, "class_names": "described", "samples": "described", **other}


PUBLISHED: dict[str, Published] = {
    one.name: one
    for one in (
        Published(
            "tecoa", "released code of arXiv 2212.07016", "pgd", 2 * GREY, 5, "native", marks(),
            notes="PGD from a random start, last iterate; fp16 autocast and a mean over the batch, here fp32 and a sum.",
        ),
        Published(
            "pmg_aft", "released code of arXiv 2401.04350", "pgd", GREY, 10, "native", marks(reduction="described"), scale=1.0,
            notes="Cosines without the model's scale, so that cross-entropy is nearly linear; mean and std are ImageNet's.",
        ),
        Published(
            "tga_zsr", "released code of arXiv 2410.21802", "pgd", GREY, 100, "model", marks(),
            notes="Everything is resized to the model's input before the attack.",
        ),
        Published(
            "robustvlm", "released code of arXiv 2402.12336", "apgd", 2 * GREY, 100, "model",
            marks(steps="described", templates="described"), templates=None,
            notes="1,000 images a set, templates of CLIP_benchmark; with two classes APGD-CE alone.",
        ),
        Published(
            "ttc", "released code of TTC (CVPR 2025)", "pgd", GREY, 10, "model", marks(templates="described", resize="described"),
            notes="Sum over the batch, as here; in the paper the attack is on the undefended model and does not know the defence.",
        ),
        Published(
            "agft", "released code of arXiv 2603.29410", "pgd", GREY, 20, "native", marks(templates="described"),
            templates=("a photo of a {}.",), notes="Class names and templates in the manner of CoOp, with a full stop.",
        ),
    )
}  # fmt: skip
