import subprocess
import sys
from importlib import import_module

import pytest

import arsg_dist
from tests.support.launchers import REPOSITORY


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_imports_no_engine() -> None:
    """Catches an import of DeepSpeed or Horovod that makes the optimizer unusable without them."""
    result = python(
        "import sys, arsg_dist; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'deepspeed', 'horovod', 'mpi4py', 'torchvision', 'yaml', 'matplotlib'}))"
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("package", "dependency", "extra"),
    [
        ("arsg_dist.deepspeed", "deepspeed", "arsg-dist[deepspeed]"),
        ("arsg_dist.horovod", "horovod.torch", "arsg-dist[horovod]"),
        ("arsg_dist.imagenet.data.dataset", "torchvision", "arsg-dist[imagenet]"),
        ("arsg_dist.timm", "timm", "arsg-dist[timm]"),
    ],
)
def test_a_missing_dependency_names_the_extra(package: str, dependency: str, extra: str) -> None:
    """Catches a bare ModuleNotFoundError that does not say what to install."""
    result = python(f"import sys; sys.modules[{dependency!r}] = None; import {package}")
    assert result.returncode != 0
    assert extra in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "name"),
    [("boost", "ObservationBoost"), ("beta1_warmup", "Beta1Warmup"), ("loss_plateau", "LossPlateau")],
)
def test_a_path_that_documents_showed_has_the_class_itself(module: str, name: str) -> None:
    """Catches a user's import that broke, or a second class that isinstance does not know."""
    assert getattr(import_module(f"arsg_dist.optim.{module}"), name) is getattr(arsg_dist, name)
