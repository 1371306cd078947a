"""Builds a ZeroShotModel from a name and weights: open_clip names and tags, files, folders, our checkpoints, the embedded MiniCLIP.

Nothing here unpickles code: files are safetensors, or are read with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn

from aft.clip.architectures import (
    EMBEDDED,
    ENLARGED,
    Architecture,
    build_clip,
    describe,
    describe_file,
    describe_hub,
    is_hub,
    tokenizer_of,
)  # fmt: skip
from aft.clip.attention import fold_attention
from aft.clip.enlarge import enlarge, regrid
from aft.clip.files import HUB, SUFFIXES, fetched_from_hub, file_hash, load_strictly, read_file, recipe_in, weights_in
from aft.clip.fit import INPUT, Sizes, check_fit, sizes_of_config, sizes_of_state
from aft.clip.layouts import Layout, detect
from aft.clip.model import ModelRecord, ZeroShotModel, state_hash
from aft.clip.patches import embed_by_product
from aft.clip.text_transform import stored_transform
from aft.clip.towers import order_for_convolutions
from aft.clip.trainable import as_trained
from aft.clip.training_data import TRAINED_ON, UNSAID, DataUse, data_in, joined
from aft.errors import ConfigError, WeightsError

CHECKPOINT_KEY = "aft"
CHECKPOINT_SCHEMA = "aft.checkpoint/1"


@dataclass(frozen=True)
class ModelSpec:
    """Which CLIP to load.

    Args:
        name: ``miniclip32`` (embedded, 32 px), ``miniclip64`` (the same for 64 px), or any name of ``open_clip.list_models()``.
        pretrained: an open_clip tag (``openai``, ``laion2b_s34b_b79k`` ...), a weights file (.safetensors, .pt, .ckpt ...) in any
            published layout, a folder of the hub (open_clip's or transformers' layout, which knows its own architecture), or
            ``random``. None means the embedded weights, for an embedded model.
        activation: of a weights *file* of an open_clip name whose tags differ in it (OpenAI's weights need ``quick_gelu``);
            otherwise the name, the tag, the folder or the checkpoint says it, and another value here is an error.
        patch_dropout: share of patches dropped in training mode; 0.5 nearly halves the cost of pre-training.
        base: where the text side comes from when ``pretrained`` holds an image tower alone (as most published robust weights do):
            a tag, a file or a folder. None means the embedded weights, for an embedded model.
        image_size: side of the square that the tower sees, in pixels, where it is not the model's own: the position embedding is
            then interpolated, with a warning.
        mean, std: of the normalisation, per channel of pixels in [0, 1], where they are not the model's own (weights trained by
            PMG-AFT's code need those of ImageNet: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225).

    Raises:
        ConfigError: an image size, a mean or a standard deviation that cannot be one.
    """

    name: str = "miniclip32"
    pretrained: str | None = None
    patch_dropout: float = 0.0
    activation: Literal["gelu", "quick_gelu"] | None = None
    base: str | None = None
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image_size = {self.image_size}: give the side of the square in pixels, such as 224.")
        for name, values, least in (("mean", self.mean, 0.0), ("std", self.std, 1e-4)):
            if values is not None and (len(values) != 3 or not all(least <= value <= 1 for value in values)):
                raise ConfigError(
                    f"{name} = {tuple(values)}: give three numbers from {least:g} to 1, for red, green and blue pixels in [0, 1] "
                    "(divide by 255 what is meant for grey levels)."
                )


def named(model: str) -> ModelSpec:
    """The model that one word means: a path, a name of the hub, NAME/TAG, or NAME."""
    if model.startswith(HUB):
        return ModelSpec(pretrained=str(fetched_from_hub(model)))
    if Path(model).exists() or Path(model).suffix in SUFFIXES or model.count("/") > 1:  # a path, be it that nothing is there
        return ModelSpec(pretrained=model)
    name, _, tag = model.rpartition("/")
    return ModelSpec(name, tag) if name else ModelSpec(tag)


def load_model(spec: ModelSpec | str = ModelSpec()) -> ZeroShotModel:
    """Builds the model that ``spec`` names, in fp32 and eval mode, with a frozen text tower.

    A checkpoint of ours and a folder of the hub know their own architecture, so ``name`` is then taken from them.

    Raises:
        WeightsError: unknown name or tag, missing or damaged file, an unknown layout, or weights that do not fit (which sizes differ,
            or what is missing and what is unexpected, is listed).
    """
    spec = ModelSpec(spec) if isinstance(spec, str) else spec
    with torch.random.fork_rng(devices=[]):  # building draws initial values; callers' random streams stay where they are
        model = _adjusted(_load(spec), spec)
    for parameter in [*model.text_parameters, *model.text_transform.parameters(), model.clip.get_parameter("logit_scale")]:
        parameter.requires_grad_(False)
    fold_attention(model.visual)
    embed_by_product(model.visual)
    order_for_convolutions(model.visual)
    return model.float().eval()


def _load(spec: ModelSpec) -> ZeroShotModel:
    path = None if spec.pretrained == "random" else _weights_file(spec)
    contents = {} if path is None else read_file(path)
    layout = None if path is None or CHECKPOINT_KEY in contents else detect(contents, str(path))
    if layout is not None and path is not None and layout.scope == "visual":
        return _tower(path, layout, spec)
    if spec.base is not None:
        raise WeightsError(
            f"base = {spec.base!r} is for weights of an image tower alone; {spec.pretrained or spec.name} has a text side: leave base out."
        )
    if path is None:
        return _random(spec) if spec.pretrained == "random" else _from_tag(spec)
    if layout is None:
        return _from_checkpoint(path, contents, spec)
    if spec.name in ENLARGED and spec.pretrained is None:
        return _larger(_whole(path, layout, replace(spec, name=ENLARGED[spec.name][0], image_size=None)), spec.name)
    return _whole(path, layout, spec)


def _adjusted(model: ZeroShotModel, spec: ModelSpec) -> ZeroShotModel:
    """The model with the input size and the normalisation that ``spec`` asks for, all of it in its record."""
    record = model.record
    if spec.activation is not None and spec.activation != record.activation:
        raise WeightsError(
            f"activation = {spec.activation!r}, but {spec.pretrained or spec.name} says that it was trained with {record.activation}: "
            "leave activation out; it is for a weights file that does not say."
        )
    if spec.image_size is not None and spec.image_size != record.resolution:
        regrid(model.clip, spec.image_size)
        record = replace(record, resolution=spec.image_size, config=_with_size(record.config, spec.image_size))
    record = replace(record, mean=spec.mean or record.mean, std=spec.std or record.std)
    return ZeroShotModel(model.clip, model.tokenizer, record, model.text_transform)


def _random(spec: ModelSpec) -> ZeroShotModel:
    architecture = describe(spec.name, None)
    clip = build_clip(architecture.config, spec.patch_dropout)
    return ZeroShotModel(
        clip, tokenizer_of(spec.name, architecture.config), _record(spec.name, "random", state_hash(clip), architecture, clip)
    )


def _from_tag(spec: ModelSpec) -> ZeroShotModel:
    if spec.name in {**EMBEDDED, **ENLARGED}:
        raise WeightsError(
            f"{spec.name} has no tags, and there is no file {spec.pretrained!r}: give a weights file or a folder, 'random', or for the "
            "embedded weights null"
        )
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


def _whole(path: Path, layout: Layout, spec: ModelSpec) -> ZeroShotModel:
    """Both towers from one file."""
    name, architecture = _described(spec)
    return _filled(path, layout, name, architecture, spec, {})


def _tower(path: Path, layout: Layout, spec: ModelSpec) -> ZeroShotModel:
    """An image tower over a base; one of an embedded model is enlarged where the larger model is asked for."""
    source, _ = ENLARGED.get(spec.name, (None, 1))
    if source is None or sizes_of_state(layout.state).get(INPUT) != sizes_of_config(describe(source, None).config)[INPUT]:
        return _over_base(path, layout, spec)
    return _larger(_over_base(path, layout, replace(spec, name=source, image_size=None)), spec.name)


def _over_base(path: Path, layout: Layout, spec: ModelSpec) -> ZeroShotModel:
    """The image tower of a file; text tower, logit scale and preprocessing of the base."""
    if spec.base is None and spec.name not in {**EMBEDDED, **ENLARGED}:
        describe(spec.name, None)
        raise WeightsError(
            f"{path} holds an image tower alone: set base to where the text side of {spec.name} comes from, the weights that the "
            "fine-tuning started from: a tag such as openai, a file, or a folder."
        )
    base = _load(ModelSpec(spec.name, spec.base, activation=spec.activation))
    text = {key: value for key, value in base.clip.state_dict().items() if not key.startswith("visual.")}
    architecture = Architecture(base.record.config, base.record.mean, base.record.std)
    model = _filled(path, layout, base.record.name, architecture, spec, text, base.record.data)
    return ZeroShotModel(model.clip, base.tokenizer, replace(model.record, base_sha256=base.record.sha256))


def _filled(
    path: Path,
    layout: Layout,
    name: str,
    architecture: Architecture,
    spec: ModelSpec,
    text: Mapping[str, Tensor],
    before: tuple[DataUse, ...] = (),
) -> ZeroShotModel:
    """A model of this architecture with the layout's tensors over those of ``text``, and nothing missing.

    ``before`` is what the weights that it was fine-tuned from were trained on.
    """
    given = sizes_of_state(layout.state)
    architecture = replace(architecture, config=_at_files_size(architecture.config, given, spec))
    check_fit(given, architecture.config, name, str(path))
    clip = build_clip(architecture.config, spec.patch_dropout)
    load_strictly(clip, {**text, **own_names(clip, layout.state)}, str(path))
    record = _record(name, layout.name, file_hash(path), architecture, clip)
    recipe = recipe_in(path)
    record = replace(record, data=record.data or data_in(recipe, before))
    if recipe.get("method", "none") != "none":
        eps = recipe.get("eps_trained", "None")
        record = replace(record, method=recipe["method"], eps_trained=None if eps == "None" else float(eps))
    return ZeroShotModel(clip, tokenizer_of(name, architecture.config), record)


def _at_files_size(config: dict[str, Any], given: Sizes, spec: ModelSpec) -> dict[str, Any]:
    """The configuration with the file's own input size, where another one is asked for anyway: it is interpolated from there."""
    size = given.get(INPUT)
    if spec.image_size is None or given.get("image tower") != "ViT" or not isinstance(size, int):
        return config
    return config if sizes_of_config(config).get(INPUT) == size else _with_size(config, size)


def _with_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    return {**config, "vision_cfg": {**config["vision_cfg"], "image_size": size}}


def own_names(clip: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of ``open_clip.CLIP`` to those of this model: a CustomTextCLIP keeps its text tower under ``text.``."""
    if not isinstance(clip, open_clip.CustomTextCLIP):
        return dict(state)
    return {key if key.startswith(("visual.", "logit_")) else f"text.{key}": value for key, value in state.items()}


def _larger(small: ZeroShotModel, name: str) -> ZeroShotModel:
    """An embedded model for larger images, from the one that it enlarges."""
    config = describe(name, None).config
    record = replace(small.record, name=name, config=config, resolution=config["vision_cfg"]["image_size"])
    return ZeroShotModel(enlarge(small.clip, ENLARGED[name][1]), small.tokenizer, record)


def _from_checkpoint(path: Path, contents: Mapping[str, Any], spec: ModelSpec) -> ZeroShotModel:
    header = contents[CHECKPOINT_KEY]
    if header.get("schema") != CHECKPOINT_SCHEMA:
        raise WeightsError(
            f"{path}: checkpoint schema {header.get('schema')!r} is not {CHECKPOINT_SCHEMA!r}: read it with the version that wrote it."
        )
    stored = header["model"]
    lists = {key: tuple(stored.get(key, ())) for key in ("mean", "std", "data")}
    record = ModelRecord(**{**stored, **lists})
    clip = build_clip(record.config, spec.patch_dropout)
    with as_trained(clip.get_submodule("visual"), record):
        load_strictly(clip, _below("model.clip.", contents["state_dict"]), str(path))
    scale = float(clip.get_parameter("logit_scale").detach().exp())
    record = replace(record, layout="aft", sha256=file_hash(path), logit_scale=scale)
    transform = stored_transform(record.text_transform, _below("model.text_transform.", contents["state_dict"]))
    return ZeroShotModel(clip, tokenizer_of(record.name, record.config), record, transform)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def checkpoint_header(
    model: ZeroShotModel, method: str, eps_trained: float | None, trainable: Mapping[str, Any] | None = None, data: DataUse = UNSAID
) -> dict[str, Any]:
    """What a checkpoint of ours carries beside its tensors: plain types, so that it loads with ``weights_only=True``.

    ``data`` is what this training runs on; it comes after that of the weights that it started from.
    """
    record = model.record
    before = () if record.layout == "random" else record.data or (UNSAID,)
    base = None if record.layout == "random" else record.sha256
    learned = None if trainable is None else dict(trainable)
    changed = replace(
        record,
        method=method,
        eps_trained=eps_trained,
        base_sha256=base,
        trainable=learned,
        text_transform=model.text_transform.name,
        data=joined(before, (data,)),
    )
    return {"schema": CHECKPOINT_SCHEMA, "model": asdict(changed)}


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
        data=TRAINED_ON.get(sha256, ()),
    )


def _described(spec: ModelSpec) -> tuple[str, Architecture]:
    """Name and architecture for a file with both towers: a folder of the hub says its own, else the name decides.

    With a folder, an open_clip name stays (it brings the tokenizer, and its sizes must be the folder's); else the folder's name is taken.
    """
    folder = Path(spec.pretrained) if spec.pretrained is not None and Path(spec.pretrained).is_dir() else None
    architecture = None if folder is None else describe_hub(folder)
    if spec.pretrained is None:
        return spec.name, describe(spec.name, None)
    if folder is None or architecture is None:
        return spec.name, describe_file(spec.name, spec.activation)
    named = describe(spec.name, None)
    if spec.name in {**EMBEDDED, **ENLARGED}:
        return folder.resolve().name, architecture
    sizes = sizes_of_config(architecture.config)
    if spec.image_size is not None:
        sizes.pop(INPUT, None)
    check_fit(sizes, named.config, spec.name, str(folder))
    return spec.name, architecture


def _weights_file(spec: ModelSpec) -> Path | None:
    """The file that ``spec`` means; none where it means a tag."""
    if spec.pretrained is None:
        source = ENLARGED[spec.name][0] if spec.name in ENLARGED else spec.name
        if source not in EMBEDDED:
            describe(spec.name, None)
            raise WeightsError(f"model {spec.name!r} needs weights: set pretrained to an open_clip tag, a file, a folder, or 'random'.")
        return weights_in(EMBEDDED[source])
    path = Path(spec.pretrained)
    if path.is_dir() and ("/" in spec.pretrained or _hides_no_tag(path, spec)):
        return weights_in(path)
    if not path.is_file():
        if path.suffix in SUFFIXES or "/" in spec.pretrained:
            raise WeightsError(f"no weights file at {path}: check the path, or give a folder, an open_clip tag or 'random'.")
        return None
    return path


def _hides_no_tag(folder: Path, spec: ModelSpec) -> bool:
    """Whether a folder of this name is meant: it holds a model, and no tag is called so."""
    return is_hub(folder) and spec.pretrained not in open_clip.list_pretrained_tags_by_model(spec.name)
