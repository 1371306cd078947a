"""Pure functions of tensors: no model, no state. One value a sample, ``[B]``, or a scalar where samples or classes are coupled."""

from aft.losses.alignment import alignment
from aft.losses.attention import map_distance, text_guided_attention
from aft.losses.contrast import caption_contrast, image_to_caption
from aft.losses.divergence import kl_divergence, soft_cross_entropy
from aft.losses.embedding import cosine, squared_distance, unit_distance
from aft.losses.text import hyperspherical_energy, rival_margins

__all__ = [
    "alignment",
    "caption_contrast",
    "cosine",
    "hyperspherical_energy",
    "image_to_caption",
    "kl_divergence",
    "map_distance",
    "rival_margins",
    "soft_cross_entropy",
    "squared_distance",
    "text_guided_attention",
    "unit_distance",
]
