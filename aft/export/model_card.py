"""README.md of an export: what it is, how it was trained, what was measured of these very weights, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft.cards import Card, lowered, read_complete
from aft.clip.model import ModelRecord, ZeroShotModel
from aft.clip.training_data import DataUse
from aft.errors import DataError
from aft.export.formats import Format, Head

NOT_STATED, NOT_KNOWN = "not stated", "not known"
MERGED = "merge("  # how aft.clip.merge begins the method of what it made

ROBUST = """Robust: right on the clean image and under every attack of the protocol. ± is one standard error. A verdict other than
`reliable` means that the figure was not, or not successfully, checked for weak attacks.

"""


@dataclass(frozen=True)
class Provenance:
    """What the weights do not say of themselves.

    Args:
        title: of the model card; none: model and method.
        licence: identifier of the weights' licence as model hubs know it, such as ``apache-2.0``; none: the card says that it is missing.
        data: what it was trained on, with that data's licence, in a sentence; none: what the weights say of it, or that it is not known.
    """

    title: str | None = None
    licence: str | None = None
    data: str | None = None


def cards_below(folder: Path, model: ZeroShotModel) -> list[Card]:
    """The cards of these very weights (and their defence), and of others on the same curve if these were merged.

    Raises:
        DataError: none are there, one is half written or not complete, or they are all of other weights: a figure belongs to the weights
            that it was measured on.
    """
    found = [card for path in sorted(folder.rglob("*.json")) if (card := read_complete(path)) is not None]
    if not found:
        raise DataError(f"no cards lie below {folder}: give the folder cards/ that eval.py wrote, or leave --cards out.")
    own = [card for card in found if is_of(card, model)]
    if not own:
        others = ", ".join(sorted({card["model"]["sha256"][:12] for card in found}))
        raise DataError(f"no cards below {folder} are of these weights (sha256 {model.record.sha256[:12]}): they are of {others}. Measure "
                        "them with eval.py, or leave --cards out.")  # fmt: skip
    return own + [card for card in found if not is_of(card, model) and _on_curve(card, model.record)]


def is_of(card: Card, model: ZeroShotModel) -> bool:
    """Whether a card measured these weights behind the same defence, or behind none like them."""
    told = card["defense"] and {key: card["defense"][key] for key in ("name", "settings")}
    return bool(card["model"]["sha256"] == model.record.sha256 and told == defense_of(model))


def defense_of(model: ZeroShotModel) -> dict[str, Any] | None:
    """Name and settings of what surrounds the tower; none for a plain model."""
    if not model.stages.declared:
        return None
    return model.defense or {"name": type(model).__name__, "settings": {}}


def _on_curve(card: Card, record: ModelRecord) -> bool:
    """Weights between the same ends as merged ones, or the base itself."""
    other = card["model"]
    merged = record.method.startswith(MERGED) and record.base_sha256 is not None and card["defense"] is None
    return merged and record.base_sha256 in (other["sha256"], other["base_sha256"])


def model_card(
    model: ZeroShotModel, kind: str, made: Format, head: Head, half: bool, cards: Sequence[Card], told: Provenance, files: Mapping[str, str]
) -> str:
    """The text of README.md."""
    record = model.record
    title = told.title or f"{record.name}, {record.method if record.method != 'none' else 'not fine-tuned'}"
    parts = [
        _front_matter(record, made, told),
        f"# {title}\n",
        _introduction(model, kind),
        "## Load it\n\nIn this folder:\n\n```python\n" + made.load + "\n```\n" + _usage(model, kind, half),
        "## Figures\n\n" + _figures(cards, model),
        "## How it was made\n\n" + _facts(model, head, half),
        "## Data and licence\n\n" + _data(record.data, told) + _licence(told),
        "## Files\n\n| file | sha256 |\n|---|---|\n" + "".join(f"| `{name}` | `{sha}` |\n" for name, sha in files.items()),
    ]
    return "\n".join(parts)


def _front_matter(record: ModelRecord, made: Format, told: Provenance) -> str:
    licence = f"license: {told.licence}" if told.licence else f"license: other\nlicense_name: {NOT_STATED.replace(' ', '-')}"
    tags = ["clip", "adversarial-robustness"] + (["adversarial-fine-tuning"] if record.eps_trained is not None else [])
    return f"---\n{licence}\nlibrary_name: {made.library}\npipeline_tag: {made.task}\ntags: [{', '.join(tags)}]\n---"


def _introduction(model: ZeroShotModel, kind: str) -> str:
    record, defense = model.record, defense_of(model)
    if record.eps_trained is not None:
        trained = f"Its image tower was fine-tuned on adversarial images inside {255 * record.eps_trained:.4g}/255 (`{record.method}`)"
    elif record.method == "none":
        trained = "Its image tower was not fine-tuned on adversarial images"
    else:
        sums = "the base, and the factors times what the fine-tunings of these sha256 changed"
        trained = f"Its image tower is `{record.method}`" + (f", {sums}" if record.method.startswith(MERGED) else "")
    behind = "" if defense is None else f" It runs behind the test-time defence `{defense['name']}`, which is part of the graph."
    return f"A CLIP in the format `{kind}`, exported by aft (adversarial fine-tuning, honest evaluation). {trained}.{behind}\n"


def _usage(model: ZeroShotModel, kind: str, half: bool) -> str:
    record = model.record
    side = record.resolution
    lines = [f"\nImages: RGB, {side} x {side}, bicubic (antialiased), the whole image squashed to a square, no crop."]
    if kind in ("onnx", "torch_export"):
        lines.append("Pixels are in [0, 1]; normalisation is inside the graph, so a radius of 4/255 means four grey levels.")
    else:
        lines.append(f"Pixels in [0, 1] are normalised with mean {list(record.mean)} and std {list(record.std)}.")
    lines.append(f"Activation `{record.activation}`; logits are {record.logit_scale:.6g} times the cosine.")
    if kind == "openai":
        lines.append("`clip.load` itself rounds weights to fp16; texts: `clip.tokenize(texts, context_length)`, the number in the file.")
    if half:
        lines.append("Weights are stored in fp16; figures are of the weights before that rounding.")
    if kind == "llava_tower" and not model.text_transform.idle:
        lines.append("The text transformation that it was trained with is not in a vision tower.")
    return "\n".join(lines) + "\n"


def _figures(cards: Sequence[Card], model: ZeroShotModel) -> str:
    if not cards:
        return "No cards were given with this export: nothing is claimed of its accuracy or its robustness.\n"
    own = [card for card in cards if is_of(card, model)]
    rest = [card for card in cards if not is_of(card, model)]
    text = ROBUST + _table(own)
    if rest:
        text += "\nOn the way between the original and the fine-tuned weights (task vectors; this model among the others):\n\n"
        text += _table([*rest, *own], weights=True)
    text += f"\nChance: {', '.join(f'{name} {100 * share:.1f} %' for name, share in _chances(own).items())}. "
    return text + "The cards, with commit, seeds and the command of each figure, lie in `cards/`.\n"


def _chances(cards: Sequence[Card]) -> dict[str, float]:
    return {f"{card['data']['name']} {card['data']['label_space']}": card["chance"] for card in cards}


def _table(cards: Sequence[Card], weights: bool = False) -> str:
    first = "| weights " if weights else ""
    rows = [f"{first}| data | n | eps | protocol | clean % | robust % | verdict |", "|---" * (8 if weights else 7) + "|"]
    for card in cards:
        card, data = lowered(card), card["data"]
        verdict = " ".join([card["verdict"]["status"], *card["verdict"]["failed_checks"]])
        cells = [f"{data['name']}/{data['split']} {data['label_space']}", f"{data['n']:,}", _radius(card), _protocol(card),
                 _percent(card, "clean"), _percent(card, "robust"), verdict]  # fmt: skip
        named = [f"`{card['model']['method']}` {card['model']['sha256'][:8]}"] if weights else []
        rows.append("| " + " | ".join([*named, *cells]) + " |")
    return "\n".join(rows) + "\n"


def _radius(card: Card) -> str:
    threat = card["threat"]
    if threat is None:
        return "-"
    size = f"{255 * threat['eps']:.4g}/255" if threat["norm"] == "linf" else f"{threat['eps']:.4g}"
    return f"{threat['norm']} {size}, {threat['space']} {threat['resolution']} px"


def _protocol(card: Card) -> str:
    name, fidelity = card["protocol"]["name"], card["protocol"]["fidelity"]
    return f"{name}" if fidelity == "exact" else f"{name}-like"


def _percent(card: Card, what: str) -> str:
    share, error = card[f"{what}_accuracy"], card["standard_error"][what]
    return "-" if share is None else f"{100 * share:.2f} ± {100 * error:.2f}"


def _facts(model: ZeroShotModel, head: Head, half: bool) -> str:
    record, defense = model.record, defense_of(model)
    without = "of a sum: those of its parts" if record.method.startswith(MERGED) else "none"
    radius = without if record.eps_trained is None else f"{255 * record.eps_trained:.4g}/255"
    rows = {
        "architecture": f"`{record.name}`", "method": f"`{record.method}`", "eps in training": radius,
        "what learned": f"`{json.dumps(record.trainable)}`" if record.trainable else "the whole image tower, or not said",
        "weights it was exported from, sha256": f"`{record.sha256}`",
        "weights they were fine-tuned from, sha256": f"`{record.base_sha256}`",
        "text transformation": f"`{record.text_transform}`", "stored in": "fp16" if half else "fp32",
    }  # fmt: skip
    if defense is not None:
        rows["test-time defence"] = f"`{defense['name']}` {json.dumps(defense['settings'])}"
    if head.classes:
        rows["classes of the logits"] = f"{len(head.classes)}: {', '.join(head.classes[:20])}{' ...' if len(head.classes) > 20 else ''}"
        rows["templates"] = ", ".join(f"`{template}`" for template in head.templates)
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _data(known: Sequence[DataUse], told: Provenance) -> str:
    """What was said on the command line; else what the weights say."""
    if told.data is not None:
        return f"{told.data}\n"
    if all(use["name"] is None for use in known):
        return f"Training data and its licence: {NOT_KNOWN}, the weights do not say; say them here before you pass this on.\n"
    rows = [" | ".join([NOT_KNOWN if use["name"] is None else f"`{use['name']}`", use["terms"] or NOT_KNOWN]) for use in known]
    lines = "".join(f"| {row} |\n" for row in rows)
    return f"Trained on, in this order, as the weights say:\n\n| data | terms of use |\n|---|---|\n{lines}\n"


def _licence(told: Provenance) -> str:
    licence = f"Licence of the weights: {told.licence or NOT_STATED + '; say it here before you pass this on'}."
    return f"{licence} The tokenizer's vocabulary, where it is in this folder, is OpenAI's (MIT licence).\n"
