"""Weight space: between the original and a robust model, and sums of what several fine-tunings changed.

``python -m aft.clip.merge OUT.safetensors --base miniclip32 --add CHECKPOINT=0.5 [--add CHECKPOINT=0.3 ...]``
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from aft.clip.files import load_strictly
from aft.clip.model import ZeroShotModel, state_hash
from aft.clip.pack import pack_tower
from aft.clip.training_data import UNSAID, DataUse, joined
from aft.clip.weights import ModelSpec, load_model
from aft.errors import AftError, ConfigError, WeightsError


def add_task_vectors(base: ZeroShotModel, tuned: Sequence[tuple[ZeroShotModel, float]]) -> ZeroShotModel:
    """``theta = theta_0 + sum_j a_j (theta_j - theta_0)`` over the image tower; one model and ``a`` in [0, 1] interpolate.

    ``a = 0`` gives the base to the bit, a single ``a = 1`` the tuned model. Text side and normalisation are the base's.

    Args:
        base: the model that all were fine-tuned from. It is not changed.
        tuned: models of the same architecture, each with its factor.

    Raises:
        ConfigError: nothing to add, or a factor that is not finite.
        WeightsError: a model has other tensors, a text transformation, visual prompts, or reads pixels in another way.

    Reference:
        TeCoA's released code interpolates so (``--mix_alpha``); task vectors: arXiv 2212.04089.
    """
    if not tuned or not all(abs(factor) < float("inf") for _, factor in tuned):
        raise ConfigError("give one model or more to add, each with a finite factor.")
    origin = base.visual.state_dict()
    merged = {name: value.clone() for name, value in origin.items()}
    for model, factor in tuned:
        _refuse_another(base, model)
        for name, value in model.visual.state_dict().items():
            if value.is_floating_point():
                merged[name] = value.clone() if factor == 1 and len(tuned) == 1 else merged[name] + factor * (value - origin[name])
    recipe = "+".join(f"{factor:g}*{model.record.sha256[:8]}" for model, factor in tuned)
    return _with_tower(base, merged, recipe, joined(base.record.data, *(model.record.data or (UNSAID,) for model, _ in tuned)))


def interpolate(base: ZeroShotModel, tuned: ZeroShotModel, share: float) -> ZeroShotModel:
    """``(1 - share) * base + share * tuned`` over the image tower."""
    return add_task_vectors(base, [(tuned, share)])


def _refuse_another(base: ZeroShotModel, model: ZeroShotModel) -> None:
    for what, theirs, ours in (
        ("mean", model.record.mean, base.record.mean), ("std", model.record.std, base.record.std),
        ("resolution", model.record.resolution, base.record.resolution), ("activation", model.record.activation, base.record.activation),
        ("text_transform", model.text_transform.name, base.text_transform.name), ("prompts", model.record.prompts, base.record.prompts),
    ):  # fmt: skip
        if theirs != ours:
            why = "towers cannot be mixed that read other texts" if what == "text_transform" else "only models of one base can be merged"
            raise WeightsError(f"{model.record.name} has {what} = {theirs}, the base has {ours}: {why}; leave it out.")
    if not same_tensors(model.text_transform, base.text_transform):
        raise WeightsError(f"{model.record.name} and the base both have text_transform = {base.text_transform.name}, of other values: "
                           "towers cannot be mixed that read other texts; leave it out.")  # fmt: skip
    if model.record.base_sha256 not in (None, base.record.sha256):
        warnings.warn(f"{model.record.name} was fine-tuned from weights of sha256 {str(model.record.base_sha256)[:8]}, the base has "
                      f"{base.record.sha256[:8]}: its difference is more than its own fine-tuning.", stacklevel=3)  # fmt: skip
    shapes = {name: value.shape for name, value in base.visual.state_dict().items()}
    others = {name: value.shape for name, value in model.visual.state_dict().items()}
    if shapes != others:
        name = next(name for name in {**shapes, **others} if shapes.get(name) != others.get(name))
        raise WeightsError(f"{model.record.name} differs from the base in {name}: {others.get(name)} against {shapes.get(name)}.")


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules of one kind hold the same values."""
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def _with_tower(base: ZeroShotModel, state: Mapping[str, Tensor], recipe: str, data: tuple[DataUse, ...]) -> ZeroShotModel:
    """A copy of the base with another image tower, which these data made; its sha256 is that of its tensors."""
    clip = copy.deepcopy(base.clip)
    load_strictly(clip.get_submodule("visual"), state, recipe)
    record = replace(
        base.record, layout="merged", sha256=state_hash(clip), base_sha256=base.record.sha256, method=f"merge({recipe})", data=data
    )
    return ZeroShotModel(clip, base.tokenizer, record, base.text_transform).eval()


def add_files(base: ZeroShotModel, name: str, added: Sequence[str]) -> ZeroShotModel:
    """``add_task_vectors`` with models that are given as ``FILE=FACTOR``.

    Args:
        base: the model that all were fine-tuned from.
        name: its name, for files that hold an image tower alone.
        added: such as ``tecoa.ckpt=0.5``.

    Raises:
        ConfigError: one is not written so.
        WeightsError: a file cannot be loaded, or its tower, preprocessing or text transformation is not the base's.
    """
    tuned = []
    for text in added:
        file, _, factor = text.rpartition("=")
        try:
            tuned.append((file, float(factor)))
        except ValueError as error:
            raise ConfigError(f"--add {text}: write FILE=FACTOR, such as tecoa.ckpt=0.5.") from error
    with torch.no_grad():
        return add_task_vectors(base, [(load_model(ModelSpec(name, file)), factor) for file, factor in tuned])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: reads, adds, writes the image tower in fp16, and says its sha256.

    Raises:
        AftError: whatever a user can mend.
    """
    about = "Adds what fine-tunings changed to the weights that they started from."
    parser = argparse.ArgumentParser(prog="python -m aft.clip.merge", description=about)
    parser.add_argument("out", type=Path, help="file for the image tower, .safetensors")
    parser.add_argument("--base", default="miniclip32", help="name of the model that all started from")
    parser.add_argument("--pretrained", default=None, help="its weights, as in ModelSpec")
    parser.add_argument("--add", action="append", required=True, metavar="FILE=FACTOR", help="a checkpoint or tower and its factor")
    given = parser.parse_args(arguments)
    if given.out.suffix != ".safetensors":
        raise ConfigError(f"{given.out}: the image tower is written as safetensors: give a name that ends so, or nothing could read it.")
    merged = add_files(load_model(ModelSpec(given.base, given.pretrained)), given.base, given.add)
    print(f"{given.out}: sha256 {pack_tower(merged, given.out)}, {merged.record.method}")


if __name__ == "__main__":
    try:
        main()
    except AftError as error:
        sys.exit(f"error: {error}")
