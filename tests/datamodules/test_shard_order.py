"""An epoch over shards: split over ranks and workers without overlap, the same again, resumed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aft.errors import ConfigError, RunError
from datamodules import Shards
from datamodules.manifest import Location, read, stable_number
from datamodules.shard_order import ShardOrder
from datamodules.shard_reader import ShardIndex
from tests.datamodules.test_order import fit


def numbers(folder: Path) -> set[int]:
    """The stable numbers of all samples of a set."""
    return set(ShardIndex(Location(str(folder)), read(Location(str(folder)))).indices())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("counts", [(8, 8, 8, 8), (3, 13, 5, 10)])
def test_ranks_and_workers_see_every_key_once(make_shards, as_rank, counts: tuple[int, ...], world: int, workers: int,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The union over ranks and workers of an epoch is the set, the parts are disjoint, every rank has as many whole batches.

    Where batches do not divide the samples (31 = 3 x 8 + 7), the remainder is missing and nothing comes twice. The environment of a
    launcher says something else and is not asked.
    """
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = make_shards(counts)
    ranks = []
    for rank in range(world):
        loader = as_rank(Shards(str(folder), batch_size=8 // world, window=8, num_workers=workers), rank, world).train_dataloader()
        ranks.append([batch.index.tolist() for batch in loader])
    assert [[len(batch) for batch in batches] for batches in ranks] == [[8 // world] * (sum(counts) // 8)] * world
    seen = [number for batches in ranks for batch in batches for number in batch]
    assert len(set(seen)) == len(seen) == sum(counts) // 8 * 8
    assert set(seen) <= numbers(folder) and (sum(counts) % 8 or set(seen) == numbers(folder))


def test_a_sample_is_its_own_pixels_label_and_number(make_shards) -> None:
    """What comes out of the stream is what the index reads by place."""
    folder = make_shards()
    data = Shards(str(folder), batch_size=4, augment="none")
    whole = data.evaluation_set("train")
    place = {number: row for row, number in enumerate(whole.index_N.tolist())}
    assert set(place) == {stable_number(f"shard-{number // 8:05d}.tar", f"{number:03d}") for number in range(32)}
    for batch in data.train_dataloader():
        expected = whole.batch([place[number] for number in batch.index.tolist()])
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.labels, expected.labels)


def test_epochs_differ_and_repeat(make_shards) -> None:
    """The order is a function of seed and epoch: of the shards, and within the window."""
    folder = str(make_shards())

    def run(seed: int, epoch: int) -> list[int]:
        loader = Shards(folder, batch_size=4, window=8, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [number for batch in loader for number in batch.index.tolist()]

    assert run(0, 1) == run(0, 1)
    assert len({tuple(run(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    orders = [list(ShardOrder([8] * 4, 4, 0).pieces(epoch, 0)) for epoch in range(2)]
    assert orders[0] != orders[1] and sorted(piece.shard for piece in orders[0]) == [0, 1, 2, 3]


def test_windows_mix_shards(make_shards) -> None:
    """A window of 16 holds two shards of 8; a batch of it has samples of both, a window of a batch has not."""
    def shards_in_first_batch(window: int) -> int:
        order = ShardOrder([8] * 4, 8, 0, window=window)
        line = [piece.shard for piece in order.pieces(0, 0) for _ in range(piece.last - piece.first)]
        return len({line[place] for place in order.shuffled(0, 0, 0, window)[:8]})

    assert shards_in_first_batch(16) == 2 and shards_in_first_batch(8) == 1


def test_a_worker_reads_its_shards_alone() -> None:
    """With as many equal shards as readers, no shard is read by two."""
    read_by = [[piece.shard for piece in ShardOrder([8] * 4, 4, 0, rank, 2, workers=2).pieces(0, lane)]
               for rank in range(2) for lane in range(2)]
    assert sorted(shard for shards in read_by for shard in shards) == [0, 1, 2, 3]


def test_too_few_shards_say_so(make_shards, as_rank) -> None:
    """Where webdataset leaves a reader without samples, and a job hanging."""
    data = as_rank(Shards(str(make_shards((16, 16, 16))), batch_size=4, num_workers=2), 0, 2)
    with pytest.raises(ConfigError, match="3 shards are too few for 2 processes with num_workers = 2: each of the 4 readers"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="needs 64 training images, but there are 48"):
        as_rank(Shards(str(data.locations["train"].path), batch_size=32), 0, 2).train_dataloader()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_twice_in_an_epoch(make_shards, tmp_path: Path, workers: int) -> None:
    """From any step, in the middle or at the end of an epoch, the rest is what the whole run saw; each key once an epoch."""
    folder = str(make_shards((7, 9, 6, 10)))

    def data() -> Shards:
        return Shards(folder, batch_size=4, augment="crop_flip", padding=2, window=8, num_workers=workers)

    whole = fit(data(), tmp_path / "whole", 2)
    assert len(whole.seen) == 16
    for epoch in range(2):
        seen = [number for at, _, index, _ in whole.seen if at == epoch for number in index]
        assert len(set(seen)) == len(seen) == 32
    rest = fit(data(), tmp_path / "rest", 2, tmp_path / "whole" / "step=3.ckpt")
    assert rest.seen == whole.seen[3:]
    twice = fit(data(), tmp_path / "twice", 2, tmp_path / "rest" / "step=6.ckpt")
    assert twice.seen == whole.seen[6:]
    assert fit(data(), tmp_path / "end", 2, tmp_path / "whole" / "step=8.ckpt").seen == whole.seen[8:]


@pytest.mark.parametrize("change", [{"num_workers": 2}, {"window": 4}, {"batch_size": 8}, {"seed": 1}])
def test_resume_in_mid_epoch_under_another_split_is_refused(make_shards, change: dict[str, int]) -> None:
    """The order depends on who reads what: another number of readers would repeat some samples and lose others."""
    folder = str(make_shards())
    settings = {"batch_size": 4, "window": 8}
    loader = Shards(folder, **settings).train_dataloader()
    next(iter(loader))
    other = Shards(folder, **(settings | change)).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(RunError, match="middle of an epoch"):
        next(iter(other))
