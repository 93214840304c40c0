"""What gets into a wheel and into a container image: the package, and nothing that lies beside it."""

import fnmatch
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.launchers import REPOSITORY

STRAY = (".env", "key.pem", "notes.txt", "data.npz", "checkpoint.pt", "settings.toml", "module.py.orig")


@pytest.mark.turn(0)
def test_a_wheel_has_the_package_and_its_licence_only(tmp_path: Path) -> None:
    """Catches a key, a data file or the tests in what is given to others."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(REPOSITORY / name, checkout)
    shutil.copytree(
        REPOSITORY / "arsg_dist", checkout / "arsg_dist", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for folder in (".", "runs", "tests", "arsg_dist", "arsg_dist/imagenet", "arsg_dist/runs"):
        (checkout / folder).mkdir(exist_ok=True)
        for name in STRAY:
            (checkout / folder / name).write_text("secret")
    # The compiled kernel is not what is tested: without a compiler the wheel is made without it, in seconds.
    subprocess.run(
        [sys.executable, "-P", "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path / "wheels")],
        cwd=checkout,
        env=os.environ | {"CC": "false", "CXX": "false"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    found = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "arsg_dist").rglob("*.py")}
    profiles = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "arsg_dist/cli/launch/profiles").glob("*.toml")
    }
    recipes = {f"arsg_dist/imagenet/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert {name for name in found if ".dist-info/" not in name} == modules | profiles | recipes | {
        "arsg_dist/py.typed"
    }
    metadata = {name.partition(".dist-info/")[2] for name in found if ".dist-info/" in name}
    assert metadata == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip


def goes_into_the_image(path: str) -> bool:
    """Docker's rule: the last line of .dockerignore that matches a path, or a folder it is in, decides."""
    included = True
    parts = path.split("/")
    leading = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        anywhere = pattern.startswith("**/")
        names = [name.rpartition("/")[2] for name in leading] if anywhere else leading
        pattern = pattern.removeprefix("**/")
        if any(
            name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for name in names
        ):
            included = line.startswith("!")
    return included


def test_an_image_has_what_it_needs_and_no_keys_runs_or_data() -> None:
    """Catches .env, the history, a run or a data set in an image that is published."""
    left_out = (
        ".env", ".git/config", ".venv/bin/python", "runs/a/config.yaml", "data/train/a.jpg", "id_rsa", "key.pem",
        "launch/.env", "arsg_dist/.netrc", "arsg_dist/optim/kernels/arsg_cpu.so", ".aws/credentials", "arsg_job.sbatch",
    )  # fmt: skip
    assert [path for path in left_out if goes_into_the_image(path)] == []
    setup = (REPOSITORY / "launch/setup.sh").read_text()
    inputs = setup.partition("inputs=(")[2].partition(")")[0].split()
    needed = (*inputs, "LICENSE", "README.md", "arsg_dist/optim/kernels/csrc/fused_cpu.cpp", "launch/train_imagenet.py",
              "configs/digits.yaml")  # fmt: skip
    assert [path for path in needed if not goes_into_the_image(path)] == []
    assert all((REPOSITORY / path).is_file() for path in needed)


def test_the_image_does_not_run_as_root() -> None:
    """Catches a training in a container that may change the host's files as root."""
    lines = (REPOSITORY / "containers/Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("root", "0")
