"""Target × what the user has set → what the plan holds: kept, added to, or refused with both values."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from arsg_dist.cli.launch import command as launch
from arsg_dist.cli.launch.job import Plan
from arsg_dist.cli.launch.settings import LISTS, UserSettings, add_ssh_options, join
from arsg_dist.cli.launch.targets import TARGETS
from tests.cli.launch.test_targets import NEEDED, PLACES, PROGRAM, parse

ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
HOROVOD_TIMEOUT = "HOROVOD_GLOO_TIMEOUT_SECONDS"


def made(
    target: str,
    *options: str,
    here: dict[str, str] | None = None,
    engine: str | None = None,
    program: list[str] = PROGRAM,
) -> Plan:
    """The plan of "TARGET OPTION ..." where only these variables are set."""
    name, *more = target.split()
    kind = TARGETS[name]
    chosen = ["--engine", engine or next(iter(kind.engines()))] if len(kind.rendezvous) > 1 else []
    places = [] if "--hosts" in (*options, *more) else PLACES[kind.places]
    arguments = [name, *chosen, *places, *NEEDED.get(name, []), *more, *options, "--", *program]
    return launch.make_plan(parse(*arguments), here=here or {})


def text(plan: Plan) -> str:
    return "\n".join(plan.files.values())


def variables_of_manifest(plan: Plan) -> dict[str, str]:
    found = re.findall(r'"name": "(\w+)",\s*"value": "((?:[^"\\]|\\.)*)"', text(plan))
    return {name: json.loads(f'"{value}"') for name, value in found}


def set_by(plan: Plan) -> set[str]:
    """The variables that a plan sets: for its command, in a file of variables, in a script, in a manifest."""
    in_files = re.findall(r"^(?:\[ -n .*\] \|\| )?(?:export )?([A-Z]\w+)=", text(plan), re.MULTILINE)
    return {*plan.environment, *in_files, *variables_of_manifest(plan)}


def comes_out(plan: Plan, name: str, here: dict[str, str]) -> str:
    """What the ranks, or the launcher that reads it, get for a variable."""
    if name in plan.environment:
        return plan.environment[name]
    if name in (of_manifest := variables_of_manifest(plan)):
        return of_manifest[name]
    if of_file := re.findall(rf"^{name}=(.*)$", text(plan), re.MULTILINE):
        return str(of_file[-1])
    lines = [line for line in text(plan).splitlines() if re.search(rf"\bexport {name}=", line)]
    shown = subprocess.run(
        ["bash", "-uc", "\n".join([*lines, f'printf %s "${{{name}:-}}"'])],
        env={"PATH": os.environ["PATH"], **here}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return shown.stdout


WAYS = [
    *(
        f"{name} {engine}"
        for name, kind in TARGETS.items()
        for engine in ("deepspeed", "horovod")
        if engine in kind.engines()
    ),
    "slurm --through=mpirun horovod",
    "slurm --through=horovodrun horovod",
    "lsf --through=jsrun horovod",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_no_variable_that_a_target_sets_overwrites_the_users(way: str) -> None:
    """Catches a variable, of any target, that is set without a look at what the user has set; also one added later."""
    target, engine = way.rsplit(" ", 1)
    in_containers = TARGETS[target.split()[0]].in_containers
    # How the launcher is told of the rest, and a meeting point that is no setting (below).
    own = {"DS_ENV_FILE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONSAFEPATH", "SRUN_CPUS_PER_TASK"}
    names = sorted(set_by(made(target, engine=engine)) - own)
    assert {"ARSG_COLLECTIVE_SECONDS" if engine == "deepspeed" else HOROVOD_TIMEOUT} <= set(names)
    for name in names:
        value = "-p 2222" if name in LISTS else "7"
        here = {} if in_containers else {name: value}
        given = ["--env", f"{name}={value}"] if in_containers else []
        try:
            plan = made(target, *given, here=here, engine=engine)
        except ValueError as refusal:
            said = str(refusal)
        else:
            said = ""
        if said:
            assert f"{name}={value}" in said
            continue
        if name in LISTS:
            assert (
                comes_out(plan, name, here) == f"-p 2222 {comes_out(made(target, engine=engine), name, {})}"
            )
        else:
            assert comes_out(plan, name, here) == value, name
            assert any(f"{name}={value}" in note for note in plan.notes) != in_containers, (
                "kept, but not said"
            )


KEPT = [
    # target, variable, its value, what the plan holds
    ("deepspeed-pdsh", "PDSH_SSH_ARGS_APPEND", "-p 2222", f"PDSH_SSH_ARGS_APPEND='-p 2222 {ALIVE}'"),
    ("deepspeed-pdsh", "PDSH_SSH_ARGS_APPEND", "-oServerAliveInterval=60",
     "PDSH_SSH_ARGS_APPEND='-oServerAliveInterval=60 -o ServerAliveCountMax=3'"),
    ("deepspeed-pdsh", "NCCL_DEBUG", "INFO", "\nNCCL_DEBUG=INFO\n"),
    ("deepspeed-pdsh --profile ethernet", "NCCL_SOCKET_IFNAME", "eth7", "\nNCCL_SOCKET_IFNAME=eth7\n"),
    ("deepspeed-pdsh", "MASTER_PORT", "4711", " --master_port 4711 "),
    ("deepspeed-pdsh", "MASTER_ADDR", "10.0.0.1", " --master_addr 10.0.0.1 "),
    ("local", "MASTER_PORT", "4711", " --master_port 4711 "),
    ("deepspeed-per-node", "MASTER_PORT", "4711", " --master_port 4711 "),
    ("mpirun", "MASTER_PORT", "4711", "MASTER_PORT=4711\n"),
    ("mpirun", "PRTE_MCA_plm_ssh_args", "-p 2222", f"PRTE_MCA_plm_ssh_args='-p 2222 {ALIVE}'"),
    # A user knows one of the names; Open MPI 5 reads the second only.
    ("mpirun", "OMPI_MCA_plm_rsh_args", "-p 2222", f"PRTE_MCA_plm_ssh_args='-p 2222 {ALIVE}'"),
    ("mpirun", "PRTE_MCA_plm_rsh_args", "-p 2222", f"PRTE_MCA_plm_rsh_args='-p 2222 {ALIVE}'"),
    ("mpirun", "OMPI_MCA_oob_tcp_keepalive_time", "7", "PRTE_MCA_oob_tcp_keepalive_time=7\n"),
    ("mpirun", "NCCL_DEBUG", "INFO", " -x NCCL_DEBUG "),
    ("mpirun", "FI_PROVIDER", "cxi", " -x FI_PROVIDER "),
    ("mpirun", "UCX_NET_DEVICES", "mlx5_0:1", " -x UCX_NET_DEVICES "),
    ("mpirun", "HOROVOD_FUSION_THRESHOLD", "1", " -x HOROVOD_FUSION_THRESHOLD "),
    ("mpirun --profile aws-efa", "OMPI_MCA_btl", "tcp,self,vader", "OMPI_MCA_btl=tcp,self,vader\n"),
    ("deepspeed-openmpi", "OMPI_MCA_btl_tcp_if_include", "hsn0", "--mca btl_tcp_if_include hsn0"),
    ("horovodrun", "HOROVOD_GLOO_IFACE", "ib0", " --network-interface ib0 "),
    ("horovodrun", "NCCL_SOCKET_IFNAME", "^lo", " 'NCCL_SOCKET_IFNAME=^lo' "),  # horovodrun would set its own
    ("horovodrun-elastic", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "9", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=9\n"),
    ("slurm", "SLURM_MPI_TYPE", "pmix_v4", " --mpi=pmix_v4 "),
    ("slurm", "SBATCH_SIGNAL", "B:TERM@300", "SBATCH_SIGNAL=B:TERM@300 of the environment here is kept"),
    ("slurm", "SBATCH_TIMELIMIT", "60", "SBATCH_TIMELIMIT=60 of the environment here is kept"),
    ("slurm --env TOKEN", "SBATCH_EXPORT", "NONE", "sbatch --export=TOKEN "),
    ("slurm --env TOKEN", "SBATCH_EXPORT", "A,B", "sbatch --export=A,B,TOKEN "),
    ("slurm --profile frontier", "NCCL_SOCKET_IFNAME", "eth7", "export NCCL_SOCKET_IFNAME=eth7\n"),
    ("pbs", "NCCL_DEBUG", "INFO", "export NCCL_DEBUG=INFO\n"),  # qsub hands nothing on
    ("pbs", "FI_PROVIDER", "cxi", "export FI_PROVIDER=cxi\n"),
    ("lsf", "OMPI_MCA_plm_rsh_args", "-p 2222", "export PRTE_MCA_plm_ssh_args='-p 2222'\n"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "name", "value", "held"), KEPT)
def test_what_the_user_has_set_is_in_the_plan(target: str, name: str, value: str, held: str) -> None:
    """Catches a setting that is overwritten, does not reach ranks of other hosts, or is lost where it is added to."""
    here = {name: value, "TOKEN": "secret"}
    engine = (
        "horovod" if "horovod" in TARGETS[target.split()[0]].engines() and name != "MASTER_PORT" else None
    )
    shown = str(made(target, here=here, engine=engine))
    assert held in shown
    assert "secret" not in shown


REFUSED = [
    # target, variable, its value, the other value that the message has
    ("deepspeed-pdsh", "PDSH_RCMD_TYPE", "rsh", "PDSH_RCMD_TYPE=ssh"),
    ("deepspeed-pdsh --master-port 1234", "MASTER_PORT", "4711", "--master-port 1234"),
    ("deepspeed-openmpi", "OMPI_MCA_btl", "tcp,self", "OMPI_MCA_btl=^openib"),
    ("deepspeed-openmpi", "OMPI_MCA_btl_tcp_if_exclude", "lo", "OMPI_MCA_btl_tcp_if_include=eth0"),
    ("deepspeed-openmpi --interface ib0", "OMPI_MCA_btl_tcp_if_include", "eth1", "--interface ib0"),
    ("mpirun", "HOROVOD_CONTROLLER", "gloo", "HOROVOD_CONTROLLER=mpi"),
    ("mpirun --detect-seconds 40", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "600", "--detect-seconds 40"),
    ("horovodrun", "HOROVOD_CPU_OPERATIONS", "MPI", "HOROVOD_CPU_OPERATIONS=gloo"),
    ("horovodrun --interface eth0", "HOROVOD_GLOO_IFACE", "ib0", "--interface eth0"),
    ("slurm --time 2:00:00", "SBATCH_TIMELIMIT", "60", "--time 2:00:00"),
    ("slurm --queue long", "SBATCH_PARTITION", "short", "--partition long"),
    ("slurm --sbatch=-pshort", "SBATCH_PARTITION", "long", "--partition short"),
    ("slurm", "SBATCH_SIGNAL", "KILL@60", "--signal=B:USR1@90"),
    ("slurm", "SLURM_MPI_TYPE", "pmi2", "SLURM_MPI_TYPE=pmix"),
    ("slurm", "SLURM_KILL_BAD_EXIT", "0", "SLURM_KILL_BAD_EXIT=1"),
]


@pytest.mark.parametrize(("target", "name", "value", "other"), REFUSED)
def test_what_cannot_be_kept_is_refused_with_both_values(
    target: str, name: str, value: str, other: str
) -> None:
    """Catches a setting that the launcher behind a target overrules without a word."""
    engine = "horovod" if "horovod" in TARGETS[target.split()[0]].engines() else None
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}")) as refusal:
        made(target, here={name: value}, engine=engine)
    assert other in str(refusal.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("slurm --sbatch=--nodes=4", "--sbatch=--nodes=4 contradicts --nodes 2"),
        ("slurm --sbatch=-n9", "--sbatch=--ntasks=9 contradicts --nodes times --ranks-per-node 8"),
        ("slurm --time 5 --sbatch=-t9", "--sbatch=--time=9 contradicts --time 5"),
        ("slurm --sbatch=--signal=KILL@9", "--sbatch=--signal=KILL@9 cannot be kept"),
        ("pbs --resource select=3:ncpus=2", "select=3:ncpus=2 asks for 3 chunks, --nodes 2 for 2"),
        ("pbs --time 1:00 --resource walltime=2:00", "--time 1:00 contradicts --resource walltime=2:00"),
        ("mpijob --env OMPI_MCA_plm_rsh_args=-v", "OMPI_MCA_plm_rsh_args=-v cannot be kept: the operator"),
        ("pytorchjob --env MASTER_PORT=1", "MASTER_PORT=1 cannot be kept: the operator"),
        ("local --master-port 0", "not a port"),
        ("horovodrun --env NCCL_SOCKET_IFNAME", "--env NCCL_SOCKET_IFNAME cannot be kept: horovodrun"),
    ],
)
def test_options_that_contradict_each_other_are_refused(target: str, message: str) -> None:
    """Catches a job of another size or time than the user believes, and a manifest whose variables nobody reads."""
    with pytest.raises(ValueError, match=re.escape(message)):
        made(target, here={"NCCL_SOCKET_IFNAME": "eth0"} if "horovodrun" in target else {})


def test_an_engine_is_said_once_or_alike() -> None:
    """Catches ranks that are wired up for one engine and train with another, each alone."""
    for target, engine, of_program in (
        ("slurm", "deepspeed", "horovod"),
        ("deepspeed-pdsh", "deepspeed", "horovod-sharded"),
    ):
        with pytest.raises(ValueError, match=f"contradicts the program's own --engine {of_program}"):
            made(target, engine=engine, program=["a.py", "--engine", of_program])
    assert "--engine horovod-sharded" in str(
        made("slurm", engine="horovod", program=["a.py", "--engine", "horovod-sharded"])
    )


def test_settings_of_the_place_of_submission_stay_out_of_a_manifest() -> None:
    """Catches a laptop's network interface, interpreter or directory in a pod."""
    here = {"NCCL_SOCKET_IFNAME": "wlan0", "DEEPSPEED_TIMEOUT": "99", "OMPI_MCA_btl": "tcp"}
    for target in ("mpijob", "pytorchjob", "trainjob"):
        plan = made(target, here=here)
        assert plan == made(target)
        assert str(Path.cwd()) not in text(plan)
        assert '"python",' in text(plan)
        assert "workingDir" not in text(plan)
        assert "--chdir" not in text(plan)
        placed = made(target, "--directory", "/data/my job", "--python", "/opt/python")
        assert "/data/my job" in text(placed)
        assert '"/opt/python",' in text(placed)
        assert all(path.parent == Path.cwd() for path in placed.files), "the manifest itself is written here"
        with pytest.raises(ValueError, match="must begin with /"):
            made(target, "--directory", "data")


def test_an_mpijob_names_the_hostfile_that_open_mpi_5_reads() -> None:
    """Catches all ranks in the launcher's pod: the operator names its hostfile for Open MPI 4 only."""
    command = json.loads(text(made("mpijob")))["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]
    words = command["containers"][0]["command"]
    assert words[words.index("--hostfile") + 1] == "/etc/mpi/hostfile"
    assert "--hostfile" not in text(made("mpijob", "--env", "PRTE_MCA_prte_default_hostfile=/my/hosts"))


def test_variables_of_deepspeeds_own_file_reach_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a .deepspeed_env that nobody reads because DS_ENV_FILE names another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nONLY_HOME=1\nPATH=/opt/bin:$PATH\n")
    (tmp_path / ".deepspeed_env").write_text("\n# comment\nNCCL_DEBUG=INFO\nDEEPSPEED_TIMEOUT=9\nMINE=2\n")
    (tmp_path / "other").write_text("OTHER=3\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = ["--directory", str(tmp_path)]
    for target in ("deepspeed-pdsh", "deepspeed-openmpi"):
        plan = made(target, *directory, "--env", "MINE=1", here={"NCCL_DEBUG": "TRACE"})
        written = plan.files[Path(plan.environment["DS_ENV_FILE"])].splitlines()
        assert {"NCCL_DEBUG=INFO", "ONLY_HOME=1", "PATH=/opt/bin:$PATH", "DEEPSPEED_TIMEOUT=9", "MINE=1"} < {
            *written
        }
        names = [line.partition("=")[0] for line in written]
        assert len(names) == len(set(names))
        assert "DEEPSPEED_TIMEOUT=9 of .deepspeed_env is kept; otherwise it would be 1" in plan.notes
        assert "OTHER=3\n" in text(made(target, *directory, here={"DS_ENV_FILE": "other"}))
    (tmp_path / "other").write_text("no variable\n")
    with pytest.raises(ValueError, match="other, line 1: not NAME=VALUE"):
        made("deepspeed-pdsh", *directory, here={"DS_ENV_FILE": "other"})


def test_what_a_batch_job_finds_set_stays() -> None:
    """Catches a script that overwrites what a module, the site or a line of --setup has set inside the job."""
    for target in ("slurm --through mpirun", "pbs", "lsf"):
        plan = made(target, "--env", "MINE=1", engine="horovod")
        assert comes_out(plan, HOROVOD_TIMEOUT, {HOROVOD_TIMEOUT: "9"}) == "9"
        assert comes_out(plan, "MINE", {"MINE": "9"}) == "1"
        assert comes_out(plan, "ARSG_EXPECTED_HOSTS", {"ARSG_EXPECTED_HOSTS": "9"}) == "2", "of another job"
        if target != "pbs":
            name = "PRTE_MCA_plm_ssh_args"
            assert comes_out(plan, name, {name: "-v"}) == f"-v {comes_out(plan, name, {})}"


def test_deepspeeds_own_ssh_is_spared_where_the_user_has_options_for_it() -> None:
    """Catches a start that fails for a host at port 2222: DeepSpeed itself calls ssh without the runner's options."""
    for target, name in (
        ("deepspeed-pdsh", "PDSH_SSH_ARGS_APPEND"),
        ("deepspeed-pdsh", "PDSH_SSH_ARGS"),
        ("deepspeed-openmpi", "PRTE_MCA_plm_ssh_args"),
    ):
        words = made(target, here={name: "-p 2222"}).command
        assert "--no_ssh_check" in words
        assert words[words.index("--master_addr") + 1] == "node1"
        assert "--no_ssh_check" not in made(target).command


def test_a_policy_of_the_users_takes_the_place_of_mpiruns_options() -> None:
    """Catches --bind-to and --map-by on the command line, before which Open MPI's variables do not count."""
    binding, mapping = (
        {"PRTE_MCA_hwloc_default_binding_policy": "core"},
        {"OMPI_MCA_rmaps_base_mapping_policy": "ppr:1:node"},
    )
    for target in ("mpirun", "slurm --through mpirun", "lsf", "local"):
        assert "--bind-to none --map-by slot" in str(made(target, engine="horovod"))
        assert "--bind-to" not in str(made(target, here=binding, engine="horovod"))
        shown = str(made(target, here=mapping, engine="horovod"))
        assert "--map-by" not in shown
        assert "--bind-to none" in shown
        assert "--oversubscribe" not in shown


def test_other_options_of_sbatch_are_written_as_they_are() -> None:
    """Catches an option taken apart wrongly, one that sbatch never sees, and two ways of asking for GPUs."""
    script = text(
        made(
            "slurm", "--sbatch=-xnode3", "--sbatch=--exclusive", "--sbatch=-t5", "--env", "SBATCH_TIMELIMIT=9"
        )
    )
    assert "#SBATCH -xnode3\n#SBATCH --exclusive\n" in script
    assert re.findall(r"#SBATCH --time=(.*)", script) == ["5"]
    assert "#SBATCH --time=24:00:00\n" in text(made("slurm", "--env", "SBATCH_TIMELIMIT=9"))
    assert "--gpus-per-node" in text(made("slurm"))
    for plan in (made("slurm", "--sbatch=--gres=gpu:4"), made("slurm", here={"SBATCH_GPUS": "8"})):
        assert "--gpus-per-node" not in text(plan)


def test_a_select_of_the_users_takes_the_place_of_ours() -> None:
    """Catches two select lines, of which PBS takes one, and chunks of a single core for several ranks."""
    assert "#PBS -l select=2:ncpus=4:mpiprocs=4:ngpus=4\n" in text(made("pbs"))
    assert "#PBS -l select=2:ncpus=32:mpiprocs=4\n" in text(made("pbs", "--cores-per-rank", "8", "--cpu"))
    own = "select=1:ncpus=8:mpiprocs=4+1:ncpus=4:mpiprocs=4"
    script = text(made("pbs", "--resource", own, "--resource", "place=pack,walltime=60"))
    asked = re.findall(r"#PBS -l (\w+)=(.*)", script)
    assert dict(asked) == {"select": own.removeprefix("select="), "place": "pack", "walltime": "60"}
    assert len(asked) == 3
    assert "ARSG_EXPECTED_HOSTS" not in script, "packed chunks share a host"
    assert "export ARSG_EXPECTED_HOSTS=2\n" in text(made("pbs"))
    assert (
        dict(re.findall(r"#PBS -l (\w+)=(.*)", text(made("pbs", "--profile", "polaris"))))["place"]
        == "scatter"
    )


def test_srun_gets_the_cores_that_sbatch_was_asked_for() -> None:
    """Catches one core per task: since Slurm 22.05 srun does not take over sbatch's --cpus-per-task."""
    (line,) = [line for line in text(made("slurm")).splitlines() if "SRUN_CPUS_PER_TASK" in line]
    for here, cores in (
        ({"SLURM_CPUS_PER_TASK": "7"}, "7"),
        ({"SLURM_CPUS_PER_TASK": "7", "SRUN_CPUS_PER_TASK": "3"}, "3"),
        ({}, "none"),
    ):
        shown = subprocess.run(
            ["bash", "-uc", f"{line}\nsh -c 'echo ${{SRUN_CPUS_PER_TASK:-none}}'"],
            env={"PATH": os.environ["PATH"], **here}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert shown.stdout.strip() == cores


def test_a_meeting_point_left_over_is_not_taken_by_a_batch_job() -> None:
    """Catches the first host of the job out of which this one is submitted, and an --env that is overwritten."""
    for target in ("slurm", "pbs", "lsf"):
        plan = made(target, here={"MASTER_ADDR": "old"})
        assert "old" not in text(plan)
        assert "MASTER_ADDR=old of the environment here is not used" in "".join(plan.notes)
        given = made(target, "--env", "MASTER_ADDR=mine", "--env", "MASTER_PORT=7")
        assert re.findall(r"export (MASTER_\w+)=(.*)", text(given)) == [
            ("MASTER_ADDR", "mine"),
            ("MASTER_PORT", "7"),
        ]


def test_a_secret_is_not_written_because_a_target_sets_it_too() -> None:
    """Catches the value of --env NAME in a file, and a default in its place."""
    for target in ("mpirun", "slurm", "deepspeed-openmpi", "pbs"):
        plan = made(target, "--env", "DEEPSPEED_TIMEOUT", here={"DEEPSPEED_TIMEOUT": "7654"})
        assert "7654" not in str(plan)
        assert "DEEPSPEED_TIMEOUT=" not in str(plan)


@pytest.mark.parametrize("target", ["horovodrun", "horovodrun-elastic"])
def test_ranks_of_this_machine_alone_use_its_loopback(target: str) -> None:
    """Catches an elastic job on one host, which waits for a second one without a word."""
    assert " --network-interface lo " in str(made(target, "--hosts", "localhost:2"))
    assert "--network-interface" not in str(made(target, "--hosts", "localhost:1,node2:1"))
    assert " --network-interface eth0 " in str(made(target, "--hosts", "localhost:2", "--interface", "eth0"))
    if target == "horovodrun-elastic":
        with pytest.raises(ValueError, match="does not start before there are two hosts: give --interface"):
            made(target, "--hosts", "node1:2")
        notes = made(target, "--hosts", "node1:2", "--discovery-script", "./hosts.sh").notes
        assert "does not start before there are two hosts" in "".join(notes)


@pytest.mark.parametrize("target", TARGETS)
def test_the_job_is_told_how_many_hosts_it_was_started_for(target: str) -> None:
    """Catches a target whose job may run on fewer hosts than asked for."""
    plan = made(target)
    fixed = TARGETS[target].fixed_hosts and TARGETS[target].places != "here"
    assert ("ARSG_EXPECTED_HOSTS" in set_by(plan)) == fixed
    if fixed:
        assert comes_out(plan, "ARSG_EXPECTED_HOSTS", {}) == "2"
        if plan.command[0] == "mpirun":
            assert "-x ARSG_EXPECTED_HOSTS" in str(plan)


def test_the_rule_itself() -> None:
    """Catches an option of ssh said twice, and a value for nobody."""
    assert (
        add_ssh_options("-o serveraliveinterval=5", ALIVE)
        == "-o serveraliveinterval=5 -o ServerAliveCountMax=3"
    )
    assert add_ssh_options("", ALIVE).strip() == ALIVE
    user = UserSettings(
        given={"A": "1"}, inherited=("B",), file={"A": "2", "C": "3"}, here={"A": "4", "C": "5", "D": ""}
    )
    joined, notes = join({"A": "a", "B": "b", "C": "c", "D": "d"}, user)
    assert joined == {"A": "1", "C": "3", "D": "d"}
    assert notes == ("C=3 of .deepspeed_env is kept; otherwise it would be c",)


@pytest.mark.parametrize(
    "arguments",
    [
        ["local", "--engine", "horovod", "--ranks-per-node", "2", "train.py", "--lr", "0.1"],
        ["local", "train.py", "--engine", "horovod", "--ranks-per-node", "2"],
        ["slurm", "--engine", "horovod", "--ranks-per-node", "2", "train.py", "--time", "3"],  # one of the launch's own
        ["local", "--engine", "horovod", "--ranks-per-node", "2", "--lr", "0.1", "train.py"],
        ["local", "--engine", "horovod", "--ranks-per-node", "2"],
    ],
)  # fmt: skip
def test_a_forgotten_separator_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches "unrecognized arguments", and an option of the script that the launch takes for its own."""
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
    assert "put -- before the script" in capsys.readouterr().err


def test_what_follows_the_separator_is_the_scripts() -> None:
    """Catches an option of the script, or a second separator, that is lost."""
    options = parse(
        "local", "--engine", "horovod", "--ranks-per-node", "2", "--", "a.py", "--time", "1", "--", "--cpu"
    )
    assert options.program == ["a.py", "--time", "1", "--", "--cpu"]
    assert not options.cpu
    assert parse("local", "--engine", "horovod", "--ranks-per-node", "2", "a.py", "b").program == [
        "a.py",
        "b",
    ]
