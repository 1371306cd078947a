"""Pure functions of tensors: no model, no state. Each is defined on the global batch and returns a scalar."""

from aft.losses.alignment import alignment
from aft.losses.contrast import caption_contrast

__all__ = ["alignment", "caption_contrast"]
