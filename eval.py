"""Measures how robust models are, and shows what was measured.

    python eval.py evaluate -c configs/eval/quickstart.yaml     (evaluate is the default and may be left out)
    python eval.py curve -c configs/eval/curve.yaml --robust.pretrained FILE
    python eval.py report results/ runs/*
    python eval.py report runs/new --against runs/old
    python eval.py external --card FILE --robust_accuracy 0.12 --source "whose attack"

``python eval.py evaluate -h`` (``curve -h``, ``report -h``, ``external -h``) lists all settings.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

from lightning import LightningDataModule

from aft.attacks.threat_model import Norm, pixel_fraction, radius_text
from aft.batch import EvaluationSet, SuiteData
from aft.cards import read, with_external, write, write_whole
from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.matmul import use_onednn
from aft.clip.merge import interpolate
from aft.clip.weights import named
from aft.defenses import DefenseSpec
from aft.errors import AftError, ConfigError, unknown_name
from aft.evaluation import Cell, Classification, Place, Protocol, Task, evaluate, first, plan, report, robustbench, zero_shot
from aft.evaluation.behind import crossed
from aft.evaluation.collect import collect
from aft.evaluation.compare import compare
from aft.evaluation.corruptions import Corruptions
from aft.evaluation.fitting import images_at_once
from aft.evaluation.judge import Survivors, cell_under
from aft.evaluation.pages import Content, again, attacked, kept, picture, publish
from aft.evaluation.pages.build import as_shown
from aft.evaluation.picture import draw_curve
from aft.evaluation.place import now_and_then, torch_device, use_threads
from aft.evaluation.protocols import WITHOUT_ATTACK
from aft.evaluation.published import PUBLISHED
from aft.evaluation.report import Labelled
from aft.evaluation.runner import card_path, survivors_of
from aft.evaluation.share import Share
from aft.evaluation.subsets import first_of_each
from aft.settings import in_short, parser_of, refusal, underlying
from datamodules import Sample, ZeroShotSuite


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What measuring some models takes, whichever they are.

    Args:
        data: datamodule with ``evaluation_set(split)``, as in ``configs/data/*.yaml``, or a suite of many sets.
        split: of the data set.
        task: what is asked: none: classification; aft.evaluation.Retrieval for captions, or a class of your own (docs/add_a_task.md).
        label_spaces: name -> class names to keep and to classify among; null: all classes.
        protocols: any of clean, corruptions, pgd, apgd, strict, four, autoattack_standard, autoattack_rand, or of the literature, which
            bring their own radius, steps, templates and pixels (tecoa, pmg_aft, tga_zsr, robustvlm, ttc, agft); each is a column.
        corruptions: kinds and severities of the protocol of that name.
        eps: radii in units of the pixel range, such as 2/255.
        norm: of the radii.
        steps: of each attack (strict, four and autoattack have their own).
        targets: classes a targeted attack aims at, clipped to the number of wrong classes (strict, four and autoattack have their own).
        n: images of each label space, the first of a fixed balanced order; null: all.
        largest_first: measure the largest radius first, and take images that it does not break as robust at the smaller ones without
            attacking them again. Cheaper; the smaller radii's accuracy can only come out higher, and their cards say it.
        checks: right images on which the dear automatic doubts are made (64, say), so that a robust figure can be called reliable; 0 makes
            the cheap ones alone. Cards that are finished get their verdict too. Images are also carried over from the other models given.
        batch_size: images at once, and in a part: a kill loses at most one part. auto: what the GPU's memory takes (100 on a CPU).
        seed: of the attacks' noise.
        out: folder for cards, parts, table.csv and accuracy.png.
        device: auto takes a GPU where there is one.
        threads: CPU threads of torch; null: its own choice. Where other programs use the same cores, 1 is several times faster.
        rank: of this process among those that share the work; null: the environment's RANK, or 0.
        world: how many processes share the work; null: the environment's WORLD_SIZE, or 1.
        keep_images: keep the adversarial images under OUT/parts.
        trained_on: of a suite: model's name in tables -> ids of the sets it was trained on, which (with their families) are not counted
            in the zero-shot means.
        defense: a test-time defence around every model: its id, or {name: ID, settings: {...}}; protocols are then oblivious,
            adaptive_small or adaptive.
        defenses: name in tables -> such a defence; every model is measured behind each.
    """

    data: LightningDataModule
    split: str = "test"
    task: Task | None = None
    label_spaces: dict[str, list[str] | None] = field(default_factory=lambda: {"all": None})
    protocols: list[str] = field(default_factory=lambda: ["pgd", "apgd"])
    corruptions: Corruptions = field(default_factory=Corruptions)
    eps: list[float | str] = field(default_factory=lambda: ["1/255", "2/255", "4/255"])
    norm: Norm = "linf"
    steps: int = 20
    targets: int = 3
    n: int | None = None
    largest_first: bool = False
    checks: int = 0
    batch_size: int | Literal["auto"] = 100
    seed: int = 0
    out: Path = Path("runs/eval")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    rank: int | None = None
    world: int | None = None
    keep_images: bool = False
    trained_on: dict[str, list[str]] = field(default_factory=dict)
    defense: DefenseSpec | str | None = None
    defenses: dict[str, DefenseSpec] | None = None

    def run(self, command: str, effective: str) -> list[Labelled]:
        """Measures what is missing, then shows, writes and returns the cards."""
        share, device = Share(self.out, self.place()), torch_device(self.device)
        use_threads(self.threads)
        work = [(subset, protocol) for subset in self.subsets() for protocol in self.plans(self.asked.choices(subset))]
        if self.largest_first:
            work.sort(key=lambda one: -(one[1].eps or 0))
        models = crossed(self.loaded(), self.protocols, self.defense, self.defenses)
        for label, model in models:
            others = [other for _, other in models if other is not model]
            larger, late = dict[tuple[str, str, str], Survivors](), set[tuple[str, str, str]]()
            for subset, protocol in work:
                key = (subset.name, subset.label_space, protocol.name)
                if key in late:
                    share.later()
                    continue
                before = larger.get(key)
                cell = cell_under(protocol, model.to(device), subset, self.asked, self.seed, before)
                made = self.measure(label, cell, share, command, others)
                if self.largest_first and made and protocol.attacks:
                    larger[key] = survivors_of(made[0][1], card_path(self.out, label, cell))
                elif self.largest_first and protocol.attacks:
                    late.add(key)
            model.cpu()
        if share.place.rank == 0:
            write_whole(self.out / "config.yaml", effective.encode())
        if cards := share.to_show():
            self.finish(cards)
        else:
            share.say("its share is done; the table comes from the rank that ends last (if one was stopped, or a protocol for defences "
                      "still has its second round before it, or largest_first its smaller radii: the same command goes on).")
        return cards

    def place(self) -> Place:
        """This process among those that share the work."""
        around = Place.of_environment()
        return Place(around.rank if self.rank is None else self.rank, around.world if self.world is None else self.world)

    @property
    def asked(self) -> Task:
        """The task."""
        return self.task or Classification()

    def subsets(self) -> list[EvaluationSet]:
        """The images of each label space, of each set of a suite.

        Raises:
            ConfigError: the datamodule offers no evaluation set, or there is no label space.
            DataError: unknown classes, or fewer images than asked for.
        """
        offer = getattr(self.data, "evaluation_set", None)
        if offer is None and not isinstance(self.data, SuiteData):
            raise ConfigError(f"{type(self.data).__name__} has no evaluation_set(split): give a datamodule of datamodules, such as Sample.")
        if not self.label_spaces or (self.batch_size != "auto" and self.batch_size < 1) or self.checks < 0:
            raise ConfigError(
                f"label_spaces = {self.label_spaces}, batch_size = {self.batch_size}, checks = {self.checks}: give at least one label "
                "space and one image a batch, and checks of 0 or more."
            )
        if isinstance(self.data, SuiteData):
            zero_shot.check_trained(self.trained_on, self.data.families)
            return first_of_each(self.data.evaluation_sets(self.split), self.n, self.label_spaces)
        whole = offer(self.split)
        return [first(whole, self.n, classes, name) for name, classes in self.label_spaces.items()]

    def plans(self, classes: int) -> Iterator[Protocol]:
        """Every protocol at every radius; the clean one once."""
        if not self.protocols:
            raise ConfigError("protocols is empty: give one or more, such as clean or apgd.")
        asked = dict.fromkeys(pixel_fraction(eps) for eps in self.eps)
        if len(asked) < len(self.eps):
            print(f"eps = {self.eps} names a radius more than once: it is measured once.")
        for name in dict.fromkeys(self.protocols):
            radii = [0.0] if name in WITHOUT_ATTACK or name in PUBLISHED else list(asked)
            if not radii:
                raise ConfigError(f"protocol {name} needs eps: give one radius or more, such as 2/255.")
            for eps in radii:
                yield plan(name, eps=eps, steps=self.steps, targets=self.targets, classes=classes, norm=self.norm,
                           corruptions=self.corruptions)

    def loaded(self) -> list[tuple[str, ZeroShotModel]]:
        """All models, each with its name in tables; before anything is measured, so that a missing file is known at once."""
        raise NotImplementedError

    def measure(self, label: str, cell: Cell, share: Share, command: str, others: list[ZeroShotModel]) -> list[Labelled]:
        """One cell: its card, or nothing while other processes still work on it."""
        name = f"{label}, {cell.data.name} {cell.data.label_space}, {cell.protocol.name}"
        name += "" if cell.protocol.eps is None else f" {radius_text(str(cell.protocol.norm), cell.protocol.eps)}"
        begin = time.perf_counter()
        share.begin(label, cell)
        card = evaluate(cell, self.out, label, batch_size=images_at_once(self.batch_size, cell), place=share.place,
                        keep_images=self.keep_images, command=command, checks=self.checks, siblings=others,
                        log=now_and_then(lambda text: share.say(f"  {text}")))  # fmt: skip
        outcome = f"n = {len(cell.data)}, {time.perf_counter() - begin:.1f} s" if card else "waits for other ranks"
        share.say(f"{name}: {outcome}")
        for check, text in (card["metrics"].get("checks", {}).get("failed", {}) if card else {}).items():
            share.say(f"  suspect, {check}: {text}")
        return [(label, card)] if card else []

    def finish(self, cards: list[Labelled]) -> None:
        """The table and where everything is; one process speaks for all."""
        folder = self.out / "cards"
        publish(cards, self.out)
        if isinstance(self.data, SuiteData):
            zero_shot.conclude(as_shown(cards), self.data, self.trained_on, self.label_spaces, self.n, self.out)
        print(f"cards: {folder}    show them again: python eval.py report --cards {shlex.quote(str(folder))}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Measurement):
    """Every model on every label space under every protocol at every radius. What is finished is not measured again.

    Args:
        models: name in tables -> which CLIP; none: the embedded MiniCLIP-32.
        model: one model in place of ``models``: NAME/TAG of open_clip (ViT-B-32/openai), NAME alone where it is embedded,
            hf-hub:OWNER/MODEL, or the path of a checkpoint or of a folder of the hub.
        weights: a checkpoint of ours to measure in place of ``models``; its name in tables is its model and method.

    For the other arguments see :class:`Measurement`.
    """

    models: dict[str, ModelSpec] | None = None
    model: str | None = None
    weights: str | None = None

    def loaded(self) -> list[tuple[str, ZeroShotModel]]:
        """That of ``weights`` or of ``model``, or those of ``models``.

        Raises:
            ConfigError: both of the first two.
        """
        if self.model is not None and self.weights is not None:
            raise ConfigError(f"model = {self.model} and weights = {self.weights} each say what to measure: give one of them.")
        if self.model is not None:
            return [(self.model.strip("/").rpartition("/")[2] if Path(self.model).exists() else self.model, load_model(named(self.model)))]
        if self.weights is not None:
            model = load_model(ModelSpec(pretrained=self.weights))
            return [(f"{model.record.name}-{model.record.method}", model)]
        return [(label, load_model(spec)) for label, spec in (self.models or {"miniclip32": ModelSpec()}).items()]


@dataclass(frozen=True, kw_only=True)
class Curve(Measurement):
    """The way from the original weights to robust ones: ``theta = (1 - a) theta_0 + a theta_robust``, clean and robust accuracy at each a.

    Args:
        base: the original model.
        robust: what was fine-tuned from it.
        shares: the values of a.

    For the other arguments see :class:`Measurement`.
    """

    robust: ModelSpec
    base: ModelSpec = field(default_factory=ModelSpec)
    shares: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])

    def loaded(self) -> list[tuple[str, ZeroShotModel]]:
        """One model a share.

        Raises:
            ConfigError: no shares.
        """
        if not self.shares:
            raise ConfigError("shares is empty: give one or more, such as [0, 0.5, 1].")
        base, robust = load_model(self.base), load_model(self.robust)
        return [(f"a={share:g}", interpolate(base, robust, share)) for share in self.shares]

    def finish(self, cards: list[Labelled]) -> None:
        """Also draws robust against clean accuracy."""
        if drawn := picture(cards, self.out / "curve.png", draw_curve):
            print(f"curve: {drawn}")
        super().finish(cards)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Shows cards again: a table, report.html (one file that needs nothing else), report.md, table.csv and accuracy.png.

    Args:
        cards: folder, or list of folders, to look for cards in; ``eval.py report FOLDER ...`` gives them too.
        out: folder for the files; null: the first folder of ``cards``, or the one above it where it is called ``cards``.
        against: folder, or list of folders, of another report: each figure of both is better, worse, or within the error.
        examples: weights or names of models to show a short attack on, with the embedded sample; none: images that keep_images kept.
        not_zero_shot: data sets that models were trained on: they and their families are left out of the means over sets, as is what
            embedded weights have seen.
        robustbench: folder for one JSON file a model and radius, in the form of RobustBench's model entries; null: none.
    """

    cards: Path | list[Path] = Path("runs/eval/cards")
    out: Path | None = None
    against: Path | list[Path] | None = None
    examples: list[str] = field(default_factory=list)
    not_zero_shot: list[str] = field(default_factory=list)
    robustbench: Path | None = None

    def run(self, command: str, effective: str) -> list[Labelled]:
        """Reads, shows and returns the cards."""
        folders = self.cards if isinstance(self.cards, list) else [self.cards]
        others = [] if self.against is None else self.against if isinstance(self.against, list) else [self.against]
        found = collect(folders)
        comparison = compare(found, collect(others)) if others else None
        models = [(Path(name).stem if Path(name).exists() else name, load_model(named(name))) for name in self.examples]
        examples = attacked(models, Sample().evaluation_set("test")) if models else kept(found)
        content = Content(found, self.not_zero_shot, comparison, ", ".join(map(str, others)), examples, ZeroShotSuite().families)
        again(content, self.out or (folders[0] if folders[0].is_dir() and folders[0].name != "cards" else folders[0].parent))
        if self.robustbench is not None:
            print(f"robustbench: {len(robustbench.export(found.labelled, self.robustbench))} files below {self.robustbench}")
        return found.labelled


@dataclass(frozen=True, kw_only=True)
class External:
    """Notes on a card what somebody else's attack left of its images; tables then show that number, marked, and the source.

    Args:
        card: the card's file.
        robust_accuracy: share in [0, 1] of the card's images that is still right; lower than the card's.
        source: who attacked, and how.
    """

    card: Path
    robust_accuracy: float
    source: str

    def run(self, command: str, effective: str) -> list[Labelled]:
        """Writes the card anew, and shows it."""
        told = with_external(read(self.card), self.robust_accuracy, self.source)
        write(self.card, told)
        found = [(self.card.parent.name, told)]
        report.show(as_shown(found))
        return found


Command = Evaluate | Curve | Report | External
COMMANDS: dict[str, type[Command]] = {"evaluate": Evaluate, "curve": Curve, "report": Report, "external": External}


def main(args: list[str] | None = None) -> list[Labelled]:
    """Runs one command and returns the cards that it made or read, each with the label of its model.

    Raises:
        AftError: whatever a user can mend.
    """
    words = list(sys.argv[1:] if args is None else args)
    command = f"python eval.py {shlex.join(words)}".strip()
    name = words.pop(0) if words and not words[0].startswith("-") else "evaluate"
    if name not in COMMANDS:
        raise ConfigError(unknown_name("command", name, COMMANDS))
    parser = parser_of(f"eval.py {name}", COMMANDS[name])
    if folders := list(takewhile(lambda word: name == "report" and not word.startswith("-"), words)):
        words = ["--cards", json.dumps(folders), *words[len(folders) :]]
    try:
        settings = parser.parse_args(words)
    except ArgumentError as error:
        raise refusal(error, parser) from error
    settings.pop("config", None)
    effective = parser.dump(settings, skip_unset=False)
    if name not in ("report", "external") and Place.of_environment().rank == 0:
        print(in_short(effective, parser.dump(parser.get_defaults(), skip_unset=False, skip_validation=True)), flush=True)
    use_onednn()
    try:
        made: Command = COMMANDS[name](**vars(parser.instantiate(settings)))
    except ValueError as error:
        raise underlying(error) from error
    return made.run(command, effective)


def shell() -> int:
    """``main`` as a command: errors are one line, and the exit status says what happened (0, 2 error, 130 stopped)."""
    try:
        main()
    except AftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: all finished parts are kept; the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(shell())
