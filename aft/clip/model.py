"""ZeroShotModel: pixels in [0, 1] -> Encoding -> logits over a text bank.

Shapes: B images, C channels, H height, W width, N patches, D embedding width, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aft.clip.prompts import fill_templates, text_hash
from aft.clip.stages import Stages
from aft.clip.text_transform import TextTransform
from aft.clip.towers import encode_with_tokens
from aft.clip.training_data import DataUse
from aft.errors import ConfigError, InputError

TEXTS_AT_ONCE = 512
BANKS_KEPT = 16


@dataclass(frozen=True)
class ModelRecord:
    """All that decides how pixels become logits; it is saved with every checkpoint and printed on every card.

    Args:
        name: what the user asked for, such as ``miniclip32`` or ``ViT-B-32``.
        layout: where the weights came from: ``open_clip``, ``aft`` (a checkpoint of ours), ``random``.
        sha256: of the weights file; of the tensors where there is no file.
        base_sha256: of the weights that a fine-tuning started from; none for a base model.
        config: open_clip's model configuration (``vision_cfg``, ``text_cfg`` ...), enough to build the architecture.
        resolution: side of the square that the tower sees, in pixels.
        mean, std: per-channel normalisation of pixels in [0, 1].
        activation: ``gelu`` or ``quick_gelu``.
        logit_scale: the factor on cosines, ``exp`` of the trained parameter.
        method: the recipe that trained it, ``none`` before any adversarial fine-tuning.
        eps_trained: radius that it was trained with, in pixel units; none for an undefended model.
        text_transform: what happens to class texts: ``identity``, ``expansion`` or ``residual`` (:mod:`aft.clip.text_transform`).
        trainable: what the fine-tuning trained (:class:`aft.clip.trainable.TrainableSpec`'s settings); none for a base model.
        prompts: settings of the visual prompts that are part of the tower; none for a plain one.
        data: what it was trained on, as far as it is known (:mod:`aft.clip.training_data`); empty where nothing is.
    """

    name: str
    layout: str
    sha256: str
    config: dict[str, object]
    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    activation: str
    logit_scale: float
    base_sha256: str | None = None
    method: str = "none"
    eps_trained: float | None = None
    text_transform: str = "identity"
    trainable: dict[str, object] | None = None
    prompts: dict[str, object] | None = None
    data: tuple[DataUse, ...] = ()


@dataclass(frozen=True)
class Encoding:
    """What an image tower says of a batch.

    Args:
        embedding_BD: the projected embedding, *not* normalised (FARE compares these).
        tokens_BND: patch tokens in the joint space, not normalised; none unless asked for.
    """

    embedding_BD: Tensor
    tokens_BND: Tensor | None = None

    @cached_property
    def unit_BD(self) -> Tensor:
        """The embedding as fp32 (or wider) unit vectors."""
        return F.normalize(at_least_fp32(self.embedding_BD), dim=-1)

    @property
    def precise(self) -> Encoding:
        """The same in fp32 or wider, whatever the tower ran in."""
        tokens = self.tokens_BND
        return Encoding(at_least_fp32(self.embedding_BD), None if tokens is None else at_least_fp32(tokens))


def at_least_fp32(value: Tensor) -> Tensor:
    """fp64 as it is, all other types as fp32."""
    return value if value.dtype == torch.float64 else value.float()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Leaves a caller's autocast."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def state_hash(module: nn.Module) -> str:
    """sha256 over names and values of a module's state, in the order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ZeroShotModel(nn.Module):
    """A CLIP that takes pixels in [0, 1]; resize and normalisation are part of its graph.

    ``logits = logit_scale * unit(image) @ unit(text).T``, in fp32 also under autocast.

    Args:
        clip: an open_clip model (``encode_text``, ``visual``, ``logit_scale``).
        tokenizer: texts -> ``int64 [n, context]``.
        record: resolution, normalisation, activation and where the weights came from.
        text_transform: what class texts go through after the text tower; none means nothing.
    """

    def __init__(
        self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor], record: ModelRecord, text_transform: TextTransform | None = None
    ) -> None:
        super().__init__()
        self.clip = clip
        self.text_transform = text_transform or TextTransform()
        self.tokenizer = tokenizer
        self.record = record
        self._banks: dict[str, Tensor] = {}
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(record.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(record.std).view(shape), persistent=False)

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        tower = self.clip.visual
        assert isinstance(tower, nn.Module)
        return tower

    @property
    def stages(self) -> Stages:
        """What a defence does before and after the image tower: nothing in a plain model."""
        return Stages()

    @property
    def undefended(self) -> ZeroShotModel:
        """The model between the stages: itself."""
        return self

    @property
    def defense(self) -> dict[str, Any] | None:
        """What defends it at test time, as ``{"name", "settings"}`` for cards: nothing."""
        return None

    @property
    def forwards_per_image(self) -> int:
        """Image-tower forwards that one look at an image takes."""
        return 1

    @property
    def backwards_per_image(self) -> int:
        """Gradients of an image-tower pass by its input that one look takes."""
        return 0

    @property
    def width(self) -> int:
        """D, the width of the joint space."""
        width = self.record.config["embed_dim"]
        assert isinstance(width, int)
        return width

    @property
    def text_parameters(self) -> list[nn.Parameter]:
        """Every parameter that is not the image tower's, the logit scale aside."""
        return [p for name, p in self.clip.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]

    @property
    def logit_scale(self) -> Tensor:
        """The factor on cosines (``exp`` of the parameter), fp32, with gradient where it is trained."""
        return self.clip.get_parameter("logit_scale").exp()

    def resize(self, images_BCHW: Tensor) -> Tensor:
        """To the size that the tower sees, bicubic and antialiased, only where the size differs; it may overshoot [0, 1] a little."""
        side = self.record.resolution
        if images_BCHW.shape[-2:] == (side, side):
            return images_BCHW
        return F.interpolate(images_BCHW, size=(side, side), mode="bicubic", antialias=True, align_corners=False)

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        """Resize and normalise: ``[B, 3, R, R]``."""
        images_BCHW = self.resize(images_BCHW)
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images_BCHW - mean.to(images_BCHW.dtype)) / std.to(images_BCHW.dtype)

    def encode(self, images_BCHW: Tensor, tokens: bool = False) -> Encoding:
        """Embeds images in [0, 1] of any size; patch tokens come from the same pass when asked for.

        Raises:
            ConfigError: tokens are asked of a tower that has none.
            InputError: the tower returns anything but one vector an image.
        """
        if tokens:
            return Encoding(*encode_with_tokens(self.visual, self.pixels(images_BCHW)))
        embedding_BD = self.visual(self.pixels(images_BCHW))
        if not isinstance(embedding_BD, Tensor) or embedding_BD.ndim != 2 or embedding_BD.shape[0] != images_BCHW.shape[0]:
            got = tuple(embedding_BD.shape) if isinstance(embedding_BD, Tensor) else type(embedding_BD).__name__
            raise InputError(f"the image tower of {self.record.name} returns {got} for {len(images_BCHW)} images: it must give one vector "
                             "an image, [n, D]; let it pool its tokens.")  # fmt: skip
        return Encoding(embedding_BD)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of texts, ``[n, D]``; with gradient where the text tower is trained."""
        device = self.clip.get_parameter("logit_scale").device
        chunks = [list(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
        embedded = [self.clip.encode_text(self.tokenizer(chunk).to(device)) for chunk in chunks]  # type: ignore[operator]
        return F.normalize(torch.cat(embedded).float() if embedded[0].dtype != torch.float64 else torch.cat(embedded), dim=-1)

    def text_bank(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One unit vector a class, as the model classifies with it: ``text_transform(raw_bank)``, ``[K, D]``, detached."""
        raw_KD = self.raw_bank(names, templates)
        with torch.inference_mode(False), torch.no_grad():
            transformed: Tensor = self.text_transform(raw_KD)
            return transformed

    def raw_bank(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Before any text transformation: the normalised mean over templates of unit prompt embeddings, ``[K, D]``, detached.

        Kept while the text tower is frozen, by a hash of names and templates and the state of its weights: the tower runs once a list.
        """
        if any(parameter.requires_grad for parameter in self.text_parameters):
            return self._make_bank(names, templates)
        key = text_hash(names, templates) + self._text_state()
        if key not in self._banks:
            self._banks = {key: self._make_bank(names, templates), **dict(list(self._banks.items())[: BANKS_KEPT - 1])}
        return self._banks[key]

    def _make_bank(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        prompts = [text for of_class in fill_templates(names, templates) for text in of_class]
        device = self.clip.get_parameter("logit_scale").device
        with torch.inference_mode(False), torch.no_grad(), full_precision(device):  # an attack saves the bank for backward
            unit_nD = self.encode_text(prompts)
            return F.normalize(unit_nD.view(len(names), len(templates), -1).mean(1), dim=-1)

    def _text_state(self) -> str:
        """Changes whenever a text parameter is written to, moved or replaced; cheaper than a hash of its values."""
        return "/".join(f"{p.data_ptr()}.{0 if p.is_inference() else p._version}" for p in self.text_parameters)

    def logits(self, encoding: Encoding, text_KD: Tensor, logit_scale: Tensor | float | None = None) -> Tensor:
        """``logit_scale * unit(image) @ text.T``: ``[B, K]``, fp32 (or wider) also under autocast.

        Raises:
            ConfigError: the text bank has another width than the image embedding.
        """
        unit_BD = encoding.unit_BD
        if text_KD.shape[-1] != unit_BD.shape[-1]:
            raise ConfigError(
                f"text bank of width {text_KD.shape[-1]} against image embeddings of width {unit_BD.shape[-1]}: "
                "the bank was made by another model; make it with this model's text_bank."
            )
        scale = self.logit_scale if logit_scale is None else logit_scale
        with full_precision(unit_BD.device):
            return scale * unit_BD @ text_KD.to(unit_BD.dtype).T

    def forward(self, images_BCHW: Tensor, text_KD: Tensor) -> Tensor:
        """Logits of images in [0, 1] over a text bank, ``[B, K]``."""
        return self.logits(self.encode(images_BCHW), text_KD)
