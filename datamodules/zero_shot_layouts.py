"""Where a zero-shot set lies and how it is read: class folders (or a zip), torchvision's own layout, or WebDataset shards.

Shapes: M images of a set, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aft.errors import DataError
from datamodules import class_names
from datamodules import manifest as manifests
from datamodules.folder import class_folder, folders_of, some
from datamodules.manifest import FILE, Location, Manifest, Shard
from datamodules.shard_reader import ShardIndex, scan
from datamodules.sources import Source, open_source
from datamodules.torchvision_sets import TorchvisionSource, construct
from datamodules.zero_shot_table import ZeroShotSet

COUNT, NAMES, TEST = "nshards.txt", "classnames.txt", "test"  # of CLIP_benchmark's shards
SHOWN = 6  # entries of a folder that a message lists


@dataclass(frozen=True)
class Opened:
    """The images of a set, still encoded.

    Args:
        source: the files.
        labels: of each file, a place in ``names``; M of them.
        names: of the K classes.
        where: the path that was read, for messages.
        whole: all images of a set without a test split; false: somebody's test split of it.
        index: stable numbers of the files; none: their places.
        remarks: what was decided in reading it.
    """

    source: Source
    labels: list[int]
    names: tuple[str, ...]
    where: Path
    whole: bool = True
    index: list[int] | None = None
    remarks: tuple[str, ...] = field(default=())


def bases(root: Path) -> tuple[Path, Path]:
    """Where torchvision's folders may lie: in the root, and in ``torchvision`` below it, where sets are fetched to."""
    return root, root / "torchvision"


def class_folders(record: ZeroShotSet, root: Path) -> list[Path]:
    """Paths of class folders that are there; those that the set itself comes with stand first."""
    known = [base / path for path in record.folders for base in bases(root)]
    return [path for path in dict.fromkeys([*known, root / record.id / f"{TEST}.zip", root / record.id / TEST]) if path.exists()]


def in_torchvision(record: ZeroShotSet, root: Path) -> list[Path]:
    """The folders that torchvision would read, of those that are there."""
    known = record.torchvision
    return [base / known.marker for base in bases(root) if (base / known.marker).exists()] if known and known.read else []


def shards(record: ZeroShotSet, root: Path) -> list[Path]:
    """Folders in CLIP_benchmark's layout that are there."""
    names = dict.fromkeys((record.id, *record.wds))
    return [path for name in names for path in (root / "wds" / name, root / f"wds_{name}") if path.exists()]


def beginnings(record: ZeroShotSet, root: Path) -> list[Path]:
    """Folders of the set that are there, whatever is in them: where none of the layouts is found, this is what is found instead."""
    marker = [record.torchvision.marker] if record.torchvision else []
    tops = dict.fromkeys([record.id, *marker, *(path.split("/")[0] for path in record.folders)])
    return [base / top for top in tops for base in bases(root) if (base / top).exists()]


def open_set(record: ZeroShotSet, root: Path) -> Opened | None:
    """The set, from the first place where it is: class folders, then torchvision's layout, then shards.

    Returns:
        The set; none where nothing of it is there.

    Raises:
        DataError: something is there that cannot be read as this set; what was found and what is expected.
    """
    kinds = {open_folder: class_folders(record, root), open_torchvision: in_torchvision(record, root), open_wds: shards(record, root)}
    found = [(read, path) for read, paths in kinds.items() for path in paths]
    try:
        if not found:
            if begun := beginnings(record, root):
                raise DataError(f"{begun[0]} is not laid out as this set")
            return None
        read, path = found[0]
        opened = read(record, path, root)
        check_classes(record, opened)
    except DataError as error:
        at = found[0][1] if found else beginnings(record, root)[0]
        raise DataError(f"{record.id}: {str(error).rstrip('.')}. Found {inside(at)}. Expected below {root}: {expected(record)}.") from error
    others = ", ".join(str(path) for _, path in found[1:])
    return replace(opened, remarks=(*opened.remarks, f"not read: {others}")) if others else opened


def usual(name: str) -> str:
    """The layouts in which any set is read."""
    return f"{name}/{TEST}/CLASS/image (or {name}/{TEST}.zip of it), or CLIP_benchmark's shards as wds/{name}"


def expected(record: ZeroShotSet) -> str:
    """The layouts in which a set is read, the set's own first."""
    return f"{record.layout}, or {usual(record.id)}"


def inside(path: Path) -> str:
    """What lies at a path, for a message."""
    if not path.is_dir():
        return f"the file {path}"
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    listed = ", ".join(entries[:SHOWN]) + (f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else "")
    return f"in {path}: {listed or 'nothing'}"


def check_classes(record: ZeroShotSet, opened: Opened) -> None:
    """Compares what was read with the table.

    Raises:
        DataError: another number of classes, or labels outside of them.
    """
    if len(opened.names) != record.classes:
        raise DataError(f"{opened.where} has {len(opened.names)} classes where {record.title} has {record.classes}")
    if outside := sorted({label for label in opened.labels if not 0 <= label < record.classes}):
        raise DataError(f"{opened.where} has the labels {outside[:5]}, outside of its {record.classes} classes")


def open_folder(record: ZeroShotSet, path: Path, root: Path) -> Opened:
    """A set of class folders, or shards that lie in their place (with either kind of list beside them).

    Raises:
        DataError: nothing usable is there, or folders and class names disagree.
    """
    if (path / COUNT).is_file():
        return open_wds(record, path.parent, root)
    if (path / FILE).is_file():
        return open_manifest(path)
    source, own = open_source(path), any(path == base / known for known in record.folders for base in bases(root))
    kept = [member for member in source.members if class_folder(member) not in record.exclude]
    source.members = tuple(member for member in kept if not own or member.count("/") == 1)  # further down lie leftovers (Caltech-256)
    folders = folders_of(source)
    order, names = names_of_folders(record, path, folders, own)
    place = {folder: label for label, folder in enumerate(order)}
    return Opened(source, [place[class_folder(member)] for member in source.members], names, path, own)


def names_of_folders(record: ZeroShotSet, path: Path, folders: Sequence[str], own: bool) -> tuple[Sequence[str], tuple[str, ...]]:
    """The folders in label order, and their class names: from ``classes.json`` beside them, the table, or the folders' own names.

    Args:
        record: of the set.
        path: that holds the folders.
        folders: sorted.
        own: they are the set's own folders; only of those a list of names without folders knows the order.

    Raises:
        DataError: the names are of other folders, or of another number.
    """
    beside, given = path.parent / "classes.json", record.given_names
    if beside.is_file():
        return folders, tuple(phrases[0] for phrases in class_names.read(beside, folders))
    if isinstance(given, dict):
        if set(given) != set(folders):
            raise DataError(f"the class folders of {path} are not those of {record.title}: missing {some(set(given) - set(folders))}; "
                            f"unknown {some(set(folders) - set(given))}. Name other folders in a classes.json beside it")
        return tuple(given), tuple(given.values())
    if own and given is not None:
        if len(given) != len(folders):
            raise DataError(f"{path} has {len(folders)} class folders where {record.title} has {len(given)}")
        return folders, tuple(given)
    bare = (re.sub(record.rename, "", folder) if record.rename else folder for folder in folders)
    return folders, tuple(class_names.from_folder(folder)[0] for folder in bare)


def open_torchvision(record: ZeroShotSet, path: Path, root: Path) -> Opened:
    """A set in torchvision's layout.

    Raises:
        DataError: torchvision cannot read it.
    """
    known = record.torchvision
    assert known is not None
    images = construct(known.kind, str(path.parent), **known.settings)
    source = TorchvisionSource(images, f"{record.title} {record.split}")
    names = record.given_names or getattr(images, "classes", None)
    if not names:
        raise DataError(f"{path} holds no class names")
    return Opened(source, source.labels, tuple(class_names.clean(str(name).replace("_", " ").replace("/", " ")) for name in names), path)


def open_wds(record: ZeroShotSet, path: Path, root: Path) -> Opened:
    """Shards in CLIP_benchmark's layout. Labels mean the names in ``classnames.txt``, so these count, not the table's.

    Raises:
        DataError: a file is missing, or a label is outside the names.
    """
    folder = path / TEST
    try:
        count = int((folder / COUNT).read_text(encoding="utf-8"))
        lines = (path / NAMES).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not laid out as CLIP_benchmark's shards ({error}): they are {NAMES} and "
                        f"{TEST}/{{{COUNT}, 0.tar ...}}") from error
    names = tuple(class_names.clean(line.replace("_", " ")) for line in lines if line.strip())
    tars = [folder / f"{number}.tar" for number in range(count)]
    if missing := [tar.name for tar in tars if not tar.is_file()]:
        raise DataError(f"{folder / COUNT} says {count} shards; missing: {', '.join(missing[:5])}")
    listed = tuple(Shard(tar.name, len(scan(tar)), tar.stat().st_size, "") for tar in tars)
    opened = of_shards(folder, Manifest("class", listed, tuple((name,) for name in names)), record.exclude)
    return replace(opened, where=path, remarks=(*opened.remarks, *differences(record, opened.names)))


def open_manifest(folder: Path) -> Opened:
    """Shards that ``python -m datamodules.convert`` wrote.

    Raises:
        DataError: the manifest is wrong, or they hold captions.
    """
    location = Location(str(folder))
    held = manifests.read(location)
    manifests.check(held, location, "size")
    if held.classes is None:
        raise DataError(f"{folder} holds captions")
    return of_shards(folder, held)


def of_shards(folder: Path, held: Manifest, exclude: Sequence[str] = ()) -> Opened:
    """What shards hold, by their manifest, without the samples of classes that are none."""
    index, names = ShardIndex(Location(str(folder)), held), [phrases[0] for phrases in held.classes or ()]
    labels, kept = index.labels(), [name for name in names if name not in exclude]
    stays = [names[label] in kept for label in labels]
    index.members = [member for member, stay in zip(index.members, stays, strict=True) if stay]
    place = {label: kept.index(name) for label, name in enumerate(names) if name in kept}
    out = len(stays) - sum(stays)
    remarks = (f"left out as no class: {', '.join(name for name in names if name in exclude)}, {out:,} images",) if out else ()
    new = [place[label] for label, stay in zip(labels, stays, strict=True) if stay]
    return Opened(index, new, tuple(kept), folder, False, index.indices(), remarks)


def differences(record: ZeroShotSet, names: Sequence[str]) -> tuple[str, ...]:
    """A remark where shards name their classes otherwise than the table does."""
    given = record.given_names
    ours = tuple(given.values()) if isinstance(given, dict) else given or ()
    other = [(theirs, mine) for theirs, mine in zip(names, ours, strict=False) if theirs.lower() != mine.lower()]
    if not other:
        return ()
    return (f"{len(other)} of {len(names)} class names are its own, such as {other[0][0]!r} for {other[0][1]!r}",)
