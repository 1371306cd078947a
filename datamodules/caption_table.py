"""A table of captions from labelled images, to try retrieval with: every image gets its class name in a template.

    python -m datamodules.caption_table data/tiny-imagenet-32/val.zip data/captions/tiny_imagenet32_val.csv

Such captions name the class and say nothing else: all images of a class have one caption (which counts as true of each of them), and
image-to-text recall at 1 is zero-shot classification by that template. They test the machinery; they are no caption data set.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

from aft.clip.prompts import DEFAULT_TEMPLATES, fill_templates
from aft.errors import AftError
from datamodules.folder import ImageFolder


def write_table(source: str, target: Path, classes: str | None = "auto", template: str = DEFAULT_TEMPLATES[0]) -> int:
    """Writes a csv with the columns ``image`` (the path in the source) and ``caption``.

    Args:
        source: folder or zip of ``CLASS/image``; give the same as ``images`` to ``datamodules.Captions``.
        target: the csv.
        classes: file with the class names; ``auto``: ``classes.json`` beside the source, else the folders' names.
        template: with one ``{}`` for the class name.

    Returns:
        Number of images.

    Raises:
        DataError: the source is unusable.
        ConfigError: the template has not one place for the name.
    """
    data = ImageFolder(source, classes=classes)
    texts = [text for (text,) in fill_templates([phrases[0] for phrases in data.all_classes()], [template])]
    listing = data.listing("train")
    members = getattr(listing.source, "members")  # noqa: B009  (of folders and zips alike)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("image", "caption"))
    writer.writerows((member, texts[label]) for member, label in zip(members, listing.labels_M.tolist(), strict=True))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(buffer.getvalue(), encoding="utf-8")
    return len(members)


def main(words: list[str] | None = None) -> int:
    """The command; the exit status is 0, or 2 for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.caption_table", description="Captions that name the class alone.")
    parser.add_argument("source", help="folder or zip of CLASS/image")
    parser.add_argument("target", type=Path, help="csv to write")
    parser.add_argument("--classes", default="auto", help="file with the class names (auto: classes.json beside the source)")
    parser.add_argument("--template", default=DEFAULT_TEMPLATES[0], help="one {} for the class name")
    given = parser.parse_args(words)
    try:
        count = write_table(given.source, given.target, given.classes, given.template)
    except AftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.target}: {count:,} images, each with its class name in {given.template!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
