"""Lightning DataModules: where images, labels and class names come from."""

from datamodules.captions import Captions
from datamodules.folder import ImageFolder
from datamodules.sample import Sample
from datamodules.shards import Shards
from datamodules.torchvision_sets import Torchvision
from datamodules.zero_shot import ZeroShotSuite

__all__ = ["Captions", "ImageFolder", "Sample", "Shards", "Torchvision", "ZeroShotSuite"]
