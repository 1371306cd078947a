"""Whether weights fit an architecture, in the words of a user: width, patch size, input size, embedding width, layers."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import open_clip
from torch import Tensor

from aft.errors import WeightsError

Sizes = dict[str, int | str]
INPUT = "input size"


def sizes_of_state(state: Mapping[str, Tensor]) -> Sizes:
    """What the shapes of weights (names of ``open_clip.CLIP``) say; what they do not say is left out."""
    found: dict[str, int | str | None] = {}
    if "visual.class_embedding" in state:
        patch, positions = _side(state, "visual.conv1.weight", 3), _side(state, "visual.positional_embedding", 0)
        found = {
            "image tower": "ViT", "width": _side(state, "visual.conv1.weight", 0), "patch size": patch,
            INPUT: patch * isqrt(positions - 1) if patch and positions else None,
            "embed_dim": _side(state, "visual.proj", 1), "layers": _blocks(state, "visual.transformer.resblocks."),
        }  # fmt: skip
    elif "visual.attnpool.c_proj.weight" in state:
        positions = _side(state, "visual.attnpool.positional_embedding", 0)
        found = {
            "image tower": "ResNet", "width": _side(state, "visual.layer1.0.conv1.weight", 0),
            INPUT: 32 * isqrt(positions - 1) if positions else None, "embed_dim": _side(state, "visual.attnpool.c_proj.weight", 0),
        }  # fmt: skip
    elif any(name.startswith("visual.trunk.") for name in state):
        found = {"image tower": "timm"}
    found |= {
        "text width": _side(state, "ln_final.weight", 0), "context length": _side(state, "positional_embedding", 0),
        "text layers": _blocks(state, "transformer.resblocks."),
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def _side(state: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    value = state.get(name)
    return None if value is None or value.ndim <= axis else value.shape[axis]


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def sizes_of_config(config: Mapping[str, Any]) -> Sizes:
    """The same of an open_clip configuration.

    Example:
        >>> sizes = sizes_of_config(open_clip.get_model_config("ViT-B-32"))
        >>> [sizes[name] for name in ("image tower", "width", "patch size", "input size", "embed_dim")]
        ['ViT', 768, 32, 224, 512]
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    found: dict[str, Any] = {"image tower": "timm"}
    if not vision.get("timm_model_name"):
        layers, resnet = vision.get("layers", 12), isinstance(vision.get("layers", 12), (list, tuple))
        found = {"image tower": "ResNet" if resnet else "ViT", "width": vision.get("width", 768), INPUT: vision.get("image_size", 224),
                 "embed_dim": config["embed_dim"]}  # fmt: skip
        found |= {} if resnet else {"patch size": vision.get("patch_size", 16), "layers": layers}
        found = {name: value for name, value in found.items() if isinstance(value, (int, str))}  # no lengths of two sides
        if not resnet and {"patch size", INPUT} <= found.keys():
            found[INPUT] -= found[INPUT] % found["patch size"]
    if not text.get("hf_model_name"):
        found |= {"text width": text.get("width", 512), "context length": text.get("context_length", 77),
                  "text layers": text.get("layers", 12)}  # fmt: skip
    return found


def check_fit(given: Sizes, config: Mapping[str, Any], name: str, origin: str) -> None:
    """Compares what both sides say.

    Args:
        given: of the weights.
        config: open_clip's configuration of the chosen model.
        name: the chosen model's name.
        origin: the file, for the message.

    Raises:
        WeightsError: they differ; each difference is a sentence, and open_clip names that would fit are listed.
    """
    wanted = sizes_of_config(config)
    differing = [size for size in given if size in wanted and given[size] != wanted[size]]
    if not differing:
        return
    if "image tower" in differing:
        differing = ["image tower"]
    lines = [f"the file has {size} {given[size]}, {name} has {wanted[size]}" for size in differing]
    raise WeightsError(f"weights of {origin} do not fit {name}: {'; '.join(lines)}. {_remedy(given, wanted, differing)}")


def _remedy(given: Sizes, wanted: Sizes, differing: list[str]) -> str:
    names = fitting_names(given)
    choose = f"choose a name that fits the file: {', '.join(names)}" if names else "choose the name of the model that the weights are of"
    if differing == [INPUT] and given.get("image tower") == "ViT":
        return f"Set image_size to {wanted[INPUT]} (or to {given[INPUT]}) to interpolate the position embedding, or {choose}."
    return f"Set name: {choose}."


def fitting_names(given: Sizes, most: int = 4) -> list[str]:
    """Names of open_clip whose sizes agree with all that the weights say."""
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    sizes = {name: sizes_of_config(config) for name, config in configs.items() if "multimodal_cfg" not in config}
    fitting = [name for name, own in sizes.items() if all(own.get(size) == value for size, value in given.items())]
    return sorted(fitting, key=lambda name: (len(name), name))[:most]
