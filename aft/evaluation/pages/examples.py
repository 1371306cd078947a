"""Some images before and under attack, the difference made visible, and where the model finds the text of the true class.

They illustrate and measure nothing: the images are the first of a fixed order, and the page says by which rule.
Shapes: n images, C channels, H rows, W columns, S side of a map.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from aft import cards
from aft.attacks import PGD, ClassificationObjective, sample_keys
from aft.batch import EvaluationSet
from aft.cards import Card
from aft.clip.model import ZeroShotModel
from aft.clip.towers import has_tokens
from aft.errors import DataError
from aft.evaluation.collect import Collection
from aft.evaluation.judge import scoring
from aft.evaluation.report import data_text, eps_text
from aft.evaluation.runner import KEPT
from aft.evaluation.subsets import first
from aft.losses import text_guided_attention

#: Pictures of one model, and how many kept sets are shown.
COUNT, SETS = 6, 4
#: Radius and steps of the short attack; the radius that this project's models are trained at.
EPS, STEPS = 2 / 255, 20
#: Images are made no larger than this, pixels.
LARGEST_SIDE = 112
#: Anchors of a colour map from dark blue to yellow, which colour-blind eyes and grey prints can read.
COLOURS = np.array([[0, 32, 76], [64, 77, 107], [124, 123, 120], [187, 174, 108], [255, 233, 69]], np.float64)
#: How many images are looked through for those that all models call right when clean.
LOOKED_THROUGH = 200


@dataclass(frozen=True)
class Picture:
    """One PNG as a data URI; ``smooth`` where it may be enlarged smoothly."""

    uri: str
    caption: str
    smooth: bool = False


@dataclass(frozen=True)
class Example:
    """One image: what it shows, what the model says of it before and under attack, and its pictures in the order of the columns."""

    truth: str
    before: str
    under: str
    right: bool
    pictures: list[Picture]


@dataclass(frozen=True)
class Examples:
    """Examples of one model, and in words how they came about."""

    title: str
    how: str
    columns: list[str]
    examples: list[Example]


def attacked(models: Sequence[tuple[str, ZeroShotModel]], data: EvaluationSet, count: int = COUNT) -> list[Examples]:
    """A short attack on each model, on the first images that all of them call right when clean.

    Args:
        models: with their labels; of a tower without patch tokens no attention is shown.
        data: labelled images.
        count: images a model.

    Raises:
        DataError: there are no such images among the first 200.
    """
    subset = first(data, min(len(data), LOOKED_THROUGH))
    batch = subset.batch(range(len(subset)))
    assert batch.labels is not None
    right_n = torch.ones(len(subset), dtype=torch.bool)
    with torch.no_grad():
        for _, model in models:
            right_n &= model(batch.images, model.text_bank(subset.class_names, subset.templates)).argmax(1) == batch.labels
    rows = right_n.nonzero().flatten()[:count].tolist()
    if not rows:
        names = ", ".join(name for name, _ in models)
        raise DataError(f"none of the first {len(subset)} images of {data.name} is called right by {names}: examples need an image that is "
                        "right before the attack.")  # fmt: skip
    return [_of_model(label, model, subset, rows) for label, model in models]


def _of_model(label: str, model: ZeroShotModel, data: EvaluationSet, rows: Sequence[int]) -> Examples:
    batch = data.batch(rows)
    assert batch.labels is not None
    texts_KD = model.text_bank(data.class_names, data.templates)
    with scoring(model):
        objective = ClassificationObjective(lambda x_nCHW: model(x_nCHW, texts_KD), batch.labels, modules=(model,))
        attack = PGD(eps=EPS, steps=STEPS, relative_step_size=2.5 / STEPS, keep="best")
        under_nCHW = attack(objective, batch.images, sample_keys(0, 0, batch.index)).x_BCHW
        with torch.no_grad():
            answers = model(under_nCHW, texts_KD).argmax(1)
            maps = _maps(model, (batch.images, under_nCHW), texts_KD[batch.labels])
    told = []
    for row, truth in enumerate(batch.labels.tolist()):
        clean, under = batch.images[row], under_nCHW[row]
        pictures = _pair(clean, under, EPS)
        pictures += [Picture(_png(_over(image, of_both[row])), caption, smooth=True)
                     for image, of_both, caption in zip((clean, under), maps, ("attention before", "attention under attack"), strict=False)]
        names = data.class_names
        told.append(Example(names[truth], names[truth], names[answers[row]], bool(answers[row] == truth), pictures))
    how = (f"PGD of {STEPS} steps (best iterate, seed 0) at eps {255 * EPS:.3g}/255, on {data.name}; weights {model.record.sha256[:12]}. "
           f"The first {len(rows)} images of the fixed order that every model shown here calls right before the attack.")  # fmt: skip
    return Examples(label, how, _columns(EPS, bool(maps)), told)


def _maps(model: ZeroShotModel, images: Sequence[Tensor], text_nD: Tensor) -> list[NDArray[np.float64]]:
    """Text-guided attention of each batch, ``[n, S, S]`` in [0, 1]; none where the tower has no patch tokens."""
    if not has_tokens(model.visual):
        return []
    side = min(images[0].shape[-1], LARGEST_SIDE)
    found = []
    for batch_nCHW in images:
        tokens_nND = model.encode(batch_nCHW, tokens=True).precise.tokens_BND
        assert tokens_nND is not None
        if round(tokens_nND.shape[1] ** 0.5) ** 2 != tokens_nND.shape[1]:
            return []
        found.append(text_guided_attention(tokens_nND, text_nD, side).view(-1, side, side).cpu().double().numpy())
    return found


def kept(found: Collection) -> list[Examples]:
    """Examples from the images that ``--keep_images`` left beside cards (``OUT/parts``); needs no model, so there is no attention.

    The first images in the order of the data that are right when clean. Parts written before clean images were kept with them are left out.
    """
    told: list[Examples] = []
    for place, (label, card) in enumerate(found.labelled):
        table = found.verdicts(place) if card["threat"] is not None and len(told) < SETS else None
        if table is not None and (examples := list(_kept_of(found.paths[place], card, table))):
            how = (f"Kept by the run: what is left of {data_text(card)} after {'+'.join(one['name'] for one in card['attacks'])} at eps "
                   f"{eps_text(card)}. The first images of the fixed order that are right before the attack.")
            told.append(Examples(f"{label}, eps {eps_text(card)}", how, _columns(card["threat"]["eps"], False), examples))
    return told


def _kept_of(path: Path, card: Card, table: cards.Verdicts) -> Iterator[Example]:
    names = list(card["metrics"].get("per_class") or [])
    order = np.argsort(table["row"])
    rows = order[table["clean"][order]][:COUNT]
    images = _images_of(path, card, {int(index) for index in table["index"][rows]})
    for row in rows:
        if pair := images.get(int(table["index"][row])):
            truth, before, under = (_class(names, int(table[name][row])) for name in ("label", "clean_answer", "answer"))
            yield Example(truth, before, under, bool(table["right"][row, -1]), _pair(*pair, eps=card["threat"]["eps"]))


def _images_of(path: Path, card: Card, wanted: set[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Index -> clean and adversarial image, from ``OUT/parts/LABEL-CELL`` for a card ``OUT/cards/LABEL/NAME.json``."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for part in sorted((path.resolve().parents[2] / "parts" / f"{path.parent.name}-{card['cell']}").glob("images-*.npz")):
        arrays = cards.read_arrays(part)
        for place, index in enumerate(arrays["index"] if KEPT[0] in arrays else ()):
            if int(index) in wanted:
                clean, under = (torch.from_numpy(arrays[name][place]) for name in KEPT)
                found[int(index)] = (clean, under)
        if found.keys() == wanted:
            break
    return found


def _class(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _columns(eps: float, attention: bool) -> list[str]:
    usual = ["before", "under attack", f"difference × {_gain(eps):.2g}"]
    return [*usual, "attention before", "attention under attack"] if attention else usual


def _gain(eps: float) -> float:
    """So that a change of one eps goes from middle grey to black or white; at most as it is where eps is large."""
    return max(1.0, 0.5 / eps)


def _pair(clean_CHW: Tensor, under_CHW: Tensor, eps: float) -> list[Picture]:
    difference = (0.5 + (under_CHW - clean_CHW) * _gain(eps)).clamp(0, 1)
    pictures = zip((clean_CHW, under_CHW, difference), ("before", "under attack", "difference, amplified"), strict=True)
    return [Picture(_png(_bytes(image)), caption) for image, caption in pictures]


def _bytes(image_CHW: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = (image_CHW.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return array


def _over(image_CHW: Tensor, map_SS: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A map in colour, darkened where the image is dark, so that the image is seen through it."""
    grey = Image.fromarray(_bytes(image_CHW)).convert("L").resize(map_SS.shape[::-1])
    place = map_SS * (len(COLOURS) - 1)
    below = np.clip(place.astype(int), 0, len(COLOURS) - 2)
    share = (place - below)[..., None]
    coloured = COLOURS[below] * (1 - share) + COLOURS[below + 1] * share
    seen: NDArray[np.uint8] = (coloured * (0.45 + 0.55 * np.asarray(grey, np.float64)[..., None] / 255)).round().astype(np.uint8)
    return seen


def _png(image_HWC: NDArray[np.uint8]) -> str:
    image = Image.fromarray(image_HWC)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
