"""Which of the published layouts a weights file has, and its tensors under open_clip's names.

Pure functions of dictionaries; nothing is read here and nothing is loaded. Names on the way out are those of ``open_clip.CLIP``
(``visual.conv1.weight``, ``token_embedding.weight`` ...), also for weights of an image tower alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from aft.errors import WeightsError

#: Where tensors are kept in files of several parts, in the order in which they are looked for.
WRAPPERS: tuple[tuple[str, ...], ...] = (
    ("vision_encoder_state_dict",),  # TeCoA, PMG-AFT, TGA-ZSR, SAFT, TTC's re-trainings
    ("partial_state_dict",),  # AdvFLYP
    ("modules", "clip.visual"),  # AGFT
    ("state_dict",),
    ("model",),
)
#: Left by DataParallel, by classes that wrap a model, and by torch.compile.
PREFIXES = frozenset({"module", "model", "_orig_mod"})
#: Numbers beside the tensors of OpenAI's CLIP, and position numbers that transformers used to store.
NO_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size"})
TRANSFORMERS_ONLY = ("vision_model.", "text_model.", "visual_projection.")
#: transformers' part of a name -> open_clip's.
TRANSFORMERS_NAMES = (
    ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.", "conv1."), ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding.", "token_embedding."), ("pre_layrnorm.", "ln_pre."), ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."), ("encoder.layers.", "transformer.resblocks."), ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."), ("self_attn.", "attn."), ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
    ("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What a weights file turned out to hold.

    Args:
        name: ``open_clip``, ``openai``, ``custom_text``, ``transformers``; of an image tower alone ``vit_visual``, ``resnet_visual``,
            ``timm_visual``, ``transformers_visual``; the wrapper, if any, stands before it (``vision_encoder_state_dict/vit_visual``).
        scope: ``whole`` CLIP, or the image tower alone (then the text side comes from elsewhere).
        state: tensors under the names of ``open_clip.CLIP``.
    """

    name: str
    scope: Literal["visual", "whole"]
    state: dict[str, Tensor]


def detect(contents: Mapping[str, Any], origin: str) -> Layout:
    """Finds the layout of a file's contents and maps its names.

    Args:
        contents: what was read from the file.
        origin: the file, for messages.

    Raises:
        WeightsError: the layout is none of the known ones; what was looked for and the first names found are listed.
    """
    wrapper, inner = unwrap(contents)
    unprefixed = without_prefixes(inner, origin)
    state = {key: value for key, value in unprefixed.items() if key not in NO_WEIGHTS}
    kind = _kind(state)
    if kind is None or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(_unknown(contents, inner, origin))
    if kind.startswith("transformers"):
        state = from_transformers(state)
    elif kind == "custom_text":
        state = {key.removeprefix("text."): value for key, value in state.items()}
    elif kind == "open_clip" and NO_WEIGHTS & set(unprefixed):
        kind = "openai"
    elif kind.endswith("_visual") and not _under_visual(state):
        state = {f"visual.{key}": value for key, value in state.items()}
    return Layout("/".join([*wrapper, kind]), "visual" if kind.endswith("_visual") else "whole", state)


def unwrap(contents: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The dictionary of tensors inside a file's contents, and under which names it lay; the contents themselves if under none."""
    for path in WRAPPERS:
        inner: Any = contents
        for name in path:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return (() if path in (("state_dict",), ("model",)) else (".".join(path),)), dict(inner)
    return (), dict(contents)


def without_prefixes(state: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Takes ``module.``, ``model.`` and ``_orig_mod.`` off the names, however often and in whatever order they come.

    Raises:
        WeightsError: two names become one, as where a file holds two models.

    Example:
        >>> list(without_prefixes({"module._orig_mod.visual.module.proj": 0}, "x.pt"))
        ['visual.proj']
    """
    bare: dict[str, Any] = {}
    for key, value in state.items():
        name = _without_prefixes(str(key))
        if name in bare:
            raise WeightsError(f"{origin} holds {name} twice, once under {key}: it seems to hold two models; save one of them alone.")
        bare[name] = value
    return bare


def _without_prefixes(key: str) -> str:
    kept: list[str] = []
    parts = [part for part in key.split(".") if part != "_orig_mod"]
    for place, part in enumerate(parts):
        wraps = part in PREFIXES and kept in ([], ["visual"]) and place + 1 < len(parts)
        kept += [] if wraps else [part]
    return ".".join(kept)


def _under_visual(state: Mapping[str, Any]) -> bool:
    return any(key.startswith("visual.") for key in state)


def _kind(state: Mapping[str, Any]) -> str | None:
    """Name of the layout of bare, unprefixed names; none if it is not known."""
    if any(key.startswith(TRANSFORMERS_ONLY) for key in state):
        return "transformers" if any(key.startswith("text_model.") for key in state) else "transformers_visual"
    if _under_visual(state):
        if any(key.startswith("text.") for key in state):
            return "custom_text"
        if "token_embedding.weight" in state:
            return "open_clip"
    names = {key.removeprefix("visual.") for key in state}
    for kind, mark in (("vit_visual", "class_embedding"), ("resnet_visual", "attnpool.c_proj.weight")):
        if mark in names and "conv1.weight" in names:
            return kind
    return "timm_visual" if any(name.startswith("trunk.") for name in names) else None


def _unknown(contents: Mapping[str, Any], inner: Mapping[str, Any], origin: str) -> str:
    wrappers = ", ".join(".".join(path) for path in WRAPPERS)
    found = ", ".join(list(map(str, contents))[:8]) or "nothing"
    inside = "" if inner.keys() == contents.keys() else f"; inside: {', '.join(list(map(str, inner))[:8]) or 'nothing'}"
    return (
        f"{origin} has none of the known layouts. Looked for the parts {wrappers}, and in them or in the file itself for a ViT or ResNet "
        f"image tower, a whole CLIP of OpenAI or open_clip, or transformers' CLIPModel. First names found: {found}{inside}. "
        "Save the image tower's or the whole model's state_dict as tensors alone."
    )


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' ``CLIPModel`` (or its vision part) to open_clip's; query, key and value become one matrix.

    A query without its key or value keeps its name, so that a strict load reports it.
    """
    mapped = dict(_renamed(state))
    for query in [key for key in mapped if ".attn.q_proj." in key]:
        three = [query.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(name in mapped for name in three):
            mapped[query.replace("q_proj.", "in_proj_")] = torch.cat([mapped.pop(name) for name in three])
    return mapped


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: names of ``open_clip.CLIP`` to those of transformers' ``CLIPModel``.

    The one matrix of query, key and value is cut in three, and projections, which open_clip applies as ``x @ proj``, are turned.
    """
    mapped: dict[str, Tensor] = {}
    turned = {ours: theirs for theirs, ours in TRANSFORMERS_NAMES[-2:]}
    for name, value in state.items():
        inside, rest = ("vision_model.", name.removeprefix("visual.")) if name.startswith("visual.") else ("text_model.", name)
        for theirs, ours in TRANSFORMERS_NAMES[2:-2]:
            rest = rest.replace(ours, theirs)
        if name in turned:
            mapped[turned[name]] = value.T.contiguous()
        elif "in_proj_" in rest:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                mapped[inside + rest.replace("in_proj_", f"{part}_proj.")] = third
        else:
            mapped[name if name == "logit_scale" else inside + rest] = value
    return mapped


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if name.endswith("embeddings.position_ids"):
            continue
        new = name
        for old_part, new_part in TRANSFORMERS_NAMES:
            new = new.replace(old_part, new_part)
        yield new, value.T.contiguous() if name in ("visual_projection.weight", "text_projection.weight") else value
