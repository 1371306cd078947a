"""Image towers: where their blocks and patch tokens are, and BatchNorm statistics that stay as they are.

Known towers: open_clip's VisionTransformer and ModifiedResNet, and timm's transformers and staged networks (ConvNeXt ...) inside
open_clip's TimmModel. Shapes: B images, N patches, W tower width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aft.errors import ConfigError


@dataclass(frozen=True)
class TowerParts:
    """A tower's parameters by name, in the order of the forward pass; each is in exactly one part.

    Args:
        stem: patch embedding or first convolutions, class and position embeddings, a norm before the blocks.
        blocks: one list a transformer block, or a stage of a ResNet or ConvNeXt.
        head: final norm, pooling and projection.
    """

    stem: list[str]
    blocks: list[list[str]]
    head: list[str]


def tower_parts(visual: nn.Module) -> TowerParts:
    """Stem, blocks and head of an image tower.

    Raises:
        ConfigError: a tower whose blocks are not known.
    """
    blocks_at, heads = _layout(visual)
    names = [name for name, _ in visual.named_parameters() if not name.startswith("prompts.")]
    blocks = [_within(names, [place]) for place in blocks_at]
    inside = {name for block in blocks for name in block}
    head = [name for name in _within(names, heads) if name not in inside]
    return TowerParts([name for name in names if name not in inside and name not in head], blocks, head)


def _layout(visual: nn.Module) -> tuple[list[str], list[str]]:
    """Where the blocks are, and what comes after them: final norm, pooling and projection."""
    if isinstance(visual, VisionTransformer):
        blocks = [f"transformer.resblocks.{i}" for i in range(len(visual.transformer.resblocks))]
        return blocks, ["ln_post", "proj", "attn_pool", "attn_pool_contrastive"]
    if isinstance(visual, ModifiedResNet):
        return ["layer1", "layer2", "layer3", "layer4"], ["attnpool"]
    for name in ("blocks", "stages"):
        inside = getattr(visual.trunk, name, None) if isinstance(visual, TimmModel) else None
        if isinstance(inside, nn.Sequential | nn.ModuleList):
            after = [f"trunk.{part}" for part in ("norm", "fc_norm", "attn_pool", "head", "head_norm")]
            return [f"trunk.{name}.{i}" for i in range(len(inside))], [*after, "head"]
    raise ConfigError(f"image tower {tower_name(visual)} has no blocks that are known here: set trainable.name to all, or to prompts.")


def _within(names: list[str], places: list[str]) -> list[str]:
    return [name for name in names if any(name == place or name.startswith(f"{place}.") for place in places)]


def tower_name(visual: nn.Module) -> str:
    """What errors call a tower: its class, and timm's class inside it."""
    return f"{type(visual.trunk).__name__} of timm" if isinstance(visual, TimmModel) else type(visual).__name__


def keep_statistics(module: nn.Module) -> None:
    """Puts every BatchNorm into eval mode: it normalises with its running statistics and does not write them.

    A fine-tuning step has k + 1 or more forwards of other images than the pre-training's; the statistics are the pre-trained
    model's, in the attack as in the training forward, and ``num_batches_tracked`` does not move. Scale and shift do learn.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


def order_for_convolutions(visual: nn.Module) -> None:
    """Keeps the weights of a ResNet of CLIP with their channels last in memory, as convolutions read them fastest; in place.

    Values, names and safetensors files are as before; results differ by the order of sums. A ViT has one convolution without overlap and a
    ConvNeXt turns its channels itself: neither has anything to gain.
    """
    if isinstance(visual, ModifiedResNet):
        visual.to(memory_format=torch.channels_last)


def has_tokens(visual: nn.Module) -> bool:
    """Whether this image tower has patch tokens in the joint space."""
    if isinstance(visual, VisionTransformer):
        return visual.attn_pool is None and visual.pool_type == "tok"
    if isinstance(visual, TimmModel):
        return isinstance(visual.trunk, TimmViT | Eva) and getattr(visual.trunk.attn_pool, "pos_embed", None) is None
    return isinstance(visual, ModifiedResNet)


def check_tokens(visual: nn.Module, asked_by: str = "") -> None:
    """Raises ConfigError for an image tower without patch tokens in the joint space; ``asked_by`` begins the message."""
    if not has_tokens(visual):
        raise ConfigError(
            f"{asked_by}image tower {tower_name(visual)} has no patch tokens in the joint space: choose a ViT with a class token or a "
            "ResNet of CLIP, or a method whose terms do not need tokens."
        )


def encode_with_tokens(visual: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Embedding and patch tokens from one pass.

    The rule for every tower: a token is what the tower's head would say if it saw that patch alone.

    - open_clip's ViT: the last layer's patch outputs, sent through the same final norm and projection as the class token, as TGA-ZSR
      does (arXiv 2410.21802).
    - timm's transformers: through the final norm, the head and the projection; an attention pool (SigLIP) sees one token at a time,
      which leaves its value and output projections (and its MLP).
    - ResNet: our extension, no published method defines it. Each place of the last feature map, with its position embedding, through
      the attention pool's value and output projections: ``c_proj(v_proj(u_j + p_j))``. The embedding is, head by head, a mean of
      these values and that of the mean place, weighted by the attention.

    Args:
        visual: an image tower.
        pixels_BCHW: normalised pixels at the tower's resolution.

    Returns:
        ``embedding [B, D]`` and ``tokens [B, N, D]``, both not normalised to unit length. Visual prompts are no patches and left out.

    Raises:
        ConfigError: the tower has no patch tokens in the joint space.
    """
    check_tokens(visual)
    if isinstance(visual, ModifiedResNet):
        return _resnet_tokens(visual, pixels_BCHW)
    if isinstance(visual, TimmModel):
        return _timm_tokens(visual, pixels_BCHW)
    assert isinstance(visual, VisionTransformer)
    before = visual.output_tokens
    visual.output_tokens = True
    try:
        embedding_BD, tokens_BNW = visual(pixels_BCHW)
    finally:
        visual.output_tokens = before
    tokens_BNW = tokens_BNW[:, : tokens_BNW.shape[1] - prompt_tokens(visual)]
    return embedding_BD, tokens_BNW if visual.proj is None else tokens_BNW @ visual.proj


def prompt_tokens(visual: nn.Module) -> int:
    """How many learned tokens a tower appends after its patches (``aft.clip.visual_prompts``)."""
    return int(getattr(getattr(visual, "prompts", None), "length", 0))


def _resnet_tokens(visual: ModifiedResNet, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    with _output_of(visual.layer4) as seen:
        embedding_BD = visual(pixels_BCHW)
    pool = visual.attnpool
    map_BNW = seen[0].flatten(2).transpose(1, 2) + pool.positional_embedding[1:].to(seen[0].dtype)
    return embedding_BD, pool.c_proj(pool.v_proj(map_BNW))


def _timm_tokens(visual: TimmModel, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    trunk = visual.trunk
    with _output_of(trunk.norm) as seen:
        embedding_BD = visual(pixels_BCHW)
    tokens_BNW = seen[0][:, trunk.num_prefix_tokens :]
    if trunk.attn_pool is not None:
        tokens_BNW = trunk.attn_pool(tokens_BNW.flatten(0, 1).unsqueeze(1)).view(*tokens_BNW.shape[:2], -1)
    return embedding_BD, visual.head(trunk.head(trunk.fc_norm(tokens_BNW)))


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module gives while the context is open."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        """The hook."""
        seen.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def frozen_to_eval(visual: nn.Module) -> None:
    """Eval mode for every part of a tower that has parameters and learns none of them: its dropout is off, too."""
    for part in visual.modules():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()
