"""Every target's plan, read as the launcher or shell behind it reads it."""

import argparse
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arsg_dist.cli.launch import command as launch
from arsg_dist.cli.launch.job import Host, Job, Plan, parse_hosts, read_hostfile
from arsg_dist.cli.launch.profiles import load_profile, profile_names
from arsg_dist.cli.launch.quoting import for_pdsh
from arsg_dist.cli.launch.targets import TARGETS
from arsg_dist.engine import ENGINES
from tests.support.launchers import REPOSITORY

HOSTS = ["--hosts", "node1:2,node2:3"]
NODES = ["--nodes", "2", "--ranks-per-node", "4"]
PLACES = {"hosts": HOSTS, "nodes": NODES, "here": ["--ranks-per-node", "4"]}
NEEDED = {
    "deepspeed-per-node": ["--node-rank", "1"],
    "mpijob": ["--image", "arsg:1"],
    "pytorchjob": ["--image", "arsg:1"],
    "trainjob": ["--image", "arsg:1"],
}
PROGRAM = ["train.py", "--lr", "0.1"]
HOSTILE = [
    "a b", "$(touch /tmp/x)", "`id`", "it's", 'say "hi"', 'a \\"b $HOME', "%h", "x;y", "*", "", "\\", " -- ",
]  # fmt: skip


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(list(arguments))


def plan(target: str, *options: str, program: list[str] = PROGRAM, engine: str | None = None) -> Plan:
    kind = TARGETS[target]
    chosen = ["--engine", engine or next(iter(kind.engines()))] if len(kind.rendezvous) > 1 else []
    required = NEEDED.get(target, [])
    places = PLACES[kind.places]
    if any(option in ("--hosts", "--hostfile") for option in options):
        places = []
    return launch.make_plan(parse(target, *chosen, *places, *required, *options, "--", *program))


def texts(plan: Plan) -> str:
    return "\n".join(plan.files.values())


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_has_the_program_and_a_timeout_on_every_stack(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a target that drops arguments, or whose job waits for ever for a host that is gone."""
    monkeypatch.chdir(tmp_path)  # where manifests are written: their --directory is in the image
    for engine, rendezvous in TARGETS[target].engines().items():
        made = plan(target, "--directory", str(tmp_path), "--detect-seconds", "37", engine=engine)
        everything = str(made)
        assert "train.py" in everything
        assert "0.1" in everything
        if rendezvous == "torch":
            assert "DEEPSPEED_TIMEOUT" in everything
        else:
            assert "HOROVOD_GLOO_TIMEOUT_SECONDS" in everything
            # A rank that is alive and does not come: shell text, or JSON.
            assert re.search(
                r'STALL_SHUTDOWN_TIME_SECONDS(=|",\s*"value": ")37\b', f"{texts(made)} {everything}"
            )
        assert not any(path.exists() for path in made.files), "planning must write nothing"
        assert all(path.parent == tmp_path for path in made.files)


def test_what_can_be_launched_is_what_the_table_of_engines_has() -> None:
    """Catches an engine that no target starts, and one that is wired up like another kind."""
    startable = {name for kind in TARGETS.values() for name in kind.engines()}
    assert startable == {name for name, entry in ENGINES.items() if entry.rendezvous is not None}
    assert plan("slurm", engine="horovod-sharded") == plan("slurm", engine="horovod")
    assert plan("slurm", engine="horovod") != plan("slurm", engine="deepspeed")


@pytest.mark.parametrize("target", TARGETS)
def test_dry_run_prints_a_shell_script_and_does_nothing(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a --dry-run that runs, or prints something else than what would be run."""
    kind = TARGETS[target]
    chosen = ["--engine", "deepspeed"] if len(kind.rendezvous) > 1 else []
    arguments = [target, *chosen, *PLACES[kind.places], *NEEDED.get(target, []), "--directory", str(tmp_path)]
    options = parse(*arguments, "--dry-run", "--", *PROGRAM)
    assert launch.run(options) == 0
    script = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    made = launch.make_plan(options)
    assert shlex.join(made.command) in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    # Executed up to the command, the printed script makes the same files.
    without_command = script.replace(shlex.join(made.command), ":")
    subprocess.run(["bash", "-e"], input=without_command, text=True, check=True, cwd=tmp_path)
    assert {path: path.read_text() for path in made.files} == made.files


def run_as_batch_script(script: str, tmp_path: Path, launcher: str) -> list[str]:
    """Executes a batch script with a launcher that records the arguments of the program."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    record = tmp_path / "arguments.json"
    (bin_directory / launcher).write_text(
        "#!/usr/bin/env python3\nimport json, sys\n"
        f"arguments = sys.argv[sys.argv.index('train.py'):]\njson.dump(arguments, open({str(record)!r}, 'w'))\n"
    )
    (bin_directory / "scontrol").write_text("#!/bin/sh\necho node1\n")
    for path in bin_directory.iterdir():
        path.chmod(0o755)
    (tmp_path / "nodes").write_text("node1\nnode2\n")
    environment = os.environ | {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PBS_JOBID": "12.server",
        "LSB_DJOB_HOSTFILE": str(tmp_path / "nodes"),
        "LSB_JOBID": "12",
    }
    environment |= {"LD_LIBRARY_PATH": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash"], input=script, text=True, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(record.read_text()))


@pytest.mark.parametrize(
    ("target", "options", "launcher"),
    [
        ("slurm", [], "srun"),
        pytest.param("slurm", ["--through", "mpirun"], "mpirun", marks=pytest.mark.turn(0)),
        ("slurm", ["--through", "horovodrun"], "horovodrun"),
        pytest.param("pbs", [], "mpiexec", marks=pytest.mark.turn(1)),
        pytest.param("lsf", [], "mpirun", marks=pytest.mark.turn(2)),
        ("lsf", ["--through", "jsrun"], "jsrun"),
    ],
)
def test_hostile_arguments_survive_a_batch_script(
    target: str, options: list[str], launcher: str, tmp_path: Path
) -> None:
    """Catches arguments or a directory that a shell splits, expands or executes."""
    directory = tmp_path / "my dir; $(touch pwned)"
    directory.mkdir()
    made = plan(
        target, *options, "--directory", str(directory), "--env", "MINE=$(touch pwned) 'x",
        program=["train.py", *HOSTILE], engine="horovod",
    )  # fmt: skip
    assert run_as_batch_script(texts(made), tmp_path, launcher) == ["train.py", *HOSTILE]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("argument", HOSTILE)
def test_hostile_arguments_survive_deepspeeds_pdsh_runner(argument: str) -> None:
    """Catches an argument that the remote shell reads differently, by doing what DeepSpeed and pdsh do to it."""
    passed = for_pdsh(argument)
    if " " in passed:
        passed = '"{}"'.format(passed.replace('"', '\\"'))  # PDSHRunner.parse_user_args
    passed = passed.replace("%%", "%")  # pdsh
    assert "%h" not in for_pdsh(argument).replace("%%", "")
    shown = subprocess.run(["sh", "-c", f"printf %s {passed}"], capture_output=True, text=True, check=True)
    assert shown.stdout == argument


@pytest.mark.parametrize(
    "name", ["a b", "-oProxyCommand=x", "a;b", "$(id)", "", "a'b", "user@host", "::1", "nöde"]
)
def test_what_is_no_host_name_is_refused(name: str) -> None:
    """Catches an option or a command in place of a host, which ssh would execute."""
    with pytest.raises(ValueError, match="host name"):
        Host(name, 1)


def test_host_lists_are_checked(tmp_path: Path) -> None:
    """Catches hosts silently merged, left out, or given no rank."""
    assert parse_hosts("a:2, b") == (Host("a", 2), Host("b", 1))
    for text, message in [("a:x", "NAME:SLOTS"), ("a:2,a:2", "more than once"), ("a:0", "at least 1")]:
        with pytest.raises(ValueError, match=message):
            parse_hosts(text)
    path = tmp_path / "hosts"
    path.write_text("# comment\nnode1 slots=4\n\nnode2 slots=2 # slow\n")
    assert read_hostfile(path) == (Host("node1", 4), Host("node2", 2))
    for text, message in [("node1\n", "line 1"), ("", "no host"), ("node1 slots=4 max=2\n", "line 1")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_hostfile(path)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("mpirun", ["--env", "A B=1"], "not the name"),
        ("mpirun", ["--env", "A"], "NAME=VALUE"),
        ("mpirun", ["--env", "A=1\n2"], "line break"),
        ("mpirun", ["--detect-seconds", "2"], "at least 10"),
        ("deepspeed-pdsh", ["--env", "A=$HOME"], "use the target mpirun"),
        ("deepspeed-pdsh", ["--directory", "/tmp/a b"], "working directory"),
        ("deepspeed-pdsh", ["--master-addr", "x;y"], "host name"),
        ("deepspeed-per-node", ["--node-rank", "2"], "not one of the 2 hosts"),
        ("slurm", ["--job-name", "a\n#SBATCH --x"], "one word"),
        ("slurm", ["--through", "horovodrun"], "Horovod programs only"),
        ("horovodrun-elastic", ["--min-ranks", "9"], "--max-ranks 5"),
        ("mpijob", ["--job-name", "Up_per"], "lower-case"),
        ("trainjob", ["--job-name", "1st"], "begin with a letter"),
        ("pytorchjob", ["--job-name", "a" * 51], "at most 50"),
        ("local", ["--ranks-per-node", "0"], "at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(
    target: str, options: list[str], message: str
) -> None:
    """Catches a bad setting that reaches a scheduler, a remote shell, or nobody."""
    with pytest.raises(ValueError, match=message):
        plan(target, *options, engine="deepspeed" if "torch" in TARGETS[target].rendezvous else None)


@pytest.mark.parametrize("target", ["mpirun", "mpijob", "slurm --through mpirun", "lsf"])
def test_mpirun_hands_on_what_ranks_on_other_hosts_need(target: str) -> None:
    """Catches timeouts and --env that reach the ranks of the first host only."""
    name, *options = target.split()
    made = plan(name, *options, "--env", "MINE=1", engine="horovod")
    words = re.sub(r'",\s+"', " ", f"{shlex.join(made.command)} {texts(made)}")
    for variable in ("MINE", "HOROVOD_GLOO_TIMEOUT_SECONDS", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "PATH"):
        assert f" -x {variable} " in words


def test_slurm_asks_for_what_the_profile_says_once() -> None:
    """Catches two contradicting directives, of which Slurm takes the last."""
    script = texts(plan("slurm", "--profile", "frontier", "--sbatch=--time=1", "--cpus-per-task", "3"))
    directives = [
        line.split()[1].partition("=")[0] for line in script.splitlines() if line.startswith("#SBATCH")
    ]
    assert len(directives) == len(set(directives))
    assert "--gpus-per-task" in directives
    assert "--gpus-per-node" not in directives
    assert "#SBATCH --time=1\n" in script
    assert "NCCL_SOCKET_IFNAME=hsn0" in script


def test_slurm_resumes_only_a_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    """Catches a requeued job that starts anew, or a first start that asks to resume nothing."""
    program = ["train.py", "--output", "run dir"]
    script = texts(plan("slurm", "--directory", str(tmp_path), program=program))
    assert run_as_batch_script(script, tmp_path, "srun") == program
    (tmp_path / "run dir" / "checkpoints" / "5").mkdir(parents=True)
    for path in (tmp_path / "bin").iterdir():
        path.unlink()
    (tmp_path / "bin").rmdir()
    assert run_as_batch_script(script, tmp_path, "srun") == [*program, "--resume"]


PROGRAMS = {
    "as a file": (["launch/train_imagenet.py", "--output", "runs/a"], ["--resume", "auto"]),
    "as installed": (["/opt/venv/bin/arsg-imagenet", "train", "--output", "runs/a"], ["--resume", "auto"]),
    "with its own": (["launch/train_imagenet.py", "--output", "runs/a", "--resume"], []),
    "with its own value": (["launch/train_imagenet.py", "--resume=false"], []),
    "another command": (["arsg-imagenet", "compare", "runs/a"], []),
    "another program": (["train.py"], []),
}


@pytest.mark.parametrize("target", ["slurm", "pbs", "lsf", "pytorchjob", "mpijob", "trainjob"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_may_be_started_again_resumes_where_it_can(name: str, target: str, tmp_path: Path) -> None:
    """Catches a manifest whose restarted container fails since its run exists already, a requeued job that fails for
    want of a first checkpoint, and a user's own --resume that is given a second one."""
    program, added = PROGRAMS[name]
    written = texts(plan(target, "--directory", str(tmp_path), program=program))
    if target in ("slurm", "pbs", "lsf"):
        line = next(line for line in written.splitlines() if line.startswith("program=("))
        words = shlex.split(line.removeprefix("program=(").removesuffix(")"))
        assert words[-len(program + added) :] == program + added
        assert "program+=" not in written
    else:
        commands = [command for command in commands_of(json.loads(written)) if program[0] in command]
        assert commands
        assert {tuple(command[-len(program + added) :]) for command in commands} == {tuple(program + added)}


def commands_of(manifest: object) -> list[list[str]]:
    """Every command in a manifest."""
    if isinstance(manifest, list):
        return [command for item in manifest for command in commands_of(item)]
    if not isinstance(manifest, dict):
        return []
    own = [manifest["command"]] if "command" in manifest else []
    return own + commands_of(list(manifest.values()))


def test_targets_that_nothing_starts_again_add_nothing() -> None:
    """Catches a `--resume auto` that a user at the keyboard has not asked for."""
    program = ["launch/train_imagenet.py", "--output", "runs/a"]
    assert "--resume" not in str(plan("local", program=program))


def test_every_setting_of_a_profile_has_a_source() -> None:
    """Catches a setting somebody made up."""
    assert {"frontier", "perlmutter", "polaris", "infiniband", "ethernet", "aws-efa"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.sources
        assert all(len(source) > 10 for source in profile.sources.values())


def test_manifests_ask_for_the_right_number_of_pods_and_ranks() -> None:
    """Catches a manifest with one node too many or too few."""
    pytorch = json.loads(texts(plan("pytorchjob")))["spec"]["pytorchReplicaSpecs"]
    assert sum(spec["replicas"] for spec in pytorch.values()) == 2
    assert "--nproc-per-node=4" in pytorch["Master"]["template"]["spec"]["containers"][0]["command"]
    mpi = json.loads(texts(plan("mpijob")))
    assert mpi["apiVersion"] == "kubeflow.org/v2beta1"
    launcher = mpi["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    assert launcher["command"][launcher["command"].index("-np") + 1] == "8"
    assert mpi["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] == 2
    train = json.loads(texts(plan("trainjob")))["spec"]["trainer"]
    assert (train["numNodes"], train["numProcPerNode"]) == (2, 4)
    assert train["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 4}}
    assert "resourcesPerNode" not in json.loads(texts(plan("trainjob", "--cpu")))["spec"]["trainer"]


def test_a_trainjob_runs_in_the_directory_asked_for() -> None:
    """Catches relative paths that are looked up in the image's own working directory: a TrainJob has no such field."""
    command = json.loads(texts(plan("trainjob", "--directory", "/data/my job")))["spec"]["trainer"]["command"]
    assert command[:2] == ["env", "--chdir=/data/my job"]


def test_a_site_profile_adds_to_what_the_target_needs() -> None:
    """Catches a job whose ranks lack their environment because a profile has mpiexec options of its own."""
    script = texts(plan("pbs", "--profile", "polaris"))
    assert "mpiexec --envall --cpu-bind depth -d 16 -n 8 --ppn 4" in script


def test_a_command_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback where the scheduler is on another machine."""
    options = parse("pbs", "--engine", "horovod", *NODES, "--directory", str(tmp_path), "--", *PROGRAM)
    assert launch.run(options) == launch.BAD_INPUT
    assert "qsub is not on PATH" in capsys.readouterr().err


def test_the_job_knows_its_ranks_and_arguments() -> None:
    """Catches a count that forgets uneven hosts."""
    job = Job(
        rendezvous="horovod",
        program=("a.py", "--x=1", "--output", "o"),
        python="python",
        directory=Path(),
        hosts=parse_hosts("a:2,b:3"),
    )
    assert job.ranks == 5
    assert job.argument("--x") == "1"
    assert job.argument("--output") == "o"
    assert job.argument("--y") is None


def test_signals_reach_the_launcher(tmp_path: Path) -> None:
    """Catches a job that goes on after `arsg-dist launch` was told to stop."""
    (tmp_path / "horovodrun").write_text(
        "#!/bin/sh\ntrap 'echo got it; exit 75' USR1\necho ready\nwhile :; do sleep 0.1; done\n"
    )
    (tmp_path / "horovodrun").chmod(0o755)
    command = [sys.executable, "-m", "arsg_dist.cli.main", "launch", "horovodrun", *HOSTS]
    process = subprocess.Popen(
        [*command, "--directory", str(tmp_path), "--", *PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[0] == "got it\n"
    assert process.returncode == 75


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.turn(2))],
    ids=lambda number: number.name,
)
def test_ranks_are_told_to_stop_past_a_launcher_that_would_kill_them(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Catches a stop that goes to mpirun, which gives its ranks no time to save, and Ctrl-C that does; a second signal
    that is lost; and a loader process that is taken for a rank of its own."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, signal, sys, time\n"
        f"def note(number, frame):\n    open('{tmp_path}/got', 'a').write(signal.Signals(number).name + chr(10))\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, note)\n"
        "worker = os.fork()\n"
        f"open('{tmp_path}/ready', 'a').write('x')\n"
        "while worker or os.getppid() > 1: time.sleep(0.05)\n"
    )
    (tmp_path / "mpirun").write_text(
        "#!/bin/sh\ntrap 'echo killed; kill -9 $rank; exit 1' TERM INT\n"
        f"OMPI_COMM_WORLD_RANK=0 {sys.executable} {rank} & rank=$!\nwhile :; do sleep 0.1; done\n"
    )
    (tmp_path / "mpirun").chmod(0o755)
    command = [sys.executable, "-m", "arsg_dist.cli.main", "launch", "local", "--engine", "horovod"]
    process = subprocess.Popen(
        [*command, "--ranks-per-node", "1", "--cpu", "--directory", str(tmp_path), "--", *PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    _wait_for(tmp_path / "ready", "xx")
    os.killpg(process.pid, number)  # as a terminal and a scheduler do
    _wait_for(tmp_path / "got", f"{number.name}\n")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "killed\n"
    assert (process.returncode, (tmp_path / "got").read_text()) == (1, f"{number.name}\n")


RANK = """
import os, signal, time
def note(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b" ")
    if number == signal.SIGUSR1:
        os._exit(75)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGUSR1, note)
os.write(1, b"ready ")
time.sleep(60)
os._exit(1)
"""
LAUNCHER = f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(subprocess.call([sys.executable, "-c", {RANK!r}], env={{"RANK": "0"}}))
"""
WATCHED = f"""
import sys
from arsg_dist.cli.launch import supervise
sys.exit(supervise.run_watched([sys.executable, "-c", {LAUNCHER!r}], ""))
"""


def test_a_ctrl_c_is_passed_on_where_no_terminal_has_sent_it() -> None:
    """Catches an interrupt of `arsg-dist launch` alone, as by a manager of containers, that is ignored: its ranks train
    on."""
    child = subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # in the background, too
    )
    assert child.stdout is not None
    assert child.stdout.read(6) == "ready "
    child.send_signal(signal.SIGINT)
    assert child.stdout.read(7) == "SIGINT "
    child.send_signal(signal.SIGUSR1)  # the second, which goes to the launcher
    assert child.wait(60) == 128 + signal.SIGUSR1


def test_a_ctrl_c_of_a_terminal_comes_to_the_ranks_once() -> None:
    """Catches one that is passed on besides, which a launcher of many hosts takes for a second one."""
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, too
        os.execve(
            sys.executable, [sys.executable, "-c", WATCHED], os.environ | {"PYTHONPATH": str(REPOSITORY)}
        )
    said = os.read(terminal, 6)
    assert said == b"ready "
    os.write(terminal, b"\x03")
    while b"SIGINT " not in said:
        said += os.read(terminal, 100)
    os.kill(child, signal.SIGUSR1)  # heard after an interrupt that came before it
    while b"SIGUSR1 " not in said:
        said += os.read(terminal, 100)
    assert said.count(b"SIGINT") == 1
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    os.close(terminal)


def _wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 60
    while not path.exists() or path.read_text() != text:
        assert time.monotonic() < end, path.read_text() if path.exists() else f"{path} is missing"
        time.sleep(0.05)


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_taken_port_is_said_in_one_line_before_a_rank_starts(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches ranks that import for a quarter of a minute and then find the port taken; and a free one refused."""
    started = list[tuple[str, ...]]()
    monkeypatch.setattr(launch, "run_watched", lambda command, *_, **__: started.append(command) or 0)
    options = ["local", "--engine", engine, "--ranks-per-node", "2", "--cpu", "--directory", str(tmp_path)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert launch.run(parse(*options, "--master-port", str(port), "--", *PROGRAM)) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(
            rf"error: port {port} of this host, .* taken by another program.*--master-port \(now free: \d+\)\n",
            error,
        )
        assert not started
    free = re.findall(r"now free: (\d+)", error)[0]
    assert launch.run(parse(*options, "--master-port", free, "--", *PROGRAM)) == 0
    assert len(started) == 1


def test_a_signal_in_the_moment_of_the_start_is_passed_on() -> None:
    """Catches a launcher that is ended by it and leaves the job running."""
    program = """
import os, signal, subprocess, sys
from arsg_dist.cli.launch import supervise
start = subprocess.Popen
def start_under_fire(*arguments, **settings):
    process = start(*arguments, **settings)
    os.kill(os.getpid(), signal.SIGUSR1)
    return process
subprocess.Popen = start_under_fire
sys.exit(supervise.run_watched(["sleep", "600"], ""))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == 128 + signal.SIGUSR1, "the command did not get the signal"


@pytest.mark.parametrize(
    ("text", "code"), [("lost communication with a remote daemon", 1), ("all is well", 0)]
)
def test_a_lost_host_is_a_failure_whatever_mpirun_says(
    text: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a training that lost a host and is reported as done: Open MPI 5 exits with 0 then."""
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\nprintf 'PRTE has {text}\\n' >&2; echo out\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = parse("mpirun", "--engine", "horovod", *HOSTS, "--directory", str(tmp_path), "--", *PROGRAM)
    assert launch.run(options) == code
    captured = capfd.readouterr()
    assert f"PRTE has {text}\n" in captured.err
    assert captured.out == "out\n"
    assert ("error: mpirun exited with 0" in captured.err) == bool(code)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("slurm --through mpirun", marks=pytest.mark.turn(0)),
        pytest.param("lsf", marks=pytest.mark.turn(1)),
        "pbs",
    ],
)
def test_a_lost_host_is_a_failure_of_a_batch_job(target: str, tmp_path: Path) -> None:
    """Catches a batch script that calls Open MPI 5 without the check, so that the scheduler counts the job as done."""
    fakes = {
        "mpirun": "echo 'PRTE has lost communication with a remote daemon' >&2",
        "scontrol": "echo node1",
    }
    for name, body in (fakes | {"mpiexec": fakes["mpirun"]}).items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("node1\n")
    planted = tmp_path / "arsg_dist" / "__init__.py"  # beside the job: not the one to be imported
    planted.parent.mkdir()
    planted.write_text("raise SystemExit('a module of the working directory was imported')\n")
    options = parse(
        *target.split(), "--engine", "horovod", "--nodes", "1", "--ranks-per-node", "2", "--directory", str(tmp_path),
        "--", *PROGRAM,
    )  # fmt: skip
    (script,) = launch.make_plan(options).files.values()
    variables = {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1", "LSB_JOBID": "1", "PBS_JOBID": "1.server",
        "LSB_DJOB_HOSTFILE": str(tmp_path / "hosts"), "PBS_NODEFILE": str(tmp_path / "hosts"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "exited with 0, but lost communication" in done.stderr


@pytest.mark.parametrize(
    ("command", "rest", "code"),
    [
        ("watch sh -c", ["echo lost communication with a remote daemon >&2"], 1),
        pytest.param(
            "cli launch local --engine horovod --ranks-per-node 4 --dry-run --",
            PROGRAM,
            0,
            marks=pytest.mark.turn(2),
        ),
    ],
)
def test_names_in_scripts_written_before_still_run(command: str, rest: list[str], code: int) -> None:
    """Catches a batch script of the last release that fails, or is not told what to write instead."""
    start = [sys.executable, "-P", "-m", *f"arsg_dist.launch.{command}".split(), *rest]
    done = subprocess.run(start, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert (
        "FutureWarning: arsg_dist.launch will be removed: write arsg_dist.cli.launch.supervise" in done.stderr
    )
