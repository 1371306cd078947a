"""What each format has a place for: who does not fit is refused with the reason, before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer

from aft.clip.model import ZeroShotModel
from aft.clip.pack import refuse_extras
from aft.clip.towers import tower_name
from aft.errors import ConfigError

VOCABULARY = 49408  # of OpenAI's BPE
#: Settings that mean nothing once a model is trained.
OF_TRAINING = frozenset({"patch_dropout", "timm_model_pretrained", "output_tokens"})
#: What ``clip.load`` reads off the tensors' shapes; all else is what it is in OpenAI's models.
OPENAI_VISION = frozenset({"layers", "width", "patch_size", "image_size"}) | OF_TRAINING
OPENAI_TEXT = frozenset({"layers", "width", "heads", "context_length", "vocab_size"}) | OF_TRAINING
#: What transformers' CLIPConfig has a name for.
TRANSFORMERS_VISION = OPENAI_VISION | {"head_width", "mlp_ratio", "norm_kwargs"}
TRANSFORMERS_TEXT = OPENAI_TEXT | {"mlp_ratio", "norm_kwargs"}
OPENAI_HEAD = 64


def refuse_defended(model: ZeroShotModel, layout: str) -> None:
    """Raises ConfigError for a model with stages: weights alone do not hold what a defence does."""
    if model.stages.declared:
        raise ConfigError(f"{model.record.name} has a test-time defence ({', '.join(model.stages.declared)} stage): {layout} holds weights "
                          "alone; leave the defence out (.undefended), or take a graph (--format onnx or torch_export).")  # fmt: skip


def check_openai(model: ZeroShotModel) -> None:
    """Raises ConfigError where ``clip.load`` would build another model, without saying so, or none."""
    layout = "OpenAI's layout"
    refuse_defended(model, layout)
    refuse_extras(model, layout)
    record = model.record
    if record.activation != "quick_gelu":
        raise ConfigError(f"{record.name} runs on {record.activation}: clip.load always builds QuickGELU, which would shift accuracy "
                          "without an error; use --format open_clip.")  # fmt: skip
    for what, own, theirs in (("mean", record.mean, open_clip.OPENAI_DATASET_MEAN), ("std", record.std, open_clip.OPENAI_DATASET_STD)):
        if tuple(own) != tuple(theirs):
            raise ConfigError(f"{record.name} has {what} = {own}: clip.load's preprocessing has {theirs} and no place for others; use "
                              "--format open_clip.")  # fmt: skip
    if not isinstance(model.visual, VisionTransformer | ModifiedResNet):
        raise ConfigError(f"the image tower is a {tower_name(model.visual)}: {layout} holds OpenAI's ViT and ResNet alone; use --format "
                          "open_clip.")  # fmt: skip
    _refuse_settings(record.config, OPENAI_VISION, OPENAI_TEXT, layout)
    _refuse_heads(record.config, layout)


def check_transformers(model: ZeroShotModel) -> None:
    """Raises ConfigError where transformers' ``CLIPModel`` has no setting for what this model does."""
    layout = "transformers' CLIPModel"
    refuse_defended(model, layout)
    refuse_extras(model, layout)
    _refuse_for_transformers(model, layout, TRANSFORMERS_TEXT)


def check_vision_tower(model: ZeroShotModel) -> None:
    """The same of ``CLIPVisionModel``, which has no texts to transform."""
    layout = "transformers' CLIPVisionModel"
    refuse_defended(model, layout)
    if model.record.prompts is not None:
        refuse_extras(model, layout)
    _refuse_for_transformers(model, layout, None)


def check_open_clip(model: ZeroShotModel) -> None:
    """Raises ConfigError for what is more than open_clip's two towers."""
    refuse_defended(model, "open_clip's layout")
    refuse_extras(model, "open_clip's layout")


def check_graph(model: ZeroShotModel, classes: Collection[str]) -> None:
    """Raises ConfigError for a stage that no graph can hold, and for transformed texts without the classes to bake them into."""
    if not model.text_transform.idle and not classes:
        raise ConfigError(f"{model.record.name} has text_transform {model.text_transform.name}, which acts on class texts and is not "
                          "linear: give --classes, and the transformed texts are baked into the graph's logits.")  # fmt: skip
    for name, stage in model.stages.declared.items():
        if stage.random:
            raise ConfigError(f"the {name} stage is random: a graph has no counted noise, and with other noise the figures would not hold.")
        if stage.batch_coupled:
            raise ConfigError(f"in the {name} stage an image's result depends on its neighbours: a graph would answer by its batch.")
    if model.backwards_per_image and model.defense is not None:
        raise ConfigError(f"{model.defense['name']} takes gradients of the image tower in its forward: a graph has none; export the "
                          "undefended model.")  # fmt: skip


def _refuse_for_transformers(model: ZeroShotModel, layout: str, text: Collection[str] | None) -> None:
    if not isinstance(model.visual, VisionTransformer):
        raise ConfigError(f"the image tower is a {tower_name(model.visual)}: {layout} holds a ViT with a class token alone; use --format "
                          "open_clip.")  # fmt: skip
    _refuse_settings(model.record.config, TRANSFORMERS_VISION, text, layout)


def _refuse_settings(config: Mapping[str, Any], vision: Collection[str], text: Collection[str] | None, layout: str) -> None:
    """Every setting that is not at open_clip's default must be one that the layout has a place for."""
    parts = [("vision_cfg", open_clip.CLIPVisionCfg, vision)]
    if text is not None:
        parts.append(("text_cfg", open_clip.CLIPTextCfg, text))
    for part, kind, held in parts:
        usual = {field.name: field.default for field in fields(kind)}
        for name, value in config[part].items():
            if name not in held and value != usual.get(name):
                raise ConfigError(f"{part}.{name} = {value!r} (usually {usual.get(name)!r}): {layout} has no place for it; use --format "
                                  "open_clip.")  # fmt: skip
        if set(config[part].get("norm_kwargs") or {}) - {"eps"}:
            raise ConfigError(f"{part}.norm_kwargs = {config[part]['norm_kwargs']}: {layout} has eps alone; use --format open_clip.")
    if text is not None and config["text_cfg"].get("vocab_size", VOCABULARY) != VOCABULARY:
        raise ConfigError(f"a vocabulary of {config['text_cfg']['vocab_size']}: {layout} comes with OpenAI's BPE of {VOCABULARY}; use "
                          "--format open_clip.")  # fmt: skip


def _refuse_heads(config: Mapping[str, Any], layout: str) -> None:
    text = {"width": 512, "heads": 8, **config["text_cfg"]}
    if text["heads"] != text["width"] // OPENAI_HEAD:
        raise ConfigError(f"the text tower has {text['heads']} heads for a width of {text['width']}: {layout} always has one head for "
                          f"{OPENAI_HEAD} ({text['width'] // OPENAI_HEAD}); use --format open_clip.")  # fmt: skip
