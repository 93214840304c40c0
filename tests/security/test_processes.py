"""Nothing that a directory or a neighbour prepared is started or loaded as code."""

import subprocess
from pathlib import Path

import pytest
import torch

from arsg_dist.engine import SingleProcessEngine
from arsg_dist.imagenet import environment


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
    assert described["git"] == environment.checkout(Path(environment.__file__).parents[2])
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
