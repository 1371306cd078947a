"""Visual prompts: learned additions to the input of a frozen image tower (TeCoA-VP, arXiv 2212.07016).

Shapes: B images, R side of the tower's input, E pixels of the border, N tokens, L prompt tokens, W tower width.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from aft.clip.towers import has_tokens, tower_name
from aft.errors import ConfigError


class VisualPrompts(nn.Module):
    """A learned border and learned tokens of one image tower, as its submodule ``prompts``.

    - The border is added to the *normalised* pixels, after the resize, and is not clamped. One tensor ``[3, E]`` holds what the released
      code keeps in four, each entry from N(0, 1).
    - The tokens, N(0, 1) and of the tower's own width, come after the patch tokens at the transformer's input, before its ``ln_pre``.
      The released code adds a position embedding to them that starts at zero and is never trained: nothing is added here.
    - ``deep``: every later block gets tokens of its own in place of what the block before made of its prompts (VPT-deep, arXiv 2203.12119).

    Args:
        visual: the tower.
        resolution: side of its input in pixels.
        pad: width of the border in pixels, 0 for none; up to half of the side, where it covers the whole image.
        tokens: prompt tokens, 0 for none; for open_clip's ViT with a class token.
        deep: whether each block has its own.
        seed: of the initial values; no global random stream is used.

    Raises:
        ConfigError: nothing to learn, a border wider than the image, or tokens for a tower that has no place for them.
    """

    def __init__(self, visual: nn.Module, resolution: int, *, pad: int, tokens: int, deep: bool = False, seed: int = 0) -> None:
        super().__init__()
        _check(visual, resolution, pad, tokens)
        self.settings: dict[str, Any] = {"pad": pad, "tokens": tokens, "deep": deep}
        self.length = tokens
        noise = torch.Generator().manual_seed(seed)
        inside = torch.zeros(resolution, resolution, dtype=torch.bool)
        inside[pad : resolution - pad, pad : resolution - pad] = True
        self.register_buffer("border_RR", ~inside, persistent=False)
        if pad:
            self.pad_3E = nn.Parameter(torch.randn(3, int((~inside).sum()), generator=noise))
        if tokens:
            assert isinstance(visual, VisionTransformer)
            depth = len(visual.transformer.resblocks) if deep else 1
            self.tokens_LW = nn.ParameterList(torch.randn(tokens, visual.conv1.out_channels, generator=noise) for _ in range(depth))

    def frame(self) -> Tensor:
        """The border as an image: ``[3, R, R]``, zero inside."""
        border_RR = self.get_buffer("border_RR")
        return torch.zeros(3, *border_RR.shape, dtype=self.pad_3E.dtype, device=self.pad_3E.device).masked_scatter(border_RR, self.pad_3E)

    def add_frame(self, visual: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Before the tower: normalised pixels plus the border."""
        return (inputs[0] + self.frame().to(inputs[0].dtype),)

    def append(self, ln_pre: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Before ``ln_pre``: the tokens, after the class token and the patches."""
        return (torch.cat([inputs[0], self._expanded(0, inputs[0])], dim=1),)

    def _expanded(self, block: int, x_BNW: Tensor) -> Tensor:
        tokens_LW: Tensor = self.tokens_LW[block]
        return tokens_LW.to(x_BNW.dtype).expand(x_BNW.shape[0], -1, -1)


class _Replace:
    """Before a block: its own prompts in the places of the last block's."""

    def __init__(self, prompts: VisualPrompts, block: int) -> None:
        self.prompts, self.block = prompts, block

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept_BNW = inputs[0][:, : inputs[0].shape[1] - self.prompts.length]
        return (torch.cat([kept_BNW, self.prompts._expanded(self.block, inputs[0])], dim=1), *inputs[1:])


def _check(visual: nn.Module, resolution: int, pad: int, tokens: int) -> None:
    if pad < 0 or tokens < 0 or pad + tokens == 0:
        raise ConfigError(f"trainable.pad = {pad}, trainable.tokens = {tokens}: neither may be negative, and one must be above 0.")
    if 2 * pad > resolution:
        raise ConfigError(f"trainable.pad = {pad} is more than half of the tower's {resolution} pixels: use at most {resolution // 2}.")
    if tokens and not (isinstance(visual, VisionTransformer) and has_tokens(visual) and visual.transformer.batch_first):
        raise ConfigError(
            f"trainable.tokens = {tokens}: image tower {tower_name(visual)} has no place for prompt tokens (open_clip's ViT with a class "
            "token has): set trainable.tokens to 0 and use trainable.pad alone."
        )


def attach_prompts(visual: nn.Module, resolution: int, *, pad: int, tokens: int, deep: bool = False, seed: int = 0) -> VisualPrompts:
    """Makes visual prompts a part of a tower: its submodule ``prompts``, called by hooks, so also where the bare tower is called.

    Raises:
        ConfigError: see :class:`VisualPrompts`.
    """
    prompts = VisualPrompts(visual, resolution, pad=pad, tokens=tokens, deep=deep, seed=seed)
    visual.add_module("prompts", prompts)
    if pad:
        visual.register_forward_pre_hook(prompts.add_frame)
    if tokens:
        assert isinstance(visual, VisionTransformer)
        visual.ln_pre.register_forward_pre_hook(prompts.append)
        for place in range(1, len(prompts.tokens_LW)):
            visual.transformer.resblocks[place].register_forward_pre_hook(_Replace(prompts, place))
    return prompts
