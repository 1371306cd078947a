"""Lightning DataModules: where images, labels and class names come from."""

from datamodules.folder import ImageFolder
from datamodules.sample import Sample

__all__ = ["ImageFolder", "Sample"]
