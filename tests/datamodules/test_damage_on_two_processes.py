"""Damaged data on two processes: counted and skipped, or a clear error that ends both, and never a hang."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.datamodules.test_shards import bomb, cut, jpeg
from tests.integration.test_two_processes import start

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def outcome(tmp_path: Path, tiny_folder: Path) -> Callable[..., tuple[int, str]]:
    """Trains an epoch on two processes, which must end within a minute; exit code and output."""
    shutil.copytree(tiny_folder, tmp_path / "tiny")

    def run(**settings: Any) -> tuple[int, str]:
        process = start("damaged", 2, tmp_path, **settings)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, output

    return run


@pytest.fixture
def spoiled_folder(make_folder: Callable[..., Path]) -> Path:
    """Twenty-four images, one of them a truncated JPEG and one that announces 20,000 x 20,000 pixels."""
    folder = make_folder(("cat", "dog"), per_class=12)
    (folder / "cat" / "000.png").rename(folder / "cat" / "000.jpg")
    (folder / "cat" / "000.jpg").write_bytes(jpeg())
    (folder / "dog" / "003.png").write_bytes(bomb(20_000))
    return folder


def test_damaged_images_are_counted_on_both(outcome: Callable[..., tuple[int, str]], spoiled_folder: Path) -> None:
    code, output = outcome(kind="folder", train=str(spoiled_folder), image_size=32, max_bad_share=0.1)
    assert code == 0, output
    assert "2 of 24 images are damaged" in output and "cat/000.jpg" in output and "dog/003.png" in output


def test_too_many_damaged_images_end_both(outcome: Callable[..., tuple[int, str]], spoiled_folder: Path) -> None:
    code, output = outcome(kind="folder", train=str(spoiled_folder), image_size=32, max_bad_share=0.0)
    assert code != 0 and "2 of 24 images are damaged" in output and "mend the data, or raise max_bad_share" in output


def test_a_truncated_shard_is_counted_by_its_reader(outcome: Callable[..., tuple[int, str]], make_shards: Callable[..., Path]) -> None:
    folder = make_shards()
    cut(folder / "shard-00002.tar")
    code, output = outcome(kind="shards", train=str(folder), verify="none", max_bad_share=0.5, window=8)
    assert code == 0, output
    assert "the tar ends early" in output


def test_a_truncated_shard_of_one_ends_both(outcome: Callable[..., tuple[int, str]], make_shards: Callable[..., Path]) -> None:
    """One process alone meets it, in the middle of an epoch, while the other waits for its gradient."""
    folder = make_shards()
    cut(folder / "shard-00002.tar")
    code, output = outcome(kind="shards", train=str(folder), verify="none", max_bad_share=0.0, window=8)
    assert code != 0 and "shard-00002.tar/#" in output


def test_too_few_shards_end_both(outcome: Callable[..., tuple[int, str]], make_shards: Callable[..., Path]) -> None:
    code, output = outcome(kind="shards", train=str(make_shards((16,))))
    assert code != 0 and "1 shards are too few for 2 processes" in output, output
