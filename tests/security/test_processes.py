"""Nothing that a directory or a neighbour prepared is started or loaded as code."""

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir, triton_cache_dir

from arsg_dist import ARSG
from arsg_dist.engine import SingleProcessEngine
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.output import environment
from arsg_dist.optim.kernels import fused
from arsg_dist.safe_io.processes import is_private, keep_compiled_code_private, private_cache


def _git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    ran = subprocess.run(
        ["git", "-C", directory, *identity, *arguments], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


def _checkout(directory: Path) -> Path:
    directory.mkdir()
    _git(directory, "init", "--quiet")
    (directory / "file").write_text("text")
    _git(directory, "add", "file")
    _git(directory, "commit", "--quiet", "-m", "first")
    return directory


def test_a_start_runs_nothing_of_the_current_directorys_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches git run in the directory of a recipe: its settings name programs, which git starts."""
    stranger, ran = _checkout(tmp_path / "stranger"), tmp_path / "ran"
    (stranger / ".gitattributes").write_text("* filter=planted\n")
    (stranger / "file").write_text("changed")
    for setting in ("core.fsmonitor", "filter.planted.clean"):
        _git(stranger, "config", setting, f"touch {ran}; false")
    monkeypatch.chdir(stranger)
    parameter = torch.nn.Linear(1, 1)
    engine = SingleProcessEngine(parameter, torch.optim.SGD(parameter.parameters(), lr=0.1))
    described = environment.describe(engine, hosts=["here"], data="digits", seed=0)
    assert not ran.exists()
    assert described["git"] == environment.checkout(Path(environment.__file__).parents[3])
    assert len(described["code"]) == 64
    subprocess.run(["git", "status"], capture_output=True, check=True)
    assert ran.exists(), "the directory is as harmless as it seems"


def test_the_revision_is_read_in_every_form_git_keeps_it(tmp_path: Path) -> None:
    """Catches a run that cannot be made again: a wrong revision, or none, for packed references and worktrees."""
    checkout = _checkout(tmp_path / "checkout")
    first = {"revision": _git(checkout, "rev-parse", "HEAD")}
    assert environment.checkout(checkout) == first
    _git(checkout, "worktree", "add", "--quiet", "-b", "side/branch", str(tmp_path / "worktree"))
    _git(tmp_path / "worktree", "commit", "--quiet", "--allow-empty", "-m", "second")
    second = {"revision": _git(tmp_path / "worktree", "rev-parse", "HEAD")}
    assert second != first
    for packed in (False, True):
        if packed:
            _git(checkout, "pack-refs", "--all")
        assert environment.checkout(checkout) == first
        assert environment.checkout(tmp_path / "worktree") == second
    _git(checkout, "checkout", "--quiet", "--detach", second["revision"])
    assert environment.checkout(checkout) == second
    (checkout / ".git" / "HEAD").write_text("ref: ../../outside\n")
    assert environment.checkout(checkout) is None
    assert environment.checkout(tmp_path) is None


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty /tmp, which all may write to, and an empty home."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        # Set first, so that what a test sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, variable in (("tmp", "TMPDIR"), ("home", "HOME")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def _plant(directory: Path) -> Path:
    """What a neighbour makes before the user does."""
    directory.mkdir()
    directory.chmod(0o777)
    return directory


def test_the_program_loads_no_compiled_code_of_a_neighbour(node: Path) -> None:
    """Catches compiled code read from a directory that others made first and may write to."""
    planted = [_plant(Path(default_cache_dir())), _plant(node / "tmp" / f"arsg_dist-{os.getuid()}")]
    assert planted[0].parent == node / "tmp"
    assert train_command(["--engine", "none of them"]) == 2
    used = Path(cache_dir())
    assert used == node / "home" / ".cache" / "arsg_dist-compiled" / "inductor"
    assert stat.S_IMODE(used.parent.stat().st_mode) == 0o700
    assert Path(triton_cache_dir(0)) == used.parent / "triton"
    assert not any(list(directory.iterdir()) for directory in planted)


def test_compiled_code_is_kept_where_the_user_says_or_on_the_machines_own_disk(node: Path) -> None:
    """Catches an own choice overridden, and a cache in a home that is slow, full or shared by unlike machines."""
    chosen = {"TORCHINDUCTOR_CACHE_DIR": "/elsewhere", "TMPDIR": str(node / "tmp")}
    keep_compiled_code_private(chosen)
    assert chosen["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    assert chosen["TRITON_CACHE_DIR"] == str(node / "tmp" / f"arsg_dist-{os.getuid()}" / "triton")
    assert private_cache() == private_cache(), "the next start finds what this one compiled"


@pytest.mark.parametrize("home", ["/proc/no-home", "/dev/null", "planted"])
def test_without_a_home_compiled_code_goes_to_a_directory_of_the_process(node: Path, home: str) -> None:
    """Catches a start that fails, or takes a neighbour's directory, where the home cannot be written."""
    _plant(node / "tmp" / f"arsg_dist-{os.getuid()}")
    _plant(node / "planted")
    (node / "planted" / "arsg_dist-compiled").symlink_to(node / "planted")
    environ = {"TMPDIR": str(node / "tmp"), "XDG_CACHE_HOME": str(node / home)}
    with pytest.warns(UserWarning, match="not found again by the next"):
        directory = private_cache(environ)
    assert directory.parent == node / "tmp"
    assert is_private(directory)


@pytest.mark.parametrize(("mode", "private"), [(0o700, True), (0o755, True), (0o757, False)])
def test_a_directory_is_private_if_no_other_may_write_there(node: Path, mode: int, private: bool) -> None:
    """Catches usual directories taken for a neighbour's, and the other way round."""
    directory = node / "tmp" / "directory"
    directory.mkdir()
    directory.chmod(mode)
    assert is_private(directory) is private
    (node / "link").symlink_to(directory)
    assert not is_private(node / "link")
    (node / "tmp").chmod(0o777)  # others may rename what is in it
    assert not is_private(directory)


def test_the_fused_step_compiles_only_into_a_directory_of_the_user(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ARSG(fused=True) in a user's own program running what a neighbour put into torch's directory."""
    compiled = []
    monkeypatch.setattr(fused, "_compiled_update", lambda: lambda *arguments: compiled.append(arguments))
    monkeypatch.setattr(fused, "_compiling_failed", False)
    monkeypatch.setattr(fused, "_cpu_step", fused.compiled_step)

    def step() -> float:
        fused._cache_of_others.cache_clear()
        parameter = torch.ones(1, requires_grad=True)
        parameter.grad = torch.ones(1)
        ARSG([parameter], lr=0.1, fused=True).step()
        return parameter.item()

    assert step() == 1
    assert stat.S_IMODE(Path(default_cache_dir()).stat().st_mode) == 0o700
    Path(default_cache_dir()).chmod(0o777)
    with pytest.warns(UserWarning, match="others may put code into"):
        assert step() < 1
    assert len(compiled) == 1
    monkeypatch.setattr(fused, "_compiling_failed", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(node / "own"))
    assert step() == 1
    fused._cache_of_others.cache_clear()
