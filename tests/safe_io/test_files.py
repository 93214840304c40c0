"""Files that somebody prepared: links, pipes, devices, names that lead elsewhere."""

import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arsg_dist.safe_io import files

NAMES = st.text(alphabet=st.sampled_from("ab./\\\0-~ \n"), max_size=8) | st.text(max_size=8)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside that nobody may read or change by way of `tmp_path / "run"`."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "secret"
    path.write_text("secret")
    yield path
    assert path.read_text() == "secret"
    assert not path.is_symlink()


@given(names=st.lists(NAMES, min_size=1, max_size=3))
def test_inside_stays_inside(names: list[str]) -> None:
    """Catches a name that leads out of the directory, whatever it is made of."""
    root = Path("/no/such/directory")
    try:
        path = files.inside(root, *names)
    except ValueError:
        assert any(n in ("", ".", "..") or "/" in n or "\0" in n for n in names)
    else:
        assert Path(os.path.normpath(path)) == path
        assert path.parents[len(names) - 1] == root


def test_a_directory_on_the_way_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Catches RUN/checkpoints leading to the directory above; a RUN that is itself a link is the user's own."""
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to("real")
    assert files.make_directory(tmp_path / "run", "weights").is_dir()
    (tmp_path / "real" / "checkpoints").symlink_to("..")
    with pytest.raises(ValueError, match="checkpoints is a link"):
        files.inside(tmp_path / "run", "checkpoints", "step-1")
    with pytest.raises(ValueError, match="checkpoints is a link"):
        files.make_directory(tmp_path / "run", "checkpoints")
    with pytest.raises(ValueError, match="checkpoints is a link"):
        files.make_directory(tmp_path / "run", "checkpoints", "step-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "run"]


def test_only_regular_files_are_read(victim: Path) -> None:
    """Catches a pipe that is waited for, a device that never ends, and a link that is followed."""
    run = victim.parent / "run"
    os.mkfifo(run / "pipe")
    (run / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(run)  # a socket's path may have 107 characters
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    (run / "link").symlink_to(victim)
    for name, what in (
        ("pipe", "not a regular file"),
        ("directory", "not a regular file"),
        ("socket", "not a regular file"),
        ("link", "is a link"),
    ):
        with pytest.raises(ValueError, match=f"{name} is.* {what.removeprefix('is ')}"):
            files.read_bytes(run / name)
    with pytest.raises(ValueError, match="not a regular file"):
        files.read_bytes(Path("/dev/zero"))
    (run / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        files.read_bytes(run / "zero", follow=True)
    assert files.read_text(run / "link", follow=True) == "secret"
    with pytest.raises(FileNotFoundError):
        files.read_bytes(run / "missing")


def test_reading_is_bounded(tmp_path: Path) -> None:
    """Catches a sparse file of a terabyte that is read into memory."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than the 64 MiB"):
        files.read_bytes(path)
    path.write_bytes(b"12345")
    assert files.read_bytes(path, limit=5) == b"12345"
    with pytest.raises(ValueError, match="more than the 4 bytes"):
        files.read_bytes(path, limit=4)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        files.read_text(path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "write_text": lambda path: files.write_text(path, "new"),
    "append_text": lambda path: files.append_text(path, "new"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writing_never_follows_a_link(name: str, victim: Path) -> None:
    """Catches a record that becomes somebody's .bashrc: the link is replaced, or refused, and its target kept."""
    path = victim.parent / "run" / "metrics.jsonl"
    path.symlink_to(victim)
    if name == "append_text":
        with pytest.raises(ValueError, match="is a link"):
            WRITERS[name](path)
    else:
        WRITERS[name](path)
        assert not path.is_symlink()
        assert path.read_text() == "new"


def test_links_under_the_names_partial_files_used_to_have(victim: Path) -> None:
    """Catches a partial file whose name can be foretold, and prepared as a link."""
    run = victim.parent / "run"
    for name in (".metrics.jsonl.partial", ".metrics.jsonl", "metrics.jsonl.partial"):
        (run / name).symlink_to(victim)
    seen = set()
    for _ in range(3):
        with files.replacing(run / "metrics.jsonl") as partial:
            seen.add(partial.name)
            partial.write_text("new")
    assert len(seen) == 3
    assert (run / "metrics.jsonl").read_text() == "new"


def test_append(tmp_path: Path) -> None:
    """Catches a record that replaces the ones before, and a pipe in the place of the records that is waited for."""
    files.append_text(tmp_path / "log", "1\n")
    files.append_text(tmp_path / "log", "2\n")
    assert (tmp_path / "log").read_text() == "1\n2\n"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        files.append_text(tmp_path / "pipe", "3\n")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("executable", [False, True])
def test_modes(umask: int, private: bool, executable: bool, tmp_path: Path) -> None:
    """Catches a script with a key in it that every user of the node may read."""
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "file", "x", private=private, executable=executable)
    finally:
        os.umask(before)
    right = (0o777 if executable else 0o666) & ~umask & (0o700 if private else 0o777)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == right


def test_all_or_nothing(tmp_path: Path) -> None:
    """Catches half a file under its name, and partial files left behind, after an error while writing."""

    def break_off_a_file() -> None:
        with files.writing(path) as file:
            file.write(b"half")
            raise RuntimeError("in the middle")

    def break_off_a_directory() -> None:
        with files.new_directory(tmp_path / "made") as made:
            (made / "file").write_text("half")
            raise RuntimeError("in the middle")

    path = tmp_path / "file"
    files.write_text(path, "old")
    for break_off in (break_off_a_file, break_off_a_directory):
        with pytest.raises(RuntimeError, match="in the middle"):
            break_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a file that a power failure leaves empty under its name: content first, then name, then directory."""
    events: list[tuple[str, str]] = []
    replace, sync = Path.replace, files.sync

    def recorded_replace(self: Path, target: Path) -> Path:
        events.append(("replace", target.name))
        return replace(self, target)

    def recorded_sync(path: Path) -> None:
        events.append(("sync", re.sub(r"[0-9a-f]{16}", "*", path.name)))
        sync(path)

    monkeypatch.setattr(Path, "replace", recorded_replace)
    monkeypatch.setattr(files, "sync", recorded_sync)
    files.write_text(tmp_path / "file.txt", "x")
    assert events == [("sync", ".file.*.partial.txt"), ("replace", "file.txt"), ("sync", tmp_path.name)]


def test_a_new_directory_replaces_nothing(victim: Path) -> None:
    """Catches a link, dangling or not, in the place of a directory that is to be made."""
    run = victim.parent / "run"
    for name, target in (("dangling", "missing"), ("link", ".."), ("file", None)):
        (run / name).symlink_to(target) if target else (run / name).touch()
        with pytest.raises(FileExistsError, match=name), files.new_directory(run / name):
            pass
    with files.new_directory(run / "deep" / "new") as made:
        (made / "file").write_text("x")
    assert (run / "deep" / "new" / "file").read_text() == "x"


def test_removing_a_tree_leaves_what_its_links_lead_to(victim: Path) -> None:
    """Catches a clean-up that deletes the directory above."""
    tree = victim.parent / "run" / "tree"
    tree.mkdir()
    (tree / "up").symlink_to("../..")
    (tree / "secret").symlink_to(victim)
    files.remove_tree(tree)
    assert not tree.exists()
    link = victim.parent / "run" / "link"
    link.symlink_to("..")
    files.remove_tree(link)
    files.remove_tree(victim.parent / "run" / "missing")
    assert not link.is_symlink()


def test_only_own_partial_files_are_removed(tmp_path: Path) -> None:
    """Catches a clean-up that takes every dot file for its own: .git, .env, .bashrc."""
    kept = [".git", ".env", ".bashrc", ".step-1.partial", "a.0123456789abcdef.partial", ".a.0123.partial.txt"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".directory.0123456789abcdef.partial").mkdir()
    killed = files.replacing(tmp_path / "x.txt")
    left = killed.__enter__()
    assert left.exists()
    files.remove_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*kept, ".directory.0123456789abcdef.partial"]
    )


def test_writers_of_one_name_at_once_do_not_meet(tmp_path: Path) -> None:
    """Catches one temporary name for all: where every rank of a job exports to one path, the second to end would find
    its file gone, or mix its bytes with the other's."""
    path = tmp_path / "model.safetensors"
    with files.writing(path) as one:
        one.write(b"one")
        with files.writing(path) as other:
            other.write(b"other, and longer")
        assert path.read_bytes() == b"other, and longer"
        one.write(b" whole")
    assert path.read_bytes() == b"one whole"
    assert [left.name for left in tmp_path.iterdir()] == ["model.safetensors"]
