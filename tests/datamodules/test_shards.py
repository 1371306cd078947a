"""Shards that are damaged, contradict their manifest, or would run code; validation, captions, remote reading."""

from __future__ import annotations

import functools
import http.server
import io
import json
import pickle
import struct
import threading
import zlib
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from aft.attacks import PGD
from aft.batch import ClassData
from aft.clip import ModelSpec
from aft.errors import ConfigError, DataError
from aft.methods import ContrastivePretraining, TeCoA
from datamodules import Shards
from datamodules.manifest import FILE, Location, stable_number
from datamodules.writer import write_tar
from tests.conftest import make_trainer
from tests.datamodules.conftest import png


def cut(shard: Path, share: float = 0.43) -> None:
    """Truncates a tar; with the default inside the fifth image of eight."""
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * share)])


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header announces ``side`` x ``side`` pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b""))


def jpeg() -> bytes:
    """A JPEG that ends early."""
    data = io.BytesIO()
    Image.open(io.BytesIO(png(0, 64))).save(data, "JPEG")
    return data.getvalue()[:-100]


@pytest.mark.parametrize(("bad", "reason"), [
    (jpeg(), "truncated"), (bomb(20_000), "400000000 pixels|20000 x 20000"), (bomb(100), "100 x 100 pixels are more than 4096"),
    (b"no image", "cannot identify"), (b"", "cannot identify")])
def test_damaged_images_are_counted_and_replaced(make_shards, bad: bytes, reason: str) -> None:
    """A line with name and reason, whole batches, all other samples in their places; the damaged one comes nowhere."""
    folder = make_shards(replace={"009.png": bad})
    loader = Shards(str(folder), batch_size=4, augment="none", max_bad_share=0.05, max_pixels=4096).train_dataloader()
    with pytest.warns(UserWarning, match=f"1 of its 32 samples of epoch 0 are damaged so far: shard-00001.tar/009 .*({reason})"):
        batches = list(loader)
    seen = [number for batch in batches for number in batch.index.tolist()]
    lost = stable_number("shard-00001.tar", "009")
    assert loader.skipped == loader.state_dict()["skipped"] == 1 and lost not in seen
    assert len(batches) == 8 and len(seen) == 32 and len(set(seen)) == 31


@pytest.mark.parametrize(("member", "text", "reason"), [("009.cls", b"7", "class 7 is outside"), ("009.cls", b"dog", "invalid literal")])
def test_damaged_labels_are_counted(make_shards, member: str, text: bytes, reason: str) -> None:
    """A class that does not exist is damage, not an index error in the loss."""
    loader = Shards(str(make_shards(replace={member: text})), batch_size=4, max_bad_share=0.05).train_dataloader()
    with pytest.warns(UserWarning, match=reason):
        assert len(list(loader)) == 8


def test_too_much_damage_stops(make_shards) -> None:
    """Above max_bad_share of the epoch, with the names; each epoch counts for itself."""
    folder = make_shards(replace={f"{number:03d}.png": b"" for number in (1, 9, 17)})
    with pytest.raises(DataError, match=r"3 of its 32 samples .* At most a share of 0.08 is skipped"), pytest.warns(UserWarning):
        list(Shards(str(folder), batch_size=4, max_bad_share=0.08).train_dataloader())
    loader = Shards(str(folder), batch_size=4, max_bad_share=0.1).train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        with pytest.warns(UserWarning):
            assert len(list(loader)) == 8
    assert loader.skipped == 3


@pytest.mark.filterwarnings("ignore")
def test_damage_is_counted_once_where_a_resume_lies_inside_a_replay(make_shards) -> None:
    """The batch is read again then, and its damaged sample is in the checkpoint's count already: two would be too many."""
    settings = {"train": str(make_shards(replace={"009.png": b""})), "batch_size": 4, "max_bad_share": 0.05, "replay": 2}
    loader, resumed = (Shards(**settings).train_dataloader() for _ in range(2))
    drawn = next(drawn for drawn, _ in enumerate(loader, 1) if loader.skipped)
    resumed.load_state_dict(loader.state_dict())
    assert drawn % 2 and len(list(resumed)) == 16 - drawn and resumed.skipped == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar_is_counted(make_shards, workers: int) -> None:
    """With verify: none the missing samples are damage; with the default the shard is refused before training."""
    folder = make_shards()
    cut(folder / "shard-00002.tar")
    with pytest.raises(DataError, match=r"1 of 4 shards in .* shard-00002.tar \(\d+ bytes, not \d+\)"):
        Shards(str(folder), batch_size=4).setup("fit")
    loader = Shards(str(folder), batch_size=4, verify="none", max_bad_share=0.5, window=8, num_workers=workers).train_dataloader()
    with pytest.warns(UserWarning, match="shard-00002.tar/#[0-9] .the tar ends early .ReadError"):
        batches = list(loader)
    assert [len(batch.index) for batch in batches] == [4] * 8 and loader.skipped == 4


def test_a_tar_of_nothing_leaves_every_step_whole(make_shards) -> None:
    """All samples of a batch missing, and of its window: an error that names them, no NaN and no endless loop."""
    folder = make_shards((8, 8))
    (folder / "shard-00001.tar").write_bytes(b"")
    settings = {"batch_size": 4, "verify": "none", "max_bad_share": 1.0}
    with pytest.warns(UserWarning, match="shard-00001.tar/#"):
        assert [len(batch.index) for batch in Shards(str(folder), window=16, **settings).train_dataloader()] == [4] * 4
    with pytest.raises(DataError, match="4 samples in a row are damaged"):
        list(Shards(str(folder), window=4, **settings).train_dataloader())


def edit(folder: Path, **changes: object) -> None:
    """Changes the manifest; ``shard_...`` of its first shard."""
    given = json.loads((folder / FILE).read_text())
    for key, value in changes.items():
        (given["shards"][0] if key.startswith("shard_") else given)[key.removeprefix("shard_")] = value
    (folder / FILE).write_text(json.dumps(given))


@pytest.mark.parametrize(("changes", "message"), [
    ({"schema": "x"}, "schema is 'x'"), ({"samples": 31}, "samples = 31, but its shards count 32"), ({"kind": "caption"}, "kind"),
    ({"shard_name": "../x.tar"}, "plain names"), ({"shard_name": "pipe:touch x.tar"}, "plain names"),
    ({"shard_name": "shard-00001.tar"}, "each once"), ({"classes": None}, "kind"), ({"shards": []}, "a sample or more"),
    ({"shard_bytes": 5}, r"shard-00000.tar \(\d+ bytes, not 5\)"), ({"shard_name": "absent.tar"}, r"absent.tar \(missing\)")])
def test_wrong_manifests_are_refused(make_shards, changes: dict[str, object], message: str) -> None:
    """What contradicts itself or its shards is named."""
    folder = make_shards()
    edit(folder, **changes)
    with pytest.raises(DataError, match=message):
        Shards(str(folder)).setup("fit")


def test_verify_sha256_reads_every_byte(make_shards) -> None:
    """A flipped byte of the same length passes the quick check, not the long one."""
    folder = make_shards()
    data = bytearray((folder / "shard-00003.tar").read_bytes())
    data[700] ^= 1
    (folder / "shard-00003.tar").write_bytes(data)
    Shards(str(folder)).setup("fit")
    with pytest.raises(DataError, match=r"shard-00003.tar \(another sha256\)"):
        Shards(str(folder), verify="sha256").setup("fit")


def test_counts_that_are_wrong_are_found_while_reading(make_shards) -> None:
    """More samples than the manifest says: refused, also by the index."""
    folder = make_shards()
    edit(folder, shard_samples=7, samples=31)
    data = Shards(str(folder), batch_size=1)
    with pytest.raises(DataError, match="shard-00000.tar has more than the 7 samples of its manifest"):
        list(data.train_dataloader())
    with pytest.raises(DataError, match="shard-00000.tar has 8 samples, its manifest says 7"):
        data.evaluation_set("train")
    (folder / FILE).unlink()
    with pytest.raises(DataError, match="is no manifest of shards"):
        Shards(str(folder)).setup("fit")


def test_pipes_need_leave(make_shards, tmp_path: Path) -> None:
    """A pipe: URL is a shell command."""
    folder = make_shards()
    for setting in ({"train": "pipe:cat x/{}"}, {"train": str(folder), "holdout": "pipe:cat"}, {"train": str(folder), "test": "pipe:cat"}):
        with pytest.raises(DataError, match="starts a shell command: set allow_pipe: true"):
            Shards(**setting)
    piped = Shards(f"pipe:cat {folder}/{{}}", allow_pipe=True, batch_size=4, augment="none")
    assert [b.index.tolist() for b in piped.train_dataloader()] == [b.index.tolist() for b in Shards(str(folder), batch_size=4)
                                                                    .train_dataloader()]


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


def test_no_pickle_is_opened(make_shards, tmp_path: Path) -> None:
    """Members of other endings are passed over: .pkl, .pth and .npy would run code in webdataset's own decoders."""
    folder, trap = make_shards(), pickle.dumps(Trap(tmp_path / "sprung"))
    members = [(f"{n:03d}.{ending}", data) for n in range(8)
               for ending, data in (("png", png(n)), ("cls", b"0"), ("pkl", trap), ("pth", trap), ("npy", trap), ("pyd", trap))]
    write_tar(folder / "shard-00000.tar", members)
    batches = list(Shards(str(folder), batch_size=4, verify="none").train_dataloader())
    assert len(batches) == 8 and not (tmp_path / "sprung").exists()


def test_validation_and_evaluation_are_exact(make_shards, as_rank) -> None:
    """Held-out shards: every image once over ranks, unpadded; the classes must be those of training."""
    train, held = make_shards(), make_shards((3, 2), name="held")
    data = Shards(str(train), holdout=str(held), test=str(held), batch_size=2, name="mine")
    data.setup("fit")
    assert isinstance(data, ClassData) and data.val_class_lists == ("holdout",)
    assert data.class_lists == {"train": ("cat", "dog"), "holdout": ("cat", "dog")} and data.class_phrases == (("cat",), ("dog", "hound"))
    ranks = [[batch.index.tolist() for batch in as_rank(Shards(str(train), holdout=str(held), batch_size=2), rank, 2).val_dataloader()[0]]
             for rank in range(2)]
    whole = data.evaluation_set("holdout").index_N.tolist()
    assert ranks == [[[whole[0], whole[2]], [whole[4]]], [[whole[1], whole[3]]]]
    found = data.evaluation_set("test")
    assert (found.name, found.split, len(found)) == ("mine", "test", 5) and found.labels_N.tolist() == [0, 1, 0, 1, 0]
    assert len(found.select(["dog"], "dogs")) == 2
    edit(held, classes=[["dog"], ["cat"]])
    with pytest.raises(DataError, match="other classes"):
        Shards(str(train), holdout=str(held)).setup("fit")
    with pytest.raises(DataError, match="has no test shards"):
        Shards(str(train)).evaluation_set("test")
    with pytest.raises(DataError, match="is not local"):
        data = Shards(f"pipe:cat {train}/{{}}", allow_pipe=True)
        data.evaluation_set("train")


def test_sizes_must_agree_or_be_made_to(make_shards) -> None:
    """As for folders."""
    folder = make_shards(replace={"003.png": png(0, 12)})
    with pytest.raises(DataError, match="set image_size"):
        list(Shards(str(folder), batch_size=32).train_dataloader())
    assert next(iter(Shards(str(folder), batch_size=32, image_size=6).train_dataloader())).images.shape == (32, 3, 6, 6)
    with pytest.raises(ConfigError, match="padding = 4 is not below"):
        Shards(str(folder), image_size=4, augment="crop_flip").train_dataloader()


@pytest.mark.parametrize("setting", [{"window": 0}, {"max_pixels": 0}, {"verify": "all"}, {"batch_size": 0}])
def test_settings_out_of_range_are_errors(setting: dict[str, object]) -> None:
    """Said when the datamodule is made."""
    with pytest.raises(ConfigError):
        Shards("x", **setting)


@pytest.mark.filterwarnings("ignore")
def test_methods_train_on_shards(make_shards, tmp_path: Path) -> None:
    """Pre-training learns from captions without any class; TeCoA refuses those and learns from classes."""
    pairs, classes = str(make_shards(kind="caption", name="pairs")), str(make_shards())
    data = Shards(pairs, batch_size=8, image_size=32)
    batch = next(iter(data.train_dataloader()))
    assert batch.labels is None and len(batch.captions) == 8 and data.class_lists == {"train": ()} and isinstance(data, ClassData)
    number = {stable_number(f"shard-{n // 8:05d}.tar", f"{n:03d}"): f"picture {n}" for n in range(32)}
    assert batch.captions == [number[index] for index in batch.index.tolist()]
    trainer = make_trainer(tmp_path, enable_checkpointing=True, max_steps=4)
    trainer.fit(ContrastivePretraining(ModelSpec("tiny", "random")), datamodule=Shards(pairs, holdout=classes, batch_size=8, image_size=32))
    assert trainer.global_step == 4 and "val/clean_accuracy" in trainer.callback_metrics
    attack = PGD(eps="4/255", step_size="4/255", steps=1)
    with pytest.raises(DataError, match="no labels"):
        make_trainer(tmp_path).fit(TeCoA(ModelSpec("tiny"), attack), datamodule=Shards(pairs, batch_size=8, image_size=32))
    trainer = make_trainer(tmp_path)
    trainer.fit(TeCoA(ModelSpec("tiny"), attack), datamodule=Shards(classes, batch_size=8, image_size=32))
    assert trainer.global_step == 2
    with pytest.raises(DataError, match="the holdout shards of .* hold captions: validation needs classes"):
        Shards(classes, holdout=pairs).evaluation_set("holdout")


def test_remote_shards_are_the_local_ones(make_shards) -> None:
    """Over http: the same batches, also by a forked reader; a shard that the server does not have is counted as damage."""
    folder = make_shards()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        local, remote = (list(Shards(path, batch_size=4, window=8).train_dataloader()) for path in (str(folder), url))
        for one, other in zip(local, remote, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        forked = list(Shards(url, batch_size=4, window=8, num_workers=1).train_dataloader())
        assert all(torch.equal(one.index, other.index) for one, other in zip(local, forked, strict=True))
        (folder / "shard-00001.tar").unlink()
        loader = Shards(url, batch_size=4, max_bad_share=0.3).train_dataloader()
        with pytest.warns(UserWarning, match="shard-00001.tar/#"):
            assert len(list(loader)) == 8 and loader.skipped == 8
        with pytest.raises(DataError, match="is no manifest"):
            Shards(f"{url}/nothing").setup("fit")
    finally:
        server.shutdown()
        server.server_close()


def test_locations() -> None:
    """Names go behind a folder or URL, or where {} stands."""
    assert Location("a/b").of("x.tar") == "a/b/x.tar" and Location("https://h/d/").of("x.tar") == "https://h/d/x.tar"
    assert Location("gs://b/{}?v=1").of("x.tar") == "gs://b/x.tar?v=1"


def _train(rank: int, folder: str) -> None:
    """One of two processes: a collective a step, as in training; once with room for damage, once without."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    for share in (0.5, 0.01):
        data = Shards(f"{folder}/shards", batch_size=4, verify="none", max_bad_share=share)
        data.trainer = type("Place", (), {"global_rank": rank, "world_size": 2})()
        seen = []
        for batch in data.train_dataloader():
            seen.append(batch.index)
            torch.distributed.all_reduce(batch.images.mean())
        torch.save(torch.stack(seen), f"{folder}/rank{rank}.pt")


@pytest.mark.timeout(300)  # most of it is the import of Lightning by both
def test_two_processes_with_bad_shards_end(make_shards, tmp_path: Path) -> None:
    """A truncated tar and a damaged image in the part of one rank: both make 4 whole steps; above the share the job ends with an error."""
    folder = make_shards(replace={"001.png": b""})
    cut(folder / "shard-00000.tar")
    with pytest.raises(mp.ProcessRaisedException, match="mend the shards|Connection closed|Connection reset"):
        mp.spawn(_train, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [seen.shape for seen in ranks] == [(4, 4), (4, 4)]
    assert not set(ranks[0].flatten().tolist()) & set(ranks[1].flatten().tolist())
