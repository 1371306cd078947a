"""Builds a ZeroShotModel from a name and weights: open_clip names and tags, files, our checkpoints, and the embedded MiniCLIP.

Nothing here unpickles code: files are safetensors, or are read with ``weights_only=True``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aft.clip.model import ModelRecord, ZeroShotModel, state_hash
from aft.clip.trainable import as_trained
from aft.errors import WeightsError, unknown_name

MINI = Path(__file__).parent / "mini"
EMBEDDED = {"miniclip32": MINI}
CHECKPOINT_KEY = "aft"
CHECKPOINT_SCHEMA = "aft.checkpoint/1"


@dataclass(frozen=True)
class ModelSpec:
    """Which CLIP to load.

    Args:
        name: ``miniclip32`` (embedded, 32 px), or any name of ``open_clip.list_models()``.
        pretrained: an open_clip tag (``openai``, ``laion2b_s34b_b79k`` ...), a weights file (.safetensors, .pt, .ckpt), or
            ``random``. None means the embedded weights, for an embedded model.
        activation: of a weights *file* of an open_clip name whose tags differ in it (OpenAI's weights need ``quick_gelu``);
            otherwise the name, the tag or the checkpoint says it.
        patch_dropout: share of patches dropped in training mode; 0.5 nearly halves the cost of pre-training.
    """

    name: str = "miniclip32"
    pretrained: str | None = None
    patch_dropout: float = 0.0
    activation: Literal["gelu", "quick_gelu"] | None = None


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


def load_model(spec: ModelSpec | str = ModelSpec()) -> ZeroShotModel:
    """Builds the model that ``spec`` names, in fp32 and eval mode, with a frozen text tower.

    A checkpoint of ours knows its own architecture, so ``name`` is then taken from it.

    Raises:
        WeightsError: unknown name or tag, missing or damaged file, or weights that do not fit (what is missing and what is
            unexpected is listed).
    """
    spec = ModelSpec(spec) if isinstance(spec, str) else spec
    with torch.random.fork_rng(devices=[]):  # building draws initial values; callers' random streams stay where they are
        model = _load(spec)
    for parameter in [*model.text_parameters, model.clip.get_parameter("logit_scale")]:
        parameter.requires_grad_(False)
    return model.float().eval()


def _load(spec: ModelSpec) -> ZeroShotModel:
    if spec.pretrained == "random":
        architecture = describe(spec.name, None)
        clip = build_clip(architecture.config, spec.patch_dropout)
        return ZeroShotModel(
            clip, tokenizer_of(spec.name, architecture.config), _record(spec.name, "random", state_hash(clip), architecture, clip)
        )
    path = _weights_file(spec)
    if path is None:
        return _from_tag(spec)
    contents = read_file(path)
    if CHECKPOINT_KEY in contents:
        return _from_checkpoint(path, contents, spec)
    architecture = _describe_file(spec)
    clip = build_clip(architecture.config, spec.patch_dropout)
    load_strictly(clip, contents.get("state_dict", contents), str(path))
    return ZeroShotModel(
        clip, tokenizer_of(spec.name, architecture.config), _record(spec.name, "open_clip", file_hash(path), architecture, clip)
    )


def _from_tag(spec: ModelSpec) -> ZeroShotModel:
    architecture = describe(spec.name, spec.pretrained)
    quick_gelu = bool(architecture.config.get("quick_gelu"))
    try:
        clip = open_clip.create_model(
            spec.name, pretrained=spec.pretrained, force_quick_gelu=quick_gelu, force_patch_dropout=spec.patch_dropout
        )
    except (RuntimeError, OSError) as error:
        raise WeightsError(
            f"{spec.name} with tag {spec.pretrained!r} could not be fetched ({error}): check the network, or give a weights file."
        ) from error
    return ZeroShotModel(
        clip, tokenizer_of(spec.name, architecture.config), _record(spec.name, "open_clip", state_hash(clip), architecture, clip)
    )


def _from_checkpoint(path: Path, contents: Mapping[str, Any], spec: ModelSpec) -> ZeroShotModel:
    header = contents[CHECKPOINT_KEY]
    if header.get("schema") != CHECKPOINT_SCHEMA:
        raise WeightsError(
            f"{path}: checkpoint schema {header.get('schema')!r} is not {CHECKPOINT_SCHEMA!r}: read it with the version that wrote it."
        )
    stored = header["model"]
    record = ModelRecord(**{**stored, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
    clip = build_clip(record.config, spec.patch_dropout)
    prefix = "model.clip."
    state = {key.removeprefix(prefix): value for key, value in contents["state_dict"].items() if key.startswith(prefix)}
    with as_trained(clip.get_submodule("visual"), record):
        load_strictly(clip, state, str(path))
    scale = float(clip.get_parameter("logit_scale").detach().exp())
    return ZeroShotModel(
        clip, tokenizer_of(record.name, record.config), replace(record, layout="aft", sha256=file_hash(path), logit_scale=scale)
    )


def checkpoint_header(
    model: ZeroShotModel, method: str, eps_trained: float | None, trainable: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a checkpoint of ours carries beside its tensors: plain types, so that it loads with ``weights_only=True``."""
    record = model.record
    base = None if record.layout == "random" else record.sha256
    learned = None if trainable is None else dict(trainable)
    changed = replace(record, method=method, eps_trained=eps_trained, base_sha256=base, trainable=learned)
    return {"schema": CHECKPOINT_SCHEMA, "model": asdict(changed)}


def describe(name: str, tag: str | None) -> Architecture:
    """The configuration of a name and tag. The activation is the tag's, also where open_clip's plain name says otherwise.

    Raises:
        WeightsError: the name or the tag is not known; near matches are listed.
    """
    if name in EMBEDDED:
        return _describe_folder(name)
    config = open_clip.get_model_config(name)
    if config is None:
        raise WeightsError(unknown_name("model", name, [*EMBEDDED, *open_clip.list_models()]))
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


def _describe_file(spec: ModelSpec) -> Architecture:
    """The configuration for a weights file, which does not say its activation itself."""
    architecture = describe(spec.name, None)
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    used = {bool(open_clip.get_pretrained_cfg(spec.name, tag).get("quick_gelu")) for tag in tags}
    if spec.activation is None and len(used) > 1:
        raise WeightsError(
            f"weights of {spec.name} exist with gelu and with quick_gelu, and a file does not say which: set activation to quick_gelu "
            "for OpenAI's weights and what was fine-tuned from them, else to gelu."
        )
    if spec.activation is not None:
        architecture.config["quick_gelu"] = spec.activation == "quick_gelu"
    return architecture


def _describe_folder(name: str) -> Architecture:
    stored = json.loads((EMBEDDED[name] / "open_clip_config.json").read_text(encoding="utf-8"))
    preprocess = stored["preprocess_cfg"]
    return Architecture(stored["model_cfg"], tuple(preprocess["mean"]), tuple(preprocess["std"]))


def tokenizer_of(name: str, config: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    """open_clip's tokenizer for its own names; the standard BPE at the configured context length for the embedded models."""
    if name in open_clip.list_models():
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
        return tokenizer
    own: Callable[[list[str]], Tensor] = SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
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


def _record(name: str, layout: str, sha256: str, architecture: Architecture, clip: nn.Module) -> ModelRecord:
    size = architecture.config["vision_cfg"].get("image_size", 224)
    return ModelRecord(
        name=name,
        layout=layout,
        sha256=sha256,
        config=architecture.config,
        resolution=size if isinstance(size, int) else size[0],
        mean=architecture.mean,
        std=architecture.std,
        activation=architecture.activation,
        logit_scale=float(clip.get_parameter("logit_scale").detach().exp()),
    )


def _weights_file(spec: ModelSpec) -> Path | None:
    """The file that ``spec`` means; none where it means a tag."""
    if spec.pretrained is None:
        if spec.name not in EMBEDDED:
            describe(spec.name, None)
            raise WeightsError(f"model {spec.name!r} needs weights: set pretrained to an open_clip tag, a file, or 'random'.")
        path = EMBEDDED[spec.name] / "open_clip_model.safetensors"
    else:
        path = Path(spec.pretrained)
        looks_like_a_path = path.suffix in {".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin"} or "/" in spec.pretrained
        if not path.is_file() and not looks_like_a_path:
            return None
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}: check the path, or give an open_clip tag or 'random'.")
    return path


def read_file(path: Path) -> dict[str, Any]:
    """The contents of a weights file as tensors and plain types; never runs code.

    Raises:
        WeightsError: the file is damaged, or holds a pickle of anything but tensors and plain types.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"{path} is no weights file, or holds more than tensors and plain types, which could run code: save its state_dict alone."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as weights ({error}): is the file whole? Copy or download it again.") from error
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path} holds a {type(contents).__name__}, not a dictionary of tensors.")
    return dict(contents)


def load_strictly(module: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Loads every tensor, and nothing but what fits.

    Raises:
        WeightsError: names missing, unexpected, or of another shape; the first eight of each are listed.
    """
    own = module.state_dict()
    given = {key.removeprefix("module."): value for key, value in state.items()}
    faults = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in given and given[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {what}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}" for what, keys in faults.items() if keys]
    if found:
        raise WeightsError(f"weights of {origin} do not fit the model. " + "; ".join(found) + ".")
    module.load_state_dict(given, strict=True)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(stream.read()).hexdigest()
        )
