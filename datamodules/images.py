"""From encoded bytes to pixels: decoded once into one uint8 array where that fits in memory, else at each access.

Shapes: N good images, B batch, C = 3 channels, H height, W width.
"""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aft.errors import DataError
from datamodules.sources import Source

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # the only decoders that may run, whatever a file calls itself
THREADS, CHUNK = 2, 256
THREADED_PIXELS = 96 * 96  # smaller images spend their time in Python: two threads took 1.2 times as long as one at 32 x 32
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, zipfile.BadZipFile, zlib.error)


class ImageStore:
    """A map-style store: ``store[i]`` is ``float32 [3, H, W]`` in [0, 1].

    Args:
        source: the encoded files.
        positions_N: ``int64 [N]``, where in the source each good image lies.
        size: height and width of every image, pixels.
        pixels_NCHW: all images, ``uint8``; none: each access decodes.
        image_size: side to which an access fits an image, pixels; none: as it is.
    """

    def __init__(self, source: Source, positions_N: Tensor, size: tuple[int, int], pixels_NCHW: Tensor | None,
                 image_size: int | None) -> None:
        self.source, self.positions_N, self.size, self.pixels_NCHW, self.image_size = source, positions_N, size, pixels_NCHW, image_size

    def __len__(self) -> int:
        return len(self.positions_N)

    def __getitem__(self, position: int) -> Tensor:
        """One image, ``float32 [3, H, W]`` in [0, 1].

        Raises:
            DataError: the file cannot be decoded any more, or has another size than the others.
        """
        return in_unit_range(self.take(torch.tensor([int(position)])))[0]

    def take(self, rows_B: Tensor) -> Tensor:
        """The images at ``rows_B``, ``uint8 [B, 3, H, W]``, as a copy.

        Raises:
            DataError: as for one image.
        """
        if self.pixels_NCHW is not None:
            return self.pixels_NCHW[rows_B]
        return torch.stack([self._decode(int(self.positions_N[row])) for row in rows_B])

    def _decode(self, position: int) -> Tensor:
        name = self.source.name(position)
        try:
            pixels_CHW = decode(self.source.read(position), self.image_size)
        except DAMAGED as error:
            raise DataError(f"{name} cannot be decoded ({error}): remove it or fetch it again.") from error
        if pixels_CHW.shape[1:] != self.size:
            raise other_size(name, pixels_CHW.shape[1:], self.size)
        return torch.from_numpy(pixels_CHW)


def in_unit_range(pixels: Tensor) -> Tensor:
    """Grey levels as ``float32`` in [0, 1]: ``pixels / 255``, the same bits on every device. Floats come back as they are."""
    if pixels.is_floating_point():
        return pixels
    if pixels.device.type == "cpu":  # numpy asks for large pages; without them a batch of 224 px takes 3.5 times as long, in page faults
        return torch.from_numpy(np.empty(tuple(pixels.shape), np.float32)).copy_(pixels).div_(255)
    return pixels.float().div_(torch.full((), 255.0, device=pixels.device))  # by a plain number CUDA would multiply with the reciprocal


def decode(data: bytes, image_size: int | None, max_pixels: int | None = None) -> np.ndarray:
    """Encoded bytes to ``uint8 [3, H, W]``, RGB.

    Args:
        data: JPEG, PNG, WebP or BMP.
        image_size: resize until the shorter side has this many pixels (bicubic), then crop the centre; none: leave the size.
        max_pixels: most pixels that the header may announce; none: ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        DecompressionBombError: more pixels than that.
        OSError, SyntaxError, ValueError: the bytes are damaged.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        guard_size(image, max_pixels)
        picture = image.convert("RGB")
    if image_size is not None and picture.size != (image_size, image_size):
        picture = cover(picture, image_size)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def guard_size(image: Image.Image, max_pixels: int | None = None) -> None:
    """Refuses an image by its header, before its pixels take memory.

    Raises:
        DecompressionBombError: more pixels than ``max_pixels``, or without it than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are more than {limit}")


def cover(image: Image.Image, side: int) -> Image.Image:
    """Resizes (bicubic, aspect kept) until the shorter side is ``side`` pixels, then crops the centre square."""
    image = shorten(image, side)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def shorten(image: Image.Image, side: int) -> Image.Image:
    """Resizes (bicubic, aspect kept) until the shorter side is ``side`` pixels; an image that is so already stays as it is."""
    if min(image.size) == side:
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def load(source: Source, *, image_size: int | None, cache_bytes: int, max_bad_share: float) -> ImageStore:
    """Decodes a source into memory when it fits, else checks every header and decodes at each access.

    Damaged files are left out and listed in one warning; those that stay keep their positions.

    Args:
        source: the encoded files.
        image_size: side to fit every image to, pixels; none: all images must have one size.
        cache_bytes: the largest array to hold, bytes.
        max_bad_share: the largest share of damaged files to go on with, 0 to 1.

    Raises:
        DataError: more damaged files than that, or images of several sizes without ``image_size``.
    """
    stored = first_size(source)
    size = stored if image_size is None else (image_size, image_size)
    fits = len(source) * 3 * size[0] * size[1] <= cache_bytes
    pixels = np.empty((len(source), 3, *size), np.uint8) if fits else None

    def examine(position: int) -> None:
        """Decodes one file into its place, or looks at its header alone."""
        if pixels is None:
            return check_header(source, position, size if image_size is None else None)
        pixels_CHW = decode(source.read(position), image_size)
        if pixels_CHW.shape[1:] != size:
            raise other_size(source.name(position), pixels_CHW.shape[1:], size)
        pixels[position] = pixels_CHW

    bad = examine_all(examine, len(source), THREADS if stored[0] * stored[1] >= THREADED_PIXELS else 1)
    report_damage(source, bad, max_bad_share)
    good = np.setdiff1d(np.arange(len(source)), np.array(sorted(bad), dtype=np.int64))
    if pixels is not None and bad:
        pixels = pixels[good]
    return ImageStore(source, torch.from_numpy(good), size, None if pixels is None else torch.from_numpy(pixels), image_size)


def examine_all(examine: Callable[[int], None], count: int, threads: int) -> dict[int, str]:
    """Calls ``examine`` on every position, in threads (decoders of large images release the GIL).

    Returns:
        Position to message, for the damaged ones. A DataError of ``examine`` is raised.
    """
    def one_chunk(start: int) -> dict[int, str]:
        """The damaged ones of a few files."""
        bad = {}
        for position in range(start, min(start + CHUNK, count)):
            try:
                examine(position)
            except DataError:
                raise
            except DAMAGED as error:
                bad[position] = str(error)
        return bad

    with ThreadPoolExecutor(threads) as pool:
        return {position: text for found in pool.map(one_chunk, range(0, count, CHUNK)) for position, text in found.items()}


def first_size(source: Source) -> tuple[int, int]:
    """Height and width of the first image whose header can be read, pixels.

    Raises:
        DataError: there is none.
    """
    for position in range(len(source)):
        try:
            with Image.open(io.BytesIO(source.read(position)), formats=FORMATS) as image:
                guard_size(image)
                return image.height, image.width
        except DAMAGED:
            continue
    raise DataError(f"none of the {len(source)} images ({source.name(0)} ...) can be decoded: fetch the data again.")


def check_header(source: Source, position: int, size: tuple[int, int] | None) -> None:
    """Reads type and size alone.

    Raises:
        DataError: another size than ``size``, where one is given.
        OSError, SyntaxError, ValueError, DecompressionBombError: the header is damaged or announces too many pixels.
    """
    with Image.open(io.BytesIO(source.read(position)), formats=FORMATS) as image:
        guard_size(image)
        if size is not None and (image.height, image.width) != size:
            raise other_size(source.name(position), (image.height, image.width), size)


def other_size(name: str, given: Sequence[int], wanted: Sequence[int]) -> DataError:
    """The error for images of several sizes; sizes are (height, width) in pixels."""
    return DataError(f"{name} is {given[1]} x {given[0]} pixels, others are {wanted[1]} x {wanted[0]}: "
                     "set image_size (pixels) to resize and crop all to one square size.")


def report_damage(source: Source, bad: dict[int, str], max_bad_share: float) -> None:
    """Lists the damaged files in one warning.

    Raises:
        DataError: their share is above ``max_bad_share``.
    """
    if not bad:
        return
    listed = "; ".join(f"{source.name(position)} ({text})" for position, text in sorted(bad.items())[:10])
    text = f"{len(bad)} of {len(source)} images are damaged: {listed}{' ...' if len(bad) > 10 else ''}"
    if len(bad) > max_bad_share * len(source):
        raise DataError(f"{text}. At most a share of {max_bad_share} is skipped: mend the data, or raise max_bad_share.")
    warnings.warn(f"{text}. They are skipped; the others keep their numbers.", stacklevel=2)
