"""Images, trees and shards of strangers: decoded within bounds, or named as bad; nothing is started or waited for."""

import hashlib
import io
import json
import multiprocessing
import os
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data import shard_writer, tar_shards
from arsg_dist.imagenet.data.dali import EncodedSplit
from arsg_dist.imagenet.data.dataset import ImageSplit, open_splits, process_loader
from arsg_dist.imagenet.data.decoding import FORMATS, UNDECODABLE, decode
from arsg_dist.imagenet.data.folder import ImageTree
from arsg_dist.imagenet.data.sampler import SampleKey
from arsg_dist.imagenet.data.shard_writer import BAD_LIST, Shard, shard_command, write_shard
from arsg_dist.imagenet.data.tar_shards import RECORD, TarShards
from arsg_dist.safe_io.processes import safe_start
from tests.security.watch import nothing_happens


def encoded(kind: str, size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def jpeg_of_scans(more: int) -> bytes:
    """A progressive JPEG whose last scan is there `more` times again."""
    content = encoded("JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * more + content[-2:]


def tiff_of_large_tiles() -> bytes:
    """A TIFF of 4 × 4 pixels in a tile of 65,536 × 65,536."""
    pixels = zlib.compress(bytes(100))
    place = 8 + 2 + 10 * 12 + 4
    entries = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries += [(322, 4, 1, 65536), (323, 4, 1, 65536), (324, 4, 1, place), (325, 4, 1, len(pixels))]
    head = (
        b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    )
    return head + struct.pack("<I", 0) + pixels


def tiff_of_16_bits() -> bytes:
    pixels = bytes(4 * 4 * 6)
    place = 8 + 2 + 10 * 12 + 4
    entries = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, place), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [
        (273, 4, 1, place + 6),
        (277, 3, 1, 3),
        (278, 3, 1, 4),
        (279, 4, 1, len(pixels)),
        (284, 3, 1, 1),
    ]
    head = (
        b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    )
    return head + struct.pack("<I", 0) + struct.pack("<HHH", 16, 16, 16) + pixels


JPEG = encoded("JPEG")
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%BeginProlog\n%%EndProlog\n"
    b"(owned) (w) file closefile\n%%EOF\n"
)
KNOWN_NO_MORE = "not an image, or none of"
BAD = {
    "EPS": (EPS, KNOWN_NO_MORE),
    "WMF": (b"\xd7\xcd\xc6\x9a" + bytes(60), KNOWN_NO_MORE),
    "DDS header": (b"DDS " + struct.pack("<I", 124) + bytes(120), KNOWN_NO_MORE),
    "AVIF": (b"\0\0\0\x1cftypavif" + bytes(40), "AVIF, none of"),
    "PCX": (encoded("PCX"), KNOWN_NO_MORE),
    "PDF": (b"%PDF-1.4\n" + bytes(60), KNOWN_NO_MORE),
    "text": (b"no image", KNOWN_NO_MORE),
    "nothing": (b"", "empty file"),
    "HTML": (b"\xef\xbb\xbf\n<!DOCTYPE html><title>404</title>", "HTML, not an image"),
    "HTML in capitals": (b"<HTML><BODY>no such photo", "HTML, not an image"),
    "16 bits RGB": (png(2, 2, bits=16, rows=(b"\0" + b"\xaa\x55" * 6) * 2), "more than 8 bits"),
    "16 bits RGBA": (png(2, 2, bits=16, colour=6, rows=(b"\0" + b"\xaa\x55" * 8) * 2), "more than 8 bits"),
    "16 bits grey": (png(2, 2, bits=16, colour=0, rows=(b"\0" + b"\xaa\x55" * 2) * 2), "more than 8 bits"),
    "16 bits TIFF": (tiff_of_16_bits(), "more than 8 bits"),
    "16 bits PPM": (b"P6 2 2 65535\n" + bytes(24), "more than 8 bits"),
    "bomb": (png(13_370, 13_370), "13370 × 13370 pixels are more than data.max_image_pixels, 64,000,000"),
    "larger bomb": (png(2**31 - 1, 2**31 - 1), "exceeds limit"),
    "a large tile": (tiff_of_large_tiles(), "65536 × 65536 pixels are more than data.max_image_pixels"),
    "many scans": (jpeg_of_scans(1000), "a JPEG of 1,010 scans"),
    "cut off": (JPEG[:-200], ""),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_usable_image_is_a_bad_image(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches formats that start programs, errors of decoders that end a run, pixels clipped without a word, memory
    taken before the size is looked at, and messages that do not say what the file is."""
    content, message = BAD[case]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with nothing_happens(), pytest.raises(ValueError) as found:
        decode(content)
    assert message in str(found.value)
    assert str(found.value)
    assert "BytesIO" not in str(found.value)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_of_image_data_are_decoded(kind: str) -> None:
    """Catches a format that data has and that is refused."""
    image = decode(encoded(kind))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 40)).max() < 12


def test_the_number_of_pixels_is_read_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a limit that is looked at when the memory is taken already, and one that cannot be set."""
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
        for kind in FORMATS:
            with pytest.raises(
                ValueError, match=r"80 × 60 pixels are more than data\.max_image_pixels, 4,799"
            ):
                decode(encoded(kind, (80, 60)), max_pixels=4799)
    assert decode(encoded("PNG", (80, 60)), max_pixels=4800).size == (80, 60)
    assert decode(jpeg_of_scans(20)).size == (8, 6)
    for pixels in (0, 178_956_971):
        with pytest.raises(ValueError, match=r"data\.max_image_pixels must be 1 to 178956970"):
            DataConfig(max_image_pixels=pixels)
    with pytest.raises(ValueError, match=r"data\.max_image_bytes must be at least 1"):
        DataConfig(max_image_bytes=0)


def test_damaged_images_raise_nothing_else() -> None:
    """Catches a decoder's IndexError, struct.error or AssertionError, which would end a run that skips bad images."""
    chance = random.Random(0)
    whole = [encoded(kind) for kind in FORMATS]
    whole += [encoded("AVIF"), encoded("TIFF", compression="tiff_lzw"), encoded("PNG", optimize=True)]
    with nothing_happens():
        for _ in range(600):
            content = bytearray(chance.choice(whole))
            for _ in range(chance.randint(1, 6)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            if chance.random() < 0.3:
                del content[chance.randrange(len(content)) :]
            try:
                assert decode(bytes(content), max_pixels=10_000).mode == "RGB"
            except UNDECODABLE as error:
                assert str(error)  # noqa: PT017


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of three images, in both splits."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.jpg").write_bytes(JPEG)
    return tmp_path / "tree"


def hostile_files(folder: Path) -> dict[str, str]:
    """Put what is no image file into a class; file name → reason."""
    os.mkfifo(folder / "fifo.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "large.jpg").write_bytes(JPEG + bytes(5000))
    (folder / "wide.jpg").write_bytes(encoded("PNG", (70, 70)))
    (folder / "empty.jpg").touch()
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    (folder / "a\nb\x1b[2J.jpg").write_text("<html>")
    return {
        "fifo.jpg": "is not a regular file",
        "zero.jpg": "is not a regular file",
        "gone.jpg": "No such file",
        "large.jpg": "data.max_image_bytes",
        "wide.jpg": "data.max_image_pixels",
        "empty.jpg": "empty file",
        "sparse.jpg": "data.max_image_bytes",
        "a\\nb\\x1b[2J.jpg": "HTML, not an image",
    }


LIMITS: dict[str, Any] = {"max_image_bytes": 5000, "max_image_pixels": 4800}


@pytest.mark.timeout(60)
def test_files_that_are_no_images_are_named_and_not_waited_for(tree: Path) -> None:
    """Catches a pipe or device that is read for ever, memory for a sparse file, and a name that steers the terminal."""
    reasons = hostile_files(tree / "train" / "cat")
    config = DataConfig(augmentation="none", image_size=8, **LIMITS)
    split = open_splits(tree, config, seed=0)[0]
    with nothing_happens():
        found = [split[SampleKey(0, index)] for index in range(len(split))]
    messages = [sample for sample in found if isinstance(sample, str)]
    assert len(found) - len(messages) == 6
    assert len(messages) == len(reasons)
    for name, reason in reasons.items():
        (message,) = (message for message in messages if f"/{name}: " in message)
        assert message.startswith(f"cannot decode image {tree}")
        assert reason in message
        assert message.isprintable()
    assert isinstance(split, ImageSplit)
    for_dali = EncodedSplit(split.source, config, train=True, seed=0)
    assert [s for key in range(len(split)) if isinstance(s := for_dali[SampleKey(0, key)], str)] == messages


@pytest.mark.timeout(60)
def test_hostile_files_are_listed_by_the_shard_command(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a list with more lines than images, limits that are not read, and hidden files that are packed."""
    monkeypatch.setattr(shard_writer, "ProcessPoolExecutor", lambda workers, **others: ThreadPoolExecutor(1))
    monkeypatch.setattr(forkserver, "ensure_running", lambda: None)
    reasons = hostile_files(tree / "train" / "cat")
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    (tree / "train" / ".ipynb_checkpoints" / "x.jpg").write_bytes(JPEG)
    (tree / "train" / "dog" / "._0.jpg").write_bytes(b"of another system")
    arguments = [str(tree), str(tmp_path / "shards"), "--workers", "1", "--on-bad-image", "skip"]
    arguments += ["--max-image-bytes", "5000", "--max-image-pixels", "4800"]
    assert shard_command(arguments) == 0
    assert capsys.readouterr().err.count("hidden directories are no classes") == 1
    listed = (tmp_path / "shards" / BAD_LIST).read_text().splitlines()
    assert len(listed) == len(reasons)
    assert all(
        any(f"/{name}: " in line and reason in line for line in listed) for name, reason in reasons.items()
    )
    assert len(TarShards(tmp_path / "shards" / "train")) == 6


def test_links_of_the_user_are_followed_and_links_in_a_circle_are_not(tree: Path) -> None:
    """Catches a subset made of links that is refused, and two links that make a tree of 2^40 directories."""
    before = ImageTree(tree / "train")
    subset = tree / "subset"
    (subset / "cat").mkdir(parents=True)
    (subset / "cat" / "0.jpg").symlink_to(tree / "train" / "cat" / "0.jpg")
    (subset / "dog").symlink_to(tree / "train" / "dog")
    (tree / "root").symlink_to(subset)
    linked = ImageTree(tree / "root")
    assert (linked.classes, len(linked)) == (["cat", "dog"], 4)
    assert linked.read(0) == before.read(0)
    for name in ("a", "b"):
        (tree / "train" / "cat" / name).symlink_to(".")
    with pytest.raises(ValueError, match="a second time"):
        ImageTree(tree / "train")


def test_the_order_of_a_tree_is_that_of_imagefolder(tree: Path) -> None:
    """Catches another order, with which a run that is resumed would get other images."""
    torchvision = pytest.importorskip("arsg_dist.imagenet.torchvision_compat").torchvision
    for name in ("z/1.PNG", "Z/1.jpeg", "b.jpg", "z.x/2.jpg", "note.txt"):
        path = tree / "train" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(JPEG)
    ours, theirs = ImageTree(tree / "train"), torchvision.datasets.ImageFolder(str(tree / "train"))
    assert [ours.file(index) for index in range(len(ours))] == theirs.samples
    assert ours.classes == theirs.classes


@pytest.mark.parametrize(
    "name", ["a\nb", "a\rb", "a\x1b[2J", "a\x85b", "a\u2028b", b"caf\xe9".decode("utf-8", "surrogateescape")]
)
def test_a_class_is_one_line_of_text(name: str, tree: Path, tmp_path: Path) -> None:
    """Catches a directory's name that makes two lines of classes.txt, steers a terminal, or cannot be written."""
    (tree / "train" / "cat").rename(tree / "train" / name)
    with pytest.raises(ValueError, match="is no line of text: rename it") as found:
        ImageTree(tree / "train")
    assert str(found.value).isprintable()
    split = write_split(tmp_path / "split")
    describe(split, classes=[name, "b"])
    with pytest.raises(ValueError, match="is no line of text: rename it"):
        TarShards(split)


def write_split(directory: Path) -> Path:
    """A split of three images in one shard, in this process."""
    directory.mkdir()
    image = directory / "x\ny.jpg"
    image.write_bytes(JPEG)
    written = write_shard(
        Shard(directory / "shard-000000.tar", [(n, str(image), n % 2) for n in range(3)], DataConfig())
    )
    image.unlink()
    write_index(directory, [(0, offset, size, label) for _, offset, size, label in written.records])
    (directory / "images.txt").write_text("cat/0.jpg\ndog/0.jpg\ncat/1.jpg\n")
    describe(
        directory, version=1, classes=["a", "b"], shards=[{"name": written.path.name, "bytes": written.size}]
    )
    return directory


def write_index(directory: Path, records: list[tuple[int, int, int, int]]) -> None:
    np.save(directory / "index.npy", np.array(records, dtype=RECORD))
    describe(directory)


def describe(directory: Path, **changes: Any) -> None:
    path = directory / "split.json"
    description = json.loads(path.read_text()) if path.exists() else {}
    digest = hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest()
    path.write_text(json.dumps({**description, "index_sha256": digest, **changes}))


TIB = 2**40


@pytest.mark.timeout(60)
def test_a_sparse_shard_takes_no_memory(tmp_path: Path) -> None:
    """Catches an index that has a terabyte read, and a list of names without an end."""
    split = write_split(tmp_path / "split")
    os.truncate(split / "shard-000000.tar", TIB)
    write_index(split, [(0, 0, TIB, 0), (0, TIB - 100, 100, 1), (0, 0, 2 * 10**9, 0)])
    describe(split, shards=[{"name": "shard-000000.tar", "bytes": TIB}])
    os.truncate(split / "images.txt", TIB)
    source = TarShards(split)
    for index in (0, 2):
        with pytest.raises(ValueError, match=r"are more than data\.max_image_bytes, 268,435,456"):
            source.read(index)
    assert source.read(1) == (bytes(100), 1)
    assert source.name(2).startswith("cat/1.jpg (number 2")
    os.truncate(split / "images.txt", 0)
    os.truncate(split / "images.txt", TIB)
    assert source.name(2).startswith("an image (number 2")
    (split / "images.txt").unlink()
    assert source.name(2).startswith("an image (number 2")
    os.mkfifo(split / "images.txt")
    assert source.name(2).startswith("an image (number 2")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def deep(path: Path) -> None:
    path.write_text("[" * 5000 + "]" * 5000)


def sparse(path: Path) -> None:
    os.truncate(path, TIB)


def zero(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["split.json", "index.npy", "shard-000000.tar"])
@pytest.mark.parametrize("change", [fifo, zero, sparse, deep])
def test_files_of_a_split_are_regular_and_bounded(change: Any, name: str, tmp_path: Path) -> None:
    """Catches a split that hangs a training or takes its memory."""
    split = write_split(tmp_path / "split")
    change(split / name)
    with nothing_happens(), pytest.raises(ValueError, match=r"shards in|is damaged"):
        TarShards(split)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": [{"name": "../split.json", "bytes": 1}]},
        {"shards": [{"name": "/etc/passwd", "bytes": 1}]},
        {"shards": [{"name": "..", "bytes": 1}]},
        {"shards": [{"name": "a\x1b[2J.tar", "bytes": 1}]},
        {"shards": [{"name": "shard-000000.tar", "bytes": 2**70}]},
        {"shards": [{"name": "shard-000000.tar", "bytes": -1}]},
        {"shards": [{"name": "shard-000000.tar", "bytes": True}]},
        {"shards": {}},
        {"classes": [""]},
        {"classes": "ab"},
        {"version": "\x1b[2J" * 1000},
    ],
    ids=repr,
)
def test_a_description_leads_nowhere_else(changes: dict[str, Any], tmp_path: Path) -> None:
    """Catches a path or number of a description that is believed, and one that ends in a traceback."""
    split = write_split(tmp_path / "split")
    describe(split, **changes)
    with pytest.raises(ValueError) as found:
        TarShards(split)
    assert str(found.value).isprintable()


def test_the_index_of_a_split_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sum over an index of any size, and one that leads outside its shards."""
    split = write_split(tmp_path / "split")
    assert len(TarShards(split)) == 3
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in split.iterdir():
        (linked / path.name).symlink_to(path)
    assert TarShards(linked).read(1) == (JPEG, 1)
    write_index(split, [(0, 2**62, 2**62, 0)])
    with pytest.raises(ValueError, match="leads outside"):
        TarShards(split)
    write_index(split, [])
    fifo(split / "shard-000000.tar")
    describe(split, shards=[{"name": "shard-000000.tar", "bytes": 0}])
    with pytest.raises(ValueError, match="is not a regular file"):
        TarShards(split)
    monkeypatch.setattr(tar_shards, "_LARGEST_INDEX", 10)
    with pytest.raises(ValueError, match=r"index\.npy has more than"):
        TarShards(split)


def test_loaders_do_not_import_from_the_current_directory(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches selectors.py of a stranger's directory, run by the server that loader processes are forked from."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("selectors", "socket", "signal", "threading", "warnings"):
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nraise SystemExit(1)\n")
    monkeypatch.chdir(place)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    server = forkserver.ForkServer()
    server.set_forkserver_preload([])
    with safe_start():
        server.ensure_running()
    server._stop()  # type: ignore[attr-defined]  # once it has come up
    assert not (tmp_path / "imported").exists()
    assert "PYTHONSAFEPATH" not in os.environ

    started = []
    monkeypatch.setattr(
        forkserver, "ensure_running", lambda: started.append(os.environ.get("PYTHONSAFEPATH"))
    )
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", lambda modules: None)
    split = open_splits(tree, DataConfig(image_size=8), seed=0)[0]
    process_loader(split, [], workers=1, collate=list, pin_memory=False)  # type: ignore[arg-type]
    monkeypatch.setattr(shard_writer, "ProcessPoolExecutor", None)  # nothing is to be started here
    with pytest.raises(TypeError):
        shard_command([str(tree), str(tmp_path / "shards"), "--workers", "1"])
    assert started == ["1", "1"]
