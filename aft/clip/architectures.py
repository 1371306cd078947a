"""Names, tags and folders -> architecture: open_clip's configuration and the preprocessing that belongs to it, before any weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from aft.errors import WeightsError, unknown_name

MINI = Path(__file__).parent / "mini"
#: Models that come with the package, each in open_clip's folder layout.
EMBEDDED = {"miniclip32": MINI}
#: Models that are computed from an embedded one when they are loaded: name -> (embedded model, factor of the input size).
ENLARGED = {"miniclip64": ("miniclip32", 2)}
OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"
#: What transformers means by a setting that a config.json leaves out.
VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                   "patch_size": 32}  # fmt: skip
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
                 "max_position_embeddings": 77, "vocab_size": 49408}  # fmt: skip
USUAL_EPS = 1e-5  # of layer normalisation, in both libraries


@dataclass(frozen=True)
class Architecture:
    """What a name and tag stand for, before any weights: open_clip's configuration and the preprocessing that belongs to it."""

    config: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def activation(self) -> str:
        """``quick_gelu`` for OpenAI's weights and some of their time, else ``gelu``."""
        return "quick_gelu" if self.config.get("quick_gelu") else "gelu"


def known_names() -> list[str]:
    """Every name that a model can be asked for by."""
    return [*EMBEDDED, *ENLARGED, *open_clip.list_models()]


def describe(name: str, tag: str | None) -> Architecture:
    """The configuration of a name and tag. The activation is the tag's, also where open_clip's plain name says otherwise.

    Raises:
        WeightsError: the name or the tag is not known; near matches are listed.
    """
    if name in ENLARGED:
        return _enlarged(name)
    if name in EMBEDDED:
        return describe_folder(EMBEDDED[name])
    config = open_clip.get_model_config(name)
    if config is None:
        raise WeightsError(unknown_name("model", name, known_names()))
    preprocess: Mapping[str, Any] = {}
    if tag is not None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag.lower() not in [known.lower() for known in tags]:
            raise WeightsError(
                f"{unknown_name(f'weights tag of {name}', tag, [*tags, 'random'])} A path to a file is allowed too; no file is there."
            )
        preprocess = open_clip.get_pretrained_cfg(name, tag)
        config["quick_gelu"] = bool(preprocess.get("quick_gelu", config.get("quick_gelu", False)))
    mean, std = preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN, preprocess.get("std") or open_clip.OPENAI_DATASET_STD
    return Architecture(config, tuple(mean), tuple(std))


def describe_file(name: str, activation: str | None) -> Architecture:
    """The configuration for a weights file, which does not say its activation itself.

    Raises:
        WeightsError: the name's tags differ in their activation, and none is given.
    """
    architecture = describe(name, None)
    tags = open_clip.list_pretrained_tags_by_model(name)
    used = {bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")) for tag in tags}
    if activation is None and len(used) > 1:
        raise WeightsError(
            f"weights of {name} exist with gelu and with quick_gelu, and a file does not say which: set activation to quick_gelu "
            "for OpenAI's weights and what was fine-tuned from them, else to gelu."
        )
    if activation is not None:
        architecture.config["quick_gelu"] = activation == "quick_gelu"
    return architecture


def _enlarged(name: str) -> Architecture:
    source, factor = ENLARGED[name]
    architecture = describe(source, None)
    vision = architecture.config["vision_cfg"]
    vision |= {"image_size": factor * vision["image_size"], "patch_size": factor * vision["patch_size"]}
    return architecture


def is_hub(folder: Path) -> bool:
    """Whether a folder looks like a model of the hub."""
    return any((folder / name).is_file() for name in (OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG))


def describe_hub(folder: Path) -> Architecture | None:
    """What a folder of the hub says of itself; none where it has no configuration of a whole CLIP."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return describe_folder(folder)
    return describe_transformers(folder) if (folder / TRANSFORMERS_CONFIG).is_file() else None


def describe_folder(folder: Path) -> Architecture:
    """What a folder in open_clip's hub layout says of itself."""
    stored = _read_json(folder / OPEN_CLIP_CONFIG)
    preprocess = stored.get("preprocess_cfg", {})
    mean, std = preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN), preprocess.get("std", open_clip.OPENAI_DATASET_STD)
    return Architecture(stored["model_cfg"], tuple(mean), tuple(std))


def describe_transformers(folder: Path) -> Architecture | None:
    """What a folder of transformers' ``CLIPModel`` says of itself, as open_clip's configuration; none where it holds no whole CLIP.

    Raises:
        WeightsError: an activation that open_clip's towers do not have, or two of them.
    """
    stored = _read_json(folder / TRANSFORMERS_CONFIG)
    if not {"vision_config", "text_config"} <= stored.keys():
        return None
    vision, text = VISION_DEFAULTS | stored["vision_config"], TEXT_DEFAULTS | stored["text_config"]
    activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise WeightsError(f"{folder} has the activations {sorted(activations)}: both towers must have gelu, or both quick_gelu.")
    config = {
        "embed_dim": stored.get("projection_dim", 512),
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": _tower(vision) | {
            "image_size": vision["image_size"], "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": _tower(text) | {
            "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"], "heads": text["num_attention_heads"],
        },
    }  # fmt: skip
    pixels = _read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    mean, std = pixels.get("image_mean", open_clip.OPENAI_DATASET_MEAN), pixels.get("image_std", open_clip.OPENAI_DATASET_STD)
    return Architecture(config, tuple(mean), tuple(std))


def _tower(part: Mapping[str, Any]) -> dict[str, Any]:
    width, inner = part["hidden_size"], part["intermediate_size"]
    ratio = inner / width if int(width * (inner / width)) == inner else (inner + 0.5) / width  # open_clip rounds width * ratio down
    tower = {"width": width, "layers": part["num_hidden_layers"], "mlp_ratio": ratio}
    eps = part.get("layer_norm_eps", USUAL_EPS)
    return tower if eps == USUAL_EPS else tower | {"norm_kwargs": {"eps": eps}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({error}): copy or download the folder again.") from error
    if not isinstance(stored, dict):
        raise WeightsError(f"{path} holds no settings: copy or download the folder again.")
    return stored


def tokenizer_of(name: str, config: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    """open_clip's tokenizer for its own names; the standard BPE at the configured context length for all others.

    Raises:
        WeightsError: another name whose text tower has a tokenizer of its own.
    """
    if name in open_clip.list_models():
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
        return tokenizer
    text = config["text_cfg"]
    if text.get("hf_tokenizer_name"):
        raise WeightsError(f"the text tower of {name!r} reads tokens of {text['hf_tokenizer_name']}: set name to the open_clip name of the "
                           "same architecture, which brings this tokenizer.")  # fmt: skip
    own: Callable[[list[str]], Tensor] = SimpleTokenizer(context_length=text.get("context_length", 77))
    return own


def build_clip(config: Mapping[str, Any], patch_dropout: float = 0.0) -> nn.Module:
    """An open_clip model of this configuration with random weights."""
    settings = copy.deepcopy(dict(config))
    custom_text = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    settings["vision_cfg"]["patch_dropout"] = patch_dropout
    settings["vision_cfg"].pop("timm_model_pretrained", None)
    model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model: nn.Module = model_class(**settings)
    return model
