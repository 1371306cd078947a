"""Common corruptions: accuracy on images that weather, cameras and compression spoilt, not an attacker.

The pictures are made by the package ``imagecorruptions-imaug`` (a kept fork of ``imagecorruptions``), with its table of severities: that of
ImageNet-C, which is meant for images of 224 px. On 32 px the same blur covers more of the picture, so figures are lower than those on
CIFAR-10-C, whose severities are others; the two cannot be compared.

Shapes: n images, C channels, H rows, W columns, K kinds, S severities.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aft.attacks.noise import sample_keys
from aft.cards import Verdicts
from aft.errors import ConfigError, DataError, unknown_name

#: The fifteen of ImageNet-C, in its order; a kind's place is part of its noise.
KINDS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog",
    "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
#: These draw from a generator of their own and take its seed.
SEEDED = ("impulse_noise", "glass_blur")
SMALLEST = 32

Corrupter = Callable[..., NDArray[np.uint8]]


@dataclass(frozen=True)
class Corruptions:
    """Which corruptions are looked at: every kind at every severity.

    Args:
        kinds: some of the fifteen of ImageNet-C.
        severities: from 1 (mild) to 5.
        seed: of the random ones.

    Raises:
        ConfigError: an unknown kind or severity, or none.

    Reference:
        Hendrycks and Dietterich, arXiv 1903.12261 (ImageNet-C).
    """

    kinds: tuple[str, ...] = KINDS
    severities: tuple[int, ...] = SEVERITIES
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(unknown_name("corruption", str(kind), KINDS))
        if wrong := [severity for severity in self.severities if severity not in SEVERITIES]:
            raise ConfigError(f"severities = {list(self.severities)} holds {wrong[0]}: they are 1 (mild) to 5.")
        if not self.kinds or not self.severities:
            raise ConfigError("corruptions need one kind and one severity or more: leave both out for all.")
        object.__setattr__(self, "kinds", tuple(kind for kind in KINDS if kind in self.kinds))
        object.__setattr__(self, "severities", tuple(sorted(set(self.severities))))

    def describe(self) -> dict[str, Any]:
        """The settings as plain values, for cards; ``table`` says whose severities they are."""
        return {"kinds": list(self.kinds), "severities": list(self.severities), "seed": self.seed, "table": "ImageNet-C"}

    def each(self) -> Iterator[tuple[str, int]]:
        """Kind and severity, in the order of the columns of verdicts."""
        return ((kind, severity) for kind in self.kinds for severity in self.severities)

    def apply(self, images_nCHW: Tensor, index_n: Tensor, kind: str, severity: int) -> Tensor:
        """The images corrupted, as 8-bit pictures are: one by one, with noise that belongs to (seed, image, kind, severity) alone.

        Args:
            images_nCHW: pixels in [0, 1], 32 px or larger; rounded to 8 bits first.
            index_n: the images' stable numbers.
            kind, severity: one of each.

        Returns:
            Shape, type and device of ``images_nCHW``.

        Raises:
            DataError: images smaller than 32 px.
            ConfigError: the package is missing.
        """
        if min(images_nCHW.shape[-2:]) < SMALLEST:
            size = " x ".join(map(str, images_nCHW.shape[-2:]))
            raise DataError(f"images of {size} pixels are too small for corruptions: give images of {SMALLEST} x {SMALLEST} or more.")
        corrupt, draw = corrupter(), len(SEVERITIES) * KINDS.index(kind) + severity
        seeds = (sample_keys(self.seed, draw, index_n.cpu()) & 0xFFFFFFFF).tolist()
        pictures_nHWC = (images_nCHW.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        spoilt = []
        for picture_HWC, seed in zip(pictures_nHWC, seeds, strict=True):
            with numpy_seeded(seed):
                own = {"seed": seed} if kind in SEEDED else {}
                spoilt.append(corrupt(picture_HWC, corruption_name=kind, severity=severity, **own))
        stacked_nCHW = torch.from_numpy(np.stack(spoilt)).permute(0, 3, 1, 2).to(images_nCHW) / 255
        return stacked_nCHW.contiguous()


def corrupter() -> Corrupter:
    """The package's function.

    Raises:
        ConfigError: it is not installed, or one of its own packages is not.
    """
    try:
        found: Corrupter = importlib.import_module("imagecorruptions").corrupt
    except ImportError as error:
        raise ConfigError(f"corruptions need the package imagecorruptions-imaug ({error}): pip install 'aft[corruptions]'.") from error
    return found


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """numpy's global generator, which the package draws from, seeded while it is open; afterwards as before."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def corruption_metrics(verdicts: Verdicts, corruptions: Corruptions) -> dict[str, Any]:
    """A card's ``metrics.corruptions``: mean corruption accuracy, and that of every kind, in all and at each severity.

    A figure over many corruptions is the mean over images of the share of its corruptions that is right; its standard error is the
    deviation of these shares over the root of n, since the corruptions of one image are not independent. It is an accuracy, not the mCE,
    which divides errors by AlexNet's.
    """
    right_NKS = verdicts["corrupted"].reshape(len(verdicts["row"]), len(corruptions.kinds), len(corruptions.severities))
    per_kind = {
        kind: {**_mean(right_NKS[:, place]), "by_severity": right_NKS[:, place].mean(0).tolist()}
        for place, kind in enumerate(corruptions.kinds)
    }
    return {"corruptions": {**corruptions.describe(), "n": len(right_NKS), **_mean(right_NKS), "per_kind": per_kind}}


def _mean(right: NDArray[np.bool_]) -> dict[str, float | None]:
    shares_N = right.reshape(len(right), -1).mean(1)
    error = float(shares_N.std(ddof=1) / np.sqrt(len(shares_N))) if len(shares_N) > 1 else None
    return {"mean_accuracy": float(shares_N.mean()), "mean_accuracy_standard_error": error}
