"""The teacher's encodings of clean images, kept by the images' stable numbers. B images of a batch, D embedding width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aft.errors import ConfigError


class TeacherCache:
    """Encodes an image once, however often it comes; for images that are the same each time, which nothing augments.

    Encodings are held on the CPU, ``4 D`` bytes an image (2.6 GB for ImageNet and D = 512). They are not in the checkpoint: after a resume
    they are made anew.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def __call__(self, index_B: Tensor, images_BCHW: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings of these images, ``[B, D]``, on their device; ``encode`` runs on those alone that have not been seen.

        Args:
            index_B: stable numbers, int64.
            images_BCHW: clean images.
            encode: the teacher.
        """
        numbers = index_B.tolist()
        missing = [place for place, number in enumerate(numbers) if number not in self.kept]
        if missing:
            rows = images_BCHW if len(missing) == len(numbers) else images_BCHW[torch.tensor(missing, device=images_BCHW.device)]
            for place, embedding_D in zip(missing, encode(rows).detach().cpu(), strict=True):
                self.kept[numbers[place]] = embedding_D.clone()
        return torch.stack([self.kept[number] for number in numbers]).to(images_BCHW.device)


def check_cache(augment: str | None, needs: frozenset[str]) -> None:
    """Refuses a cache that would be wrong, or would not hold all that is asked of it.

    Args:
        augment: what the data do to training images; none: they do not say.
        needs: of the method's terms.

    Raises:
        ConfigError: images change, or terms ask for anything but the teacher's embeddings of clean images.
    """
    if augment != "none":
        raise ConfigError(
            f"cache_teacher = true, but the data has augment = {augment!r}: an image must be the same each time it comes; set "
            "data.init_args.augment to none, or leave cache_teacher out."
        )
    if "tokens" in needs:
        raise ConfigError("cache_teacher = true keeps embeddings, and a term needs the teacher's patch tokens: leave cache_teacher out.")
    if "teacher_clean" not in needs:
        raise ConfigError("cache_teacher = true, but no term asks for the teacher on clean images: leave cache_teacher out.")
