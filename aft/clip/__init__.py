"""The model, in pixel space: images in [0, 1] -> an embedding (and patch tokens on demand) -> logits over texts."""

from aft.clip.model import Encoding, ModelRecord, ZeroShotModel
from aft.clip.trainable import TrainableSpec
from aft.clip.weights import ModelSpec, load_model

__all__ = ["Encoding", "ModelRecord", "ModelSpec", "TrainableSpec", "ZeroShotModel", "load_model"]
