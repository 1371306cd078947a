"""What differs between image towers: where the patch tokens are. B images, N patches, D embedding width.

Now: open_clip's VisionTransformer. Other towers give the embedding alone and say so when tokens are asked for.
"""

from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from aft.errors import ConfigError


def has_tokens(visual: nn.Module) -> bool:
    """Whether this image tower has patch tokens in the joint space."""
    return isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"


def encode_with_tokens(visual: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Embedding and patch tokens from one pass.

    The tokens are the last layer's patch outputs, sent through the same final norm and projection as the class token, as TGA-ZSR
    does (arXiv 2410.21802).

    Args:
        visual: an image tower with a class token.
        pixels_BCHW: normalised pixels at the tower's resolution.

    Returns:
        ``embedding [B, D]`` and ``tokens [B, N, D]``, both not normalised to unit length.

    Raises:
        ConfigError: the tower has no patch tokens in the joint space.
    """
    if not isinstance(visual, VisionTransformer) or not has_tokens(visual):
        raise ConfigError(
            f"image tower {type(visual).__name__} has no patch tokens in the joint space: choose a ViT with a class token, "
            "or a method whose terms do not need tokens."
        )
    before = visual.output_tokens
    visual.output_tokens = True
    try:
        embedding_BD, tokens_BNW = visual(pixels_BCHW)
    finally:
        visual.output_tokens = before
    return embedding_BD, tokens_BNW if visual.proj is None else tokens_BNW @ visual.proj
