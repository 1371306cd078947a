"""Which weights of the image tower learn: all, its first or last blocks, low-rank updates, or visual prompts.

Shapes: O outputs, I inputs, R rank of a weight matrix's update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aft.clip.model import ModelRecord, ZeroShotModel, full_precision
from aft.clip.towers import tower_name, tower_parts
from aft.clip.visual_prompts import attach_prompts
from aft.errors import ConfigError, unknown_name

#: Each name's settings and what they are when they are not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "all": {},
    "first": {"blocks": 1},
    "last": {"blocks": 1},
    "lora": {"rank": 8, "alpha": 16.0, "targets": ["attention", "mlp"]},
    "prompts": {"pad": 30, "tokens": 10, "deep": False},
}
#: Where LoRA's targets are: parts of the names of weight matrices.
TARGETS = {"attention": ("attn", "attnpool"), "mlp": ("mlp",)}


@dataclass(frozen=True)
class TrainableSpec:
    """What learns in the image tower. A setting that belongs to another name is refused.

    Args:
        name: ``all`` of the tower; ``first`` or ``last`` blocks (``first`` with the patch embedding and positions before them,
            ``last`` with the final norm and projection after them); ``lora``, low-rank updates (arXiv 2106.09685); ``prompts``, a
            learned border and tokens in front of a frozen tower (TeCoA-VP, arXiv 2212.07016).
        blocks: of first and last: how many transformer blocks, or stages of a ResNet or ConvNeXt; none means 1.
        rank: of lora; none means 8.
        alpha: of lora: updates are scaled by ``alpha / rank``; none means 16.
        targets: of lora: ``attention``, ``mlp``; none means both.
        pad: of prompts: width of the border in pixels of the tower's input; none means 30.
        tokens: of prompts: how many tokens; none means 10.
        deep: of prompts: whether every block has tokens of its own; none means no.
    """

    name: Literal["all", "first", "last", "lora", "prompts"] = "all"
    blocks: int | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: list[Literal["attention", "mlp"]] | None = None
    pad: int | None = None
    tokens: int | None = None
    deep: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in DEFAULTS:
            raise ConfigError(unknown_name("trainable name", self.name, DEFAULTS))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and value is not None and field.name not in DEFAULTS[self.name]:
                owner = " or ".join(name for name, own in DEFAULTS.items() if field.name in own)
                raise ConfigError(f"trainable.{field.name} = {value} belongs to {owner}, not to {self.name}: set it to null.")
        settings = self.settings()
        for key in ("blocks", "rank", "alpha"):
            if not settings.get(key, 1) > 0:
                raise ConfigError(f"trainable.{key} = {settings[key]} is not above 0.")
        for target in settings.get("targets", ["mlp"]):
            if target not in TARGETS:
                raise ConfigError(unknown_name("trainable target", target, TARGETS))
        if not settings.get("targets", ["mlp"]):
            raise ConfigError(f"trainable.targets is empty: name at least one of {', '.join(TARGETS)}.")

    def settings(self) -> dict[str, Any]:
        """The name and the settings that belong to it, all filled in, as plain types."""
        own = {key: getattr(self, key) for key in DEFAULTS[self.name] if getattr(self, key) is not None}
        return {"name": self.name, **DEFAULTS[self.name], **own}


class LowRank(nn.Module):
    """A weight matrix plus a learned update of low rank: ``W_OI + (alpha / rank) up_OR @ down_RI``, zero at the start.

    ``down`` is drawn as LoRA's released code does (Kaiming, ``a = sqrt(5)``), ``up`` is zero. It is a parametrisation of the weight,
    not a layer of its own as in peft: open_clip's attention and the ResNet's attention pool use weights without calling the modules
    that hold them, so that an adapter around such a module is silently passed by; and peft's own layer for fused attention writes the
    base weights in every forward.

    Args:
        weight_OI: the frozen weight.
        rank: R.
        alpha: see the formula.
        noise: where ``down`` is drawn from.
    """

    def __init__(self, weight_OI: Tensor, rank: int, alpha: float, noise: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        bound = 1 / math.sqrt(inputs)  # of kaiming_uniform_ with a = sqrt(5)
        self.scale = alpha / rank
        self.up_OR = nn.Parameter(weight_OI.new_zeros(outputs, rank))
        self.down_RI = nn.Parameter(((2 * torch.rand(rank, inputs, generator=noise) - 1) * bound).to(weight_OI))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """The updated weight, at the weight's precision also under autocast."""
        with full_precision(weight_OI.device):
            return torch.addmm(weight_OI, self.up_OR, self.down_RI, alpha=self.scale)


def make_trainable(model: ZeroShotModel, spec: TrainableSpec, seed: int = 0) -> None:
    """Freezes what does not learn in the image tower, and adds what it needs to learn; the text side is left as it is.

    Args:
        model: its record takes note of visual prompts.
        spec: what learns.
        seed: of the initial values of prompts and low-rank updates; no global random stream is used.

    Raises:
        ConfigError: the tower has not got what ``spec`` asks for.
    """
    settings = spec.settings()
    if spec.name == "all":
        return
    visual = model.visual
    chosen = _chosen_blocks(visual, settings) if spec.name in ("first", "last") else set()
    for name, parameter in visual.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    if spec.name == "lora":
        add_low_rank(visual, settings, seed)
    elif spec.name == "prompts":
        _add_prompts(model, {key: settings[key] for key in DEFAULTS["prompts"]}, seed)


def _chosen_blocks(visual: nn.Module, settings: Mapping[str, Any]) -> set[str]:
    parts = tower_parts(visual)
    count, known = settings["blocks"], len(parts.blocks)
    if count > known:
        raise ConfigError(f"trainable.blocks = {count}, but {tower_name(visual)} has {known}: use at most {known}, or name: all.")
    first = settings["name"] == "first"
    blocks = parts.blocks[:count] if first else parts.blocks[known - count :]
    return {*(parts.stem if first else parts.head), *(name for block in blocks for name in block)}


def _add_prompts(model: ZeroShotModel, settings: dict[str, Any], seed: int) -> None:
    if model.record.prompts is None:
        attach_prompts(model.visual, model.record.resolution, **settings, seed=seed)
        model.record = replace(model.record, prompts=settings)
    if model.record.prompts != settings:
        raise ConfigError(f"the model has visual prompts {model.record.prompts} already: go on with these settings, not with {settings}.")
    model.visual.get_submodule("prompts").requires_grad_(True)


def low_rank_targets(visual: nn.Module) -> dict[str, list[str]]:
    """The weight matrices of a tower that each of LoRA's targets stands for; targets without any are left out."""
    names = [name for name, weight in visual.named_parameters() if weight.ndim == 2 and name.endswith("weight")]
    of_target = {target: [name for name in names if set(parts) & set(name.split("."))] for target, parts in TARGETS.items()}
    return {target: found for target, found in of_target.items() if found}


def add_low_rank(visual: nn.Module, settings: Mapping[str, Any], seed: int = 0) -> None:
    """Lays a learned update of low rank over every weight matrix that ``settings["targets"]`` names.

    Raises:
        ConfigError: the tower has no such matrices; what it has is named.
    """
    known = low_rank_targets(visual)
    for target in settings["targets"]:
        if target not in known:
            has = f"it has {', '.join(known)}" if known else "it has none that low-rank updates fit"
            raise ConfigError(f"trainable.targets: {tower_name(visual)} has no weight matrices of {target!r}; {has}.")
    noise = torch.Generator().manual_seed(seed)
    for name in dict.fromkeys(name for target in settings["targets"] for name in known[target]):
        place, _, key = name.rpartition(".")
        weight_OI = visual.get_parameter(name)
        parametrize.register_parametrization(
            visual.get_submodule(place), key, LowRank(weight_OI, settings["rank"], settings["alpha"], noise)
        )


def merge_low_rank(visual: nn.Module) -> int:
    """Writes every low-rank update into its weight, in place: the tower is a plain one again, with the same outputs.

    torch's own ``remove_parametrizations`` takes the weight's property away from the module's class, which a copy of the module
    shares: to merge the copy would break the original.

    Returns:
        How many weights were written.
    """
    count = 0
    for module in list(visual.modules()):
        chains = getattr(module, "parametrizations", None)
        if chains is None or not all(isinstance(chain[0], LowRank) for chain in chains.values()):
            continue
        merged = {key: (chain.original, getattr(module, key).detach()) for key, chain in chains.items()}
        plain = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = plain
        for key, (weight_OI, sum_OI) in merged.items():
            with torch.no_grad():
                weight_OI.copy_(sum_OI)
            module.register_parameter(key, weight_OI)
        count += len(merged)
    return count


@contextmanager
def as_trained(visual: nn.Module, record: ModelRecord) -> Iterator[None]:
    """Inside, a plain tower has the parts that its checkpoint's tensors belong to; afterwards low-rank updates are merged.

    Visual prompts stay: they are part of the model.
    """
    learned = record.trainable or {}
    if record.prompts is not None:
        attach_prompts(visual, record.resolution, **record.prompts)  # type: ignore[arg-type]
    if learned.get("name") == "lora":
        add_low_rank(visual, learned)
    yield
    merge_low_rank(visual)
