"""What a run's checkpoint says of its model, and what a resume refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aft.errors import DataError, WeightsError

#: What of a model's record must be the same for a run to go on.
SAME = ("config", "activation", "mean", "std", "base_sha256", "text_transform")


def refuse_other_trainable(stored: Mapping[str, Any], here: Mapping[str, Any], resumes: bool) -> None:
    """Raises WeightsError where something else learned in a checkpoint, and it is resumed or has other tensors for it."""
    before = stored.get("trainable") or {"name": "all"}
    added = {before["name"], here["name"]} & {"lora", "prompts"}
    if before != dict(here) and (resumes or added):
        raise WeightsError(
            f"the checkpoint has trainable = {before}, this run has {dict(here)}: go on with the same, or start a new run from its "
            "weights with --model.init_args.clip.pretrained CHECKPOINT."
        )


def refuse_another_model(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises WeightsError where a checkpoint was trained from another model than this run's."""
    for key in SAME:
        before, now = stored[key], here[key]
        if before != (list(now) if isinstance(before, list) else now):
            raise WeightsError(f"the checkpoint has {key} = {before}, this run has {now}: go on with the clip that it was trained from.")


def refuse_another_teacher(stored: str | None, here: str | None) -> None:
    """Raises WeightsError where the teacher, which is rebuilt and not stored, has other weights than the one that a run had."""
    if stored is not None and here is not None and stored != here:
        raise WeightsError(
            f"the checkpoint was trained with a teacher of sha256 {stored[:12]}, this run's has {here[:12]}: go on with the same teacher."
        )


def refuse_other_classes(stored: Sequence[str], here: Sequence[str]) -> None:
    """Raises DataError where a run would go on with other classes: labels would silently mean something else."""
    if tuple(stored) != tuple(here):
        raise DataError(
            f"the checkpoint was trained on {len(stored)} classes ({', '.join(stored[:4])} ...), the data has {len(here)} "
            f"({', '.join(here[:4])} ...): go on with the same classes in the same order, or start a new run from its weights "
            "with --model.init_args.clip.pretrained CHECKPOINT."
        )
