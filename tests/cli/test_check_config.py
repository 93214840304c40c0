import json
import subprocess
import sys
from pathlib import Path

import pytest

from arsg_dist.cli import main as cli
from arsg_dist.cli.check_config import readable
from tests.support.launchers import REPOSITORY


def main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


ZERO2 = str(REPOSITORY / "configs/deepspeed/zero2.json")


def test_a_config_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an explanation without figures, or with those of another model or world size."""
    assert main(["check-config", ZERO2, "--parameters", "124e6", "--world-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "ZeRO stage 2, fp32, 124,000,000 parameters on 4 ranks" in said
    assert "118.26 MiB  v̂" in said
    assert "all_reduce       473.02 MiB  × 1  gradients; each rank sends 709.53 MiB" in said
    assert "clips the gradient at norm 1.0" in said


def test_a_model_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a model that is downloaded, filled with numbers, counted wrongly, or needs values to be built."""
    assert main(["check-config", ZERO2, "--model", "torchvision:resnet50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 25_557_032
    # One that cannot be built without memory.
    assert main(["check-config", ZERO2, "--model", "torchvision:regnet_y_400mf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 4_344_144
    assert main(["check-config", ZERO2, "--model", "tests.support.toy:build_model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 8992


def test_json_can_be_read_by_a_program() -> None:
    """Catches what DeepSpeed logs on standard output in front of the answer."""
    command = [sys.executable, "-m", "arsg_dist.cli.main", "check-config", ZERO2, "--json"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert json.loads(finished.stdout)["stage"] == 2


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_refused_config_ends_with_1_and_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: list[str]
) -> None:
    """Catches a script that starts the job all the same."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "ARSG", "params": {"amsgrad": True}}}))
    assert main(["check-config", str(path), *as_json]) == 1
    assert "amsgrad, which ARSG does not have: choose with preconditioner" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "nowhere.json does not exist"),
        ([__file__], "is not valid JSON"),
        ([ZERO2, "--parameters", "many"], "give a whole number"),
        ([ZERO2, "--parameters", "0"], "at least 1"),
        ([ZERO2, "--world-size", "0"], "at least 1"),
        ([ZERO2, "--model", "resnet50"], "torchvision:NAME or MODULE:FUNCTION"),
        ([ZERO2, "--model", "torchvision:resnet51"], "resnet51"),
        ([ZERO2, "--model", "nowhere:model"], "nowhere"),
        ([ZERO2, "--model", "tests.support.toy:nothing"], "has no nothing"),
        ([ZERO2, "--model", "builtins:dict"], "gave dict, not a torch module"),
    ],
)
def test_bad_input_ends_with_2_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and bad input taken for a refused config."""
    assert main(["check-config", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 * 2**40, "3.00 TiB")]
)
def test_bytes_are_readable(count: int, text: str) -> None:
    """Catches a unit off by 1024."""
    assert readable(count) == text


def test_the_command_line_needs_no_engine() -> None:
    """Catches help, or a plan, that imports an engine or what reads recipes, and a subcommand that is not there."""
    code = """
import sys
sys.modules |= dict.fromkeys(("deepspeed", "horovod", "mpi4py", "torchvision", "yaml"))
from arsg_dist.cli.main import main
for line in ("--help", "launch slurm --engine horovod-sharded --ranks-per-node 2 --dry-run -- a.py"):
    try:
        main(line.split())
    except SystemExit as end:
        assert not end.code
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert "check-config" in finished.stdout
    assert "HOROVOD_GLOO_TIMEOUT_SECONDS" in finished.stdout
