"""Write manifests for Kubeflow's operators. Not applied to a cluster yet."""

import argparse
import json
import re
from typing import Any, ClassVar

from arsg_dist.cli.launch import timeouts
from arsg_dist.cli.launch.job import Job, Plan, check_environment
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.settings import join
from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.mpirun import check_mpi_controller, exported, mpirun_options

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# A TrainJob's name begins with a letter; all operators name pods and services after the job, NAME-worker-12, of at most
# 63 characters.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")
_HOSTFILE = "/etc/mpi/hostfile"  # which the operator mounts into the launcher's pod
# Workers come up later than the launcher, with host keys that nobody knows; the job's own key lets nobody else in.
_SSH = "-o ConnectionAttempts=10 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
_NOT_RUN = "compared with the operators' published types only; not applied to a cluster yet"
_SECRET = re.compile(r"(?P<name>[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)/(?P<key>[A-Za-z0-9._-]{1,253})")


class _Manifest(Target):
    """Write a manifest.

    Attributes:
        set_by_operator: variables that the operator sets, whatever the manifest says.
    """

    places: ClassVar = "nodes"
    restarts = True
    in_containers = True
    set_by_operator: ClassVar[re.Pattern[str]]
    cannot_inherit = (
        "a pod inherits nothing from here: make a Kubernetes Secret, give --secret NAME=SECRET/KEY"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what a pod needs."""
        parser.add_argument("--job-name", default="arsg", help="(default: %(default)s)")
        parser.add_argument("--namespace", default="default", help="(default: %(default)s)")
        parser.add_argument(
            "--image", required=True, help="container image with this package (see containers/)"
        )
        parser.add_argument(
            "--secret",
            action="append",
            default=[],
            metavar="NAME=SECRET/KEY",
            help="variable NAME from a Kubernetes Secret; its value is not in the manifest; repeatable",
        )
        parser.add_argument("--shared-memory", default="8Gi", help="size of /dev/shm (default: %(default)s)")

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `kubectl apply` of a manifest in JSON, which needs no quoting rules."""
        if not _NAME.fullmatch(options.job_name):
            raise ValueError(
                f"--job-name {options.job_name!r} must be lower-case letters, digits and '-', begin with a letter, and "
                "be at most 50 long: pods are named after it"
            )
        if not _NAMESPACE.fullmatch(options.namespace):
            raise ValueError(
                f"--namespace {options.namespace!r} must be lower-case letters, digits and '-', at most 63"
            )
        for name in (*job.user.given, *(text.partition("=")[0] for text in options.secret)):
            if self.set_by_operator.fullmatch(name):
                raise ValueError(
                    f"--env {name}={job.user.given.get(name, '...')} cannot be kept: the operator sets {name} itself, "
                    "whatever a manifest says"
                )
        path = job.directory / f"arsg_{self.name}.json"
        manifest = self.manifest(job, options)
        manifest["metadata"] = {"name": options.job_name, "namespace": options.namespace}
        return Plan(
            command=("kubectl", "apply", "-f", str(path)),
            files={path: json.dumps(manifest, indent=2) + "\n"},
            notes=(_NOT_RUN,),
        )

    def manifest(self, job: Job, options: argparse.Namespace) -> dict[str, Any]:
        """Return the object to create, without its metadata."""
        raise NotImplementedError


def _pod(job: Job, options: argparse.Namespace, container: dict[str, Any], *, gpus: int) -> dict[str, Any]:
    limits = {"resources": {"limits": {"nvidia.com/gpu": gpus}}} if gpus else {}
    place = {"workingDir": job.container_directory} if job.container_directory else {}
    mount = {"volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}
    return {
        "spec": {
            "containers": [{"image": options.image, **place, **container, **limits, **mount}],
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}}
            ],
        }
    }


def _literal(text: str) -> str:
    """Escape text of which Kubernetes would replace $(NAME), and $$ by $."""
    return text.replace("$", "$$")


def _secrets(job: Job, options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return variable → reference to an entry of a Secret."""
    references = {}
    for text in options.secret:
        name, _, place = text.partition("=")
        found = _SECRET.fullmatch(place)
        check_environment({name: place})
        if found is None:
            raise ValueError(
                f"--secret {name}=...: what follows must be SECRET/KEY, a Kubernetes Secret and a key in it"
            )
        if name in job.user.given or name in references:
            raise ValueError(f"--secret {name} is given twice, or by --env too: one of them only")
        references[name] = {"name": found["name"], "key": found["key"]}
    return references


def _without(environment: dict[str, str], secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in secrets}


def _variables(environment: dict[str, str], secrets: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    plain = [{"name": name, "value": _literal(value)} for name, value in sorted(environment.items())]
    return plain + [
        {"name": name, "valueFrom": {"secretKeyRef": reference}}
        for name, reference in sorted(secrets.items())
    ]


class MpiJob(_Manifest):
    """MPIJob v2beta1: workers run sshd, a launcher pod runs mpirun with the hostfile the operator writes."""

    name = "mpijob"
    summary = "Kubernetes, Kubeflow's MPIJob v2beta1 (not applied to a cluster yet)"
    rendezvous = ("torch", "horovod")
    # pkg/controller/mpi_job_controller.go of v0.8: put behind the manifest's own, so that they count.
    set_by_operator = re.compile(
        r"OMPI_MCA_(plm_rsh_args|orte_(default_hostfile|set_default_slots|keep_fqdn_hostnames))|K_MPI_JOB_ROLE|"
        r"NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES)"
    )

    def manifest(self, job: Job, options: argparse.Namespace) -> dict[str, Any]:
        """Return the MPIJob."""
        check_mpi_controller(job)
        secrets = _secrets(job, options)
        variables = _without(job.environment, secrets)
        command = ["mpirun", *mpirun_options(True, job.user), "-np", str(job.ranks)]
        if job.user.find("PRTE_MCA_prte_default_hostfile") is None:
            # The operator names it for Open MPI 4 only; 5 would start all ranks in the launcher's pod.
            command += ["--hostfile", _HOSTFILE]
        command += exported("PATH", *sorted({*variables, *secrets}))
        wanted = {
            name: f"{_SSH} {value}" if name.endswith("_args") else value
            for name, value in timeouts.open_mpi_daemons(job.detect_seconds).items()
            if not self.set_by_operator.fullmatch(name)
        }
        daemons, _ = join(wanted, job.user)
        as_root = {
            "runAsUser": 0
        }  # for sshd and its keys; the image's own user is another (containers/Dockerfile)
        launcher = {
            "name": "launcher",
            "securityContext": as_root,
            "command": [*command, *map(_literal, job.rank_command)],
            "env": _variables(variables | daemons, secrets),
        }
        # The operator mounts the job's keys as a directory that others may write to.
        sshd = ["/usr/sbin/sshd", "-De", "-o", "StrictModes=no"]
        worker = {"name": "worker", "command": sshd, "securityContext": as_root}
        return {
            "apiVersion": "kubeflow.org/v2beta1",
            "kind": "MPIJob",
            "spec": {
                "slotsPerWorker": job.ranks_per_node,
                "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 3},
                "mpiReplicaSpecs": {
                    "Launcher": {
                        "replicas": 1,
                        "restartPolicy": "OnFailure",
                        "template": _pod(job, options, launcher, gpus=0),
                    },
                    "Worker": {
                        "replicas": job.nodes,
                        "template": _pod(job, options, worker, gpus=job.ranks_per_node * job.gpus_per_rank),
                    },
                },
            },
        }


def _torchrun(job: Job) -> list[str]:
    return [
        *map(_literal, job.python_module),
        "torch.distributed.run",
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.ranks_per_node}",
    ]


_OF_TORCHRUN = re.compile(r"PET_\w+|MASTER_(ADDR|PORT)|WORLD_SIZE|RANK|PYTHONUNBUFFERED")


class PyTorchJob(_Manifest):
    """PyTorchJob v1 (Kubeflow's training operator): torchrun in every pod; the operator sets the rendezvous."""

    name = "pytorchjob"
    summary = "Kubernetes, Kubeflow's PyTorchJob v1 (not applied to a cluster yet)"
    rendezvous = ("torch",)
    set_by_operator = _OF_TORCHRUN  # pkg/controller.v1/pytorch/envvar.go of v1.9

    def manifest(self, job: Job, options: argparse.Namespace) -> dict[str, Any]:
        """Return the PyTorchJob: a master, other nodes workers, a torchrun in each."""
        command = [
            *_torchrun(job),
            "--node-rank=$(PET_NODE_RANK)",
            "--master-addr=$(PET_MASTER_ADDR)",
            "--master-port=$(PET_MASTER_PORT)",
            *map(_literal, job.program),
        ]
        secrets = _secrets(job, options)
        variables = _variables(_without(job.environment, secrets), secrets)
        container = {"name": "pytorch", "command": command, "env": variables}
        pod = _pod(job, options, container, gpus=job.ranks_per_node * job.gpus_per_rank)
        replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": pod}}
        if job.nodes > 1:
            replicas["Worker"] = {"replicas": job.nodes - 1, "restartPolicy": "OnFailure", "template": pod}
        return {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "spec": {"nprocPerNode": str(job.ranks_per_node), "pytorchReplicaSpecs": replicas},
        }


class TrainJob(_Manifest):
    """TrainJob (Kubeflow Trainer 2): the cluster's runtime `torch-distributed` starts torchrun's environment."""

    name = "trainjob"
    summary = "Kubernetes, Kubeflow Trainer's TrainJob v1alpha1 (not applied to a cluster yet)"
    rendezvous = ("torch",)
    set_by_operator = re.compile(r"PET_\w+")  # pkg/runtime/framework/plugins/torch of v2

    def manifest(self, job: Job, options: argparse.Namespace) -> dict[str, Any]:
        """Return the TrainJob; /dev/shm is set up in the runtime's pod template."""
        secrets = _secrets(job, options)
        # A TrainJob has no working directory of its own.
        place = ("env", f"--chdir={job.container_directory}") if job.container_directory else ()
        trainer: dict[str, Any] = {
            "image": options.image,
            "command": [
                *map(_literal, (*place, *job.python_module)),
                "torch.distributed.run",
                *map(_literal, job.program),
            ],
            "numNodes": job.nodes,
            "numProcPerNode": job.ranks_per_node,  # else as many as there are GPUs, or CPUs
            "env": _variables(_without(job.environment, secrets), secrets),
        }
        if job.gpus_per_rank:
            trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": job.ranks_per_node}}
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer},
        }
