"""Manifests against the fields that the operators' CRDs have, and the command they hold, started twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.launch.test_user_settings import made, text
from tests.support.launchers import REPOSITORY
from tests.support.warm_ranks import free_port

CRDS = Path(__file__).parent / "crds"
KINDS = ("mpijob", "pytorchjob", "trainjob")
_PYTHON = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "array": list,
    "object": dict,
    "int-or-string": (int, str),
}


def problems(value: Any, allowed: dict[str, Any] | str, place: str) -> list[str]:
    """What a schema has against a value: an unknown field, a wrong type, a missing field."""
    schema: dict[str, Any] = {"type": allowed} if isinstance(allowed, str) else allowed
    kind = _PYTHON[schema["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # type: ignore[arg-type]
        return [f"{place}: {value!r} is no {schema['type']}"]
    found = (
        [] if value in schema.get("enum", [value]) else [f"{place}: {value!r} is none of {schema['enum']}"]
    )
    if isinstance(value, dict):
        found += [f"{place}.{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, inner in value.items():
            if "each" in schema:
                found += problems(inner, schema["each"], f"{place}.{name}")
            elif "fields" in schema:
                known = schema["fields"].get(name)
                found += (
                    [f"{place}.{name} is no field"]
                    if known is None
                    else problems(inner, known, f"{place}.{name}")
                )
    if isinstance(value, list) and "each" in schema:
        for index, inner in enumerate(value):
            found += problems(inner, schema["each"], f"{place}[{index}]")
    return found


def crd(kind: str) -> dict[str, Any]:
    return dict(json.loads((CRDS / f"{kind}.json").read_text()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    ["", "--cpu --nodes 1", "--directory /data --secret KEY=vault/key --env A=$(B) --profile frontier"],
    ids=["plain", "one node of CPUs", "everything"],
)
def test_a_manifest_has_fields_of_the_crd_only(kind: str, options: str) -> None:
    """Catches a field that the operator does not have, in the wrong place or of the wrong type."""
    manifest, schema = json.loads(text(made(kind, *options.split()))), crd(kind)
    assert (manifest["apiVersion"], manifest["kind"]) == (schema["apiVersion"], schema["kind"])
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert problems(manifest["spec"], schema["spec"], "spec") == []


def test_the_schemas_see_mistakes() -> None:
    """Catches a check that lets everything pass: each of these was a mistake in somebody's manifest."""
    spec = json.loads(text(made("trainjob")))["spec"]
    schema = crd("trainjob")["spec"]
    assert problems(spec, schema, "spec") == []
    spec["trainer"]["numProcPerNode"] = "4"  # as in older versions
    spec["trainer"]["workingDir"] = "/data"
    spec["trainer"]["env"][0] = {"value": "1"}
    del spec["runtimeRef"]["name"]
    assert sorted(problems(spec, schema, "spec")) == [
        "spec.runtimeRef.name is missing",
        "spec.trainer.env[0].name is missing",
        "spec.trainer.numProcPerNode: '4' is no integer",
        "spec.trainer.workingDir is no field",
    ]
    for kind in KINDS:
        assert re.fullmatch(r"v[\d.]+", crd(kind)["version"])
        assert crd(kind)["source"].startswith("https://github.com/kubeflow/")


_PROGRAM = """
import os, sys
from pathlib import Path
rank, size = (os.environ.get(a) or os.environ[b] for a, b in (
    ("OMPI_COMM_WORLD_RANK", "RANK"), ("OMPI_COMM_WORLD_SIZE", "WORLD_SIZE")))
again = (Path(sys.argv[1]) / "again").exists()
hosts = os.environ["ARSG_EXPECTED_HOSTS"]
print(f"again: {again}, rank {rank} of {size}, {hosts} host, {os.environ['MINE']}", flush=True)
sys.exit(0 if again else 1)
"""  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize(
    "kind",
    [
        "mpijob",
        pytest.param("pytorchjob", marks=pytest.mark.turn(0)),
        pytest.param("trainjob", marks=pytest.mark.turn(1)),
    ],
)
def test_the_command_of_a_manifest_starts_twice(kind: str, tmp_path: Path) -> None:
    """Catches a command that a container cannot run, or cannot run again in place of one that failed (OnFailure)."""
    (tmp_path / "program.py").write_text(_PROGRAM)
    options = ["--nodes", "1", "--ranks-per-node", "2", "--cpu", "--env", "MINE=$(MINE) it's $HOME"]
    arguments = [*options, "--directory", str(tmp_path)]
    plan = made(kind, *arguments, program=[str(tmp_path / "program.py"), str(tmp_path)])
    spec = json.loads(text(plan))["spec"]
    if kind == "trainjob":
        container = spec["trainer"]
    else:
        replicas = spec["mpiReplicaSpecs" if kind == "mpijob" else "pytorchReplicaSpecs"]
        first = replicas["Launcher" if kind == "mpijob" else "Master"]
        assert first["restartPolicy"] == "OnFailure"
        container = first["template"]["spec"]["containers"][0]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    of_operator = {
        "PET_NODE_RANK": "0", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()), "OMPI_MCA_orte_default_hostfile": str(hostfile),
    }  # fmt: skip
    environment = {entry["name"]: entry["value"] for entry in container["env"]} | of_operator

    def expanded(word: str) -> str:
        """As Kubernetes does: $(NAME) of the environment, $$ for a dollar."""
        return re.sub(
            r"\$\$|\$\((\w+)\)", lambda found: environment.get(found[1], found[0]) if found[1] else "$", word
        )

    command = [expanded(word).replace("/etc/mpi/hostfile", str(hostfile)) for word in container["command"]]
    environment = {name: expanded(value) for name, value in environment.items()}
    # The image's interpreter, found on its PATH.
    image = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    image["PYTHONPATH"] = str(REPOSITORY)

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=image | environment, capture_output=True, text=True, timeout=240
        )

    failed = start()
    assert failed.returncode != 0, failed.stdout + failed.stderr
    assert "again: False" in failed.stdout, failed.stderr
    (tmp_path / "again").touch()
    done = start()
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"again: True, rank {rank} of 2, 1 host, $(MINE) it's $HOME" in done.stdout
