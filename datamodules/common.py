"""What every datamodule of images shares: the settings of its batches, and this process's place among all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning

from aft.batch import Batch
from aft.errors import ConfigError, unknown_name
from datamodules.augment import Augment
from datamodules.images import in_unit_range
from datamodules.zero_shot_table import table

PROMPT = ("a photo of a {}.",)


class ImageData(lightning.LightningDataModule):
    """Settings that all training sets take; the trainer must have ``use_distributed_sampler: false``.

    Args:
        batch_size: images a process and step.
        augment: of training images: ``none``, ``flip`` (left to right), ``crop_flip`` (shifted crop, then flip).
        padding: largest shift of the crop, pixels; what comes in is the reflection.
        seed: of the order and the augmentation.
        image_size: side to resize and crop every image to, pixels; none: all images have one size already.
        templates: prompts with one ``{}`` each.
        cache_bytes: a split is held decoded in memory up to this size, bytes; beyond it each access decodes.
        max_bad_share: largest share of damaged images to skip, 0 to 1; more is an error.
        num_workers: processes that make training batches; worth it only when images are not held in memory.
        replay: how often each training batch comes, in a row (free adversarial training); a pass has so many times as many steps.
        terms: of use of the images, such as their licence, for checkpoints and the model cards of exports; none: what is known of a set
            of this name (``zero_shot_data/sets.json``).

    Raises:
        ConfigError: a setting is out of range.
    """

    name = "images"

    def __init__(self, *, batch_size: int = 128, augment: Augment = "flip", padding: int = 4, seed: int = 0,
                 image_size: int | None = None, templates: tuple[str, ...] = PROMPT, cache_bytes: int = 4 * 2**30,
                 max_bad_share: float = 0.01, num_workers: int = 0, replay: int = 1, terms: str | None = None) -> None:
        super().__init__()
        check_least(batch_size=(batch_size, 1), padding=(padding, 0), seed=(seed, 0), cache_bytes=(cache_bytes, 0),
                    max_bad_share=(max_bad_share, 0), num_workers=(num_workers, 0), replay=(replay, 1))
        if augment not in ("none", "flip", "crop_flip"):
            raise ConfigError(unknown_name("augment", augment, ("none", "flip", "crop_flip")))
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise ConfigError(f"templates = {templates}: each needs exactly one {{}}, where the class name goes.")
        self.batch_size, self.augment, self.padding, self.seed = batch_size, augment, padding, seed
        self.image_size, self.templates, self.cache_bytes = image_size, tuple(templates), cache_bytes
        self.max_bad_share, self.num_workers, self.replay = max_bad_share, num_workers, replay
        self.given_terms = terms

    @property
    def terms(self) -> str | None:
        """On what terms the images may be used; none where nobody said."""
        known = table().get(self.name)
        return self.given_terms or (None if known is None else known.terms)

    def place(self) -> tuple[int, int]:
        """Rank of this process, and how many there are; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @property
    def in_fit(self) -> bool:
        """Whether a trainer is training on this: then its loaders may yield bytes, which ``on_after_batch_transfer`` makes floats."""
        return isinstance(self.trainer, lightning.Trainer) and bool(self.trainer.training)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Bytes become floats in [0, 1], in the trainer's precision, on the device: a quarter goes there of what floats would be."""
        if not isinstance(batch, Batch) or batch.images.is_floating_point():
            return batch
        whole = replace(batch, images=in_unit_range(batch.images))
        return whole if self.trainer is None else self.trainer.precision_plugin.convert_input(whole)

    def check_sampler(self) -> None:
        """Refuses Lightning's own splitting of the data.

        Raises:
            ConfigError: ``use_distributed_sampler`` is true on several processes.
        """
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self.place()[1] > 1 and getattr(connector, "use_distributed_sampler", False):
            raise ConfigError("trainer.use_distributed_sampler is true: it would split each process's share once more and pad it; "
                              "set it to false, the loaders split over processes themselves.")

    def check_padding(self, size: tuple[int, int]) -> None:
        """Refuses a crop that would shift by a whole image; ``size`` is (height, width), pixels.

        Raises:
            ConfigError: ``padding`` reaches the shorter side.
        """
        if self.augment == "crop_flip" and self.padding >= min(size):
            raise ConfigError(f"padding = {self.padding} is not below the image side of {min(size)} pixels: reflect less.")


def check_least(**settings: tuple[float, float]) -> None:
    """Refuses settings that are too small; each is (value, least).

    Raises:
        ConfigError: a value is below its least.
    """
    for key, (value, least) in settings.items():
        if value < least:
            raise ConfigError(f"{key} = {value} is too small: give {least} or more.")
