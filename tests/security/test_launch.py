"""What a launch writes, starts and hands on: nobody else's code runs, and nobody else reads a secret."""

import itertools
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arsg_dist.cli.launch import command as launch
from arsg_dist.cli.launch import rank_script
from arsg_dist.cli.launch.job import Plan
from arsg_dist.cli.launch.quoting import for_bash
from arsg_dist.cli.launch.targets import TARGETS
from tests.cli.launch.test_targets import HOSTILE, NEEDED, PLACES, PROGRAM, parse, plan, texts
from tests.support.launchers import REPOSITORY

SECRET = "hunter2 & co"
MANIFESTS = ("mpijob", "pytorchjob", "trainjob")
WRITTEN_OUT = ("deepspeed-pdsh", *MANIFESTS)  # where no value can be handed on unwritten
MULTILINE = "a\nEND_OF_FILE\ntouch pwned\nEND_OF_FILE_\n#BSUB -q other\rtouch pwned"


def options_of(target: str, *options: str, program: list[str] = PROGRAM) -> Any:
    kind = TARGETS[target]
    engine = ["--engine", next(iter(kind.engines()))] if len(kind.rendezvous) > 1 else []
    return parse(target, *engine, *PLACES[kind.places], *NEEDED.get(target, []), *options, "--", *program)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def nothing_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_watched", lambda *arguments, **settings: 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("nothing_started")
def test_generated_files_are_for_their_owner_and_follow_no_link(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a script of mode 0755 with a key in it, and one that is written through a planted link."""
    directory = tmp_path / "job"
    directory.mkdir()
    monkeypatch.chdir(directory)  # where manifests go, whose --directory is the image's
    victim = tmp_path / "bashrc"
    victim.write_text("mine")
    options = options_of(target, "--directory", str(directory), "--env", "API_KEY=hunter2")
    made = launch.make_plan(options)
    for path in made.files:
        path.symlink_to(victim)
    before = os.umask(0)
    try:
        assert launch.run(options) == 0
    finally:
        os.umask(before)
    assert victim.read_text() == "mine"
    assert {path: path.read_text() for path in directory.iterdir()} == made.files
    for path, content in made.files.items():
        assert mode(path) == (0o700 if content.startswith("#!") else 0o600)


@pytest.mark.parametrize("target", TARGETS)
def test_dry_runs_script_makes_the_same_files_and_nothing_else(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an argument that ends the here-document: its next line was executed."""
    directory = tmp_path / "job"
    directory.mkdir()
    monkeypatch.chdir(directory)  # where manifests go, whose --directory is the image's
    victim = tmp_path / "bashrc"
    victim.write_text("mine")
    chosen = ["--setup", MULTILINE] if target in ("slurm", "pbs", "lsf") else []
    program = ["train.py", MULTILINE, "END_OF_FILE"]
    options = options_of(target, "--directory", str(directory), *chosen, "--dry-run", program=program)
    made = launch.make_plan(options)
    for path in made.files:
        path.symlink_to(victim)
    assert launch.run(options) == 0
    script = capsys.readouterr().out.replace(shlex.join(made.command), ":")
    subprocess.run(["bash", "-e"], input=script, text=True, check=True, cwd=tmp_path)
    assert victim.read_text() == "mine"
    assert not list(tmp_path.rglob("pwned"))
    assert {path: path.read_bytes() for path in directory.iterdir()} == {
        path: content.encode() for path, content in made.files.items()
    }
    for path, content in made.files.items():
        assert mode(path) == (0o700 if content.startswith("#!") else 0o600)


@pytest.mark.parametrize("target", ["slurm", "pbs", "lsf"])
def test_no_argument_makes_a_line_of_a_batch_script(target: str) -> None:
    """Catches an argument that is read as a scheduler's directive: LSF looks for them in every line."""
    lines = re.split(r"[\n\r]", texts(plan(target, program=["train.py", MULTILINE])))
    assert not [line for line in lines if line.startswith(("#BSUB -q", "END_OF_FILE", "touch"))]


def test_bash_reads_a_quoted_argument_as_it_was() -> None:
    """Catches an escape that changes an argument with line breaks."""
    arguments = [*HOSTILE, MULTILINE, "\\\n'\r\"$HOME`id`"]
    command = f"printf '%s\\0' {' '.join(map(for_bash, arguments))}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == arguments


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in WRITTEN_OUT])
def test_a_variable_without_a_value_is_handed_on_unwritten(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a key that stands in a file, in `ps`, or is not handed on at all."""
    monkeypatch.setenv("API_KEY", SECRET)
    for engine in TARGETS[target].engines():
        made = plan(target, "--directory", str(tmp_path), "--env", "API_KEY", engine=engine)
        everything = f"{made}{made.environment}{texts(made)}"
        assert "hunter2" not in everything
        if target == "mpirun":
            assert has_option(made.command, "-x", "API_KEY")
        elif target == "deepspeed-openmpi":
            (launcher_args,) = [word for word in made.command if word.startswith("--launcher_args=")]
            assert has_option(shlex.split(launcher_args.partition("=")[2]), "-x", "API_KEY")
        elif target == "slurm":
            assert made.command[:2] == ("sbatch", "--export=ALL")
        elif target == "pbs":
            assert made.command[:3] == ("qsub", "-v", "API_KEY")
        elif target == "lsf":
            assert "bsub -env all <" in made.command[2]
            assert "-x API_KEY" in texts(made)
        else:  # the command inherits the environment, and hands all of it on
            assert made.command[0] in (sys.executable, "mpirun", "horovodrun")
    if "horovodrun" in target:
        assert any("command lines" in note for note in made.notes)


def has_option(command: Any, name: str, value: str) -> bool:
    return (name, value) in itertools.pairwise(command)


@pytest.mark.parametrize("target", WRITTEN_OUT)
def test_where_a_value_would_be_written_out_it_is_refused(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a key that is written to other hosts' command lines, or a pod that starts without it."""
    monkeypatch.setenv("API_KEY", SECRET)
    remedy = "target mpirun" if target == "deepspeed-pdsh" else "--secret NAME=SECRET/KEY"
    with pytest.raises(ValueError, match=remedy):
        plan(target, "--env", "API_KEY")


@pytest.mark.parametrize("target", ["slurm", "pbs", "lsf"])
def test_a_job_without_its_variable_ends_at_once(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a site whose scheduler hands nothing on: the job would run for a day without its key."""
    monkeypatch.setenv("API_KEY", SECRET)
    script = texts(plan(target, "--directory", str(tmp_path), "--env", "API_KEY", "--setup", "touch started"))
    monkeypatch.delenv("API_KEY")
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, cwd=tmp_path)
    assert (done.returncode, "did not hand API_KEY on" in done.stderr) == (2, True)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_environment_is_refused_by_every_target(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a line break, NUL or name that one launcher of thirteen reads as something else, and a missing key."""
    monkeypatch.delenv("API_KEY", raising=False)
    refused = {
        "A=1\n2": "line break", "A=1\r2": "line break", "A=1\x002": "NUL", "A B=1": "not the name",
        "=1": "name",
    }  # fmt: skip
    for pair, message in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            plan(target, "--env", pair)
        assert "\n" not in str(caught.value)
    if target not in WRITTEN_OUT:
        with pytest.raises(ValueError, match=r"export API_KEY first, or give NAME=VALUE"):
            plan(target, "--env", "API_KEY")
        monkeypatch.setenv("API_KEY", "hunter2\nx")
        with pytest.raises(ValueError, match="value of API_KEY has a line break") as caught:
            plan(target, "--env", "API_KEY")
        assert "hunter2" not in str(caught.value)


def test_the_last_word_on_a_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a value that is written although the user asked for it to be handed on afterwards."""
    monkeypatch.setenv("API_KEY", SECRET)
    made = plan("mpirun", "--env", "API_KEY=hunter2", "--env", "API_KEY")
    assert "hunter2" not in f"{made}{made.environment}"
    assert plan("mpirun", "--env", "API_KEY", "--env", "API_KEY=x").environment["API_KEY"] == "x"


def expanded(text: str, environment: dict[str, str]) -> str:
    """Kubernetes' rule: $$ is $, and $(NAME) is the variable's value where there is one."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda found: "$" if found[1] == "$" else environment.get(found[2], found[0]),
        text,
    )


@pytest.mark.parametrize("target", MANIFESTS)
def test_kubernetes_gets_the_literal_text(target: str) -> None:
    """Catches $(NAME) and $$ in arguments and values, which a pod would get replaced."""
    hostile = ["$(HOME)", "$$", "$$(HOME)", "$", "a$$$b", "$(API_KEY)"]
    made = json.loads(
        texts(
            plan(
                target, "--env", "MINE=$(HOME)$$", "--secret", "API_KEY=wandb/api.key", "--directory", "/$(HOME)",
                program=["train.py", *hostile],
            )
        )
    )  # fmt: skip
    found = containers(made["spec"])
    assert found
    for container in found:
        environment = {entry["name"]: entry.get("value", "from a Secret") for entry in container["env"]}
        known = environment | {"HOME": "/root", "PET_NODE_RANK": "1"}
        command = [expanded(word, known) for word in container["command"]]
        assert command[command.index("train.py") + 1 :] == hostile
        assert expanded(environment["MINE"], known) == "$(HOME)$$"
        assert "--node-rank=1" in command or target != "pytorchjob"
        assert "--chdir=/$(HOME)" in command or target != "trainjob"
        assert {
            "name": "API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api.key"}},
        } in container["env"]
        assert has_option(command, "-x", "API_KEY") or target != "mpijob"


def containers(content: Any) -> list[dict[str, Any]]:
    """What has a command and variables, anywhere in a manifest."""
    if isinstance(content, list):
        return [found for part in content for found in containers(part)]
    if not isinstance(content, dict):
        return []
    if {"command", "env"} <= set(content):
        return [content]
    return [found for part in content.values() for found in containers(part)]


@pytest.mark.parametrize(
    "text", ["API_KEY=hunter2", "A=b", "A B=c/d", "A=c/d/e", "A=../d", "A=c/d\n", "A=C/d", "=c/d"]
)
@pytest.mark.parametrize("target", MANIFESTS)
def test_what_is_no_reference_to_a_secret_is_refused(target: str, text: str) -> None:
    """Catches a key given where its name belongs, and a manifest the cluster refuses."""
    with pytest.raises(ValueError, match=r"SECRET/KEY|not the name|line break") as caught:
        plan(target, "--secret", text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
def test_no_module_is_started_from_the_current_directory(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `python -m MODULE` without -P, and a launcher of such without PYTHONSAFEPATH."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    through = {"slurm": ["srun", "mpirun", "horovodrun"], "lsf": ["mpirun", "jsrun"]}.get(target, [""])
    for how in through:
        for engine in TARGETS[target].engines() if how != "horovodrun" else ("horovod",):
            options = ["--through", how] if how else []
            made = plan(target, "--directory", str(tmp_path), *options, engine=engine)
            words = f"{shlex.join(made.command)}\n{texts(made)}"
            words = re.sub(r'",\s+"', " ", words)
            assert re.findall(r"(\S+) -m (?:arsg_dist|torch|deepspeed)", words) == ["-P"] * len(
                re.findall(r" -m (?:arsg_dist|torch|deepspeed)", words)
            )
            starts_more = "deepspeed.launcher" in words or "horovodrun" in words
            starts_more = starts_more or target in ("deepspeed-pdsh", "torchrun")
            variable = made.environment.get("PYTHONSAFEPATH") or re.search("PYTHONSAFEPATH=(1)", words)
            assert bool(variable) == starts_more
            if starts_more:  # and the script is relieved of it
                assert re.search(r"rank_script\.py train\.py|-u PYTHONSAFEPATH \S+ -u train\.py", words)
    if target in ("deepspeed-pdsh", "deepspeed-openmpi"):
        assert f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}\n" in texts(made)


@pytest.mark.parametrize("target", TARGETS)
def test_a_users_own_safe_path_stays(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a protection that the user asked for and the launcher takes away."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    made = plan(target)
    assert "-u PYTHONSAFEPATH" not in f"{made}{texts(made)}"
    assert "rank_script" not in f"{made}{texts(made)}"


@pytest.mark.parametrize("path", ["cli/launch/rank_script.py", "launch/rank_script.py"])
def test_the_script_is_started_as_without_the_variable(path: str, tmp_path: Path) -> None:
    """Catches a script that no longer finds the modules beside it, or gets other arguments."""
    assert rank_script.command(["--local_rank=1", "a.py", "-x", "--local_rank=7"]) == [
        sys.executable, "-u", "a.py", "--local_rank=1", "-x", "--local_rank=7",
    ]  # fmt: skip
    here, script = planted(tmp_path)
    done = subprocess.run(
        [sys.executable, "-u", str(REPOSITORY / "arsg_dist" / path), "--local_rank=0", str(script), *HOSTILE],
        cwd=here,
        env=os.environ | {"PYTHONSAFEPATH": "1", "RECORD": str(tmp_path / "record")},
        check=True,
    )
    assert done.returncode == 0
    (record,) = records(tmp_path)
    assert record["arguments"] == ["--local_rank=0", *HOSTILE]
    assert record["neighbour"] == "found"
    assert "PYTHONSAFEPATH" not in record["environment"]
    assert not (tmp_path / "pwned").exists()


def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A current directory with modules that leave a mark, and a script elsewhere that needs the module beside it."""
    here, elsewhere = tmp_path / "downloaded", tmp_path / "mine"
    for name in (
        "hjson", "selectors", "psutil", "arsg_dist/__init__", "deepspeed/__init__", "horovod/__init__",
    ):  # fmt: skip
        module = here / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(
            f"open({str(tmp_path / 'pwned')!r}, 'w')\nraise SystemExit('a planted module ran')\n"
        )
    elsewhere.mkdir()
    (elsewhere / "neighbour.py").write_text("VALUE = 'found'\n")
    script = elsewhere / "train.py"
    script.write_text(
        "import json, os, sys, neighbour\n"
        "record = {'arguments': sys.argv[1:], 'environment': dict(os.environ), 'neighbour': neighbour.VALUE}\n"
        "json.dump(record, open(os.environ['RECORD'] + f'.{os.getpid()}', 'w'))\n"
    )
    return here, script


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("record.*"))]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(
            ["local", "--engine", "deepspeed", "--ranks-per-node", "2", "--cpu"], marks=pytest.mark.turn(0)
        ),
        ["local", "--engine", "horovod", "--ranks-per-node", "2", "--cpu"],
        ["horovodrun", "--hosts", "localhost:2"],
    ],
    ids=lambda start: " ".join(start[:3]),
)
def test_hostile_strings_and_planted_modules_under_real_launchers(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a module of the current directory that a launcher imports, and a string that a shell on the way reads."""
    here, script = planted(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("API_KEY", SECRET)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    values = {f"MINE{number}": text for number, text in enumerate(HOSTILE)}
    pairs = [word for name, value in values.items() for word in ("--env", f"{name}={value}")]
    options = parse(
        *start, "--directory", str(here), "--env", "API_KEY", "--env", f"RECORD={tmp_path / 'record'}", *pairs,
        "--", str(script), *HOSTILE,
    )  # fmt: skip
    code = launch.run(options)
    assert code == 0, capfd.readouterr()
    assert not list(tmp_path.rglob("pwned"))
    assert len(records(tmp_path)) == 2
    for record in records(tmp_path):
        assert [word for word in record["arguments"] if not word.startswith("--local_rank")] == HOSTILE
        assert record["environment"].items() >= (values | {"API_KEY": SECRET}).items()
        assert record["neighbour"] == "found"


@pytest.mark.usefixtures("nothing_started")
def test_a_directory_in_the_place_of_a_file_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or files left over, where a generated file cannot be written."""
    (tmp_path / "arsg_job.pbs").mkdir()
    options = options_of("pbs", "--directory", str(tmp_path))
    assert launch.run(options) == launch.BAD_INPUT
    assert "cannot write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["arsg_job.pbs"]


def test_a_hostfile_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """Catches a launch that waits for ever for a named pipe's writer, and escape characters on the terminal."""
    path = tmp_path / "hosts"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        plan("mpirun", "--hostfile", str(path))
    path.unlink()
    path.write_text("node1\x1b]0;pwned\x07 slots=2 x\n")
    with pytest.raises(ValueError, match="line 1") as caught:
        plan("mpirun", "--hostfile", str(path))
    assert "\x1b" not in str(caught.value)


def test_a_plans_notes_are_comments() -> None:
    """Catches a note with a line break whose second line would be executed."""
    assert str(Plan(notes=("edit /tmp/a\ntouch pwned",))) == "# edit /tmp/a\\ntouch pwned"
