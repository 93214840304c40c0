"""Name what a DeepSpeed config does besides training, and refuse what it must not.

Files, imported modules, services that DeepSpeed 0.19.8 sends to: a config may come from somebody else. Each of these
is said, in `arsg-dist check-config` and at the start of `arsg-imagenet`; refused is what a setting
cannot mean: a name that leads elsewhere, an existing file overwritten.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from arsg_dist.deepspeed.config.rules import OFFLOADS, offload_device
from arsg_dist.safe_io.files import open_regular
from arsg_dist.safe_io.text import printable

_MONITORS: Final = ("tensorboard", "csv_monitor")
_SERVICES: Final = {"wandb": "Weights & Biases", "comet": "Comet"}
_JOB_NAME: Final = "DeepSpeedJobName"
_PROFILE_HEAD: Final = b"DeepSpeed Flops Profiler"
_OFF: Final = ("", "0", "f", "false", "n", "no", "none", "off")
_OWN_PACKAGES: Final = ("arsg_dist", "timm", "torch", "torchvision")


def check_names(config: Mapping[str, Any], source: str) -> None:
    """Refuse the name of a job that leads out of the directory of its logs.

    Raises:
        ValueError: with the setting and the reason.
    """
    for monitor in _MONITORS:
        name = str(_section(config, monitor).get("job_name", _JOB_NAME))
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(
                f"{source} has {monitor}.job_name = {printable(repr(name))}, which leads out of {monitor}.output_path: "
                "DeepSpeed makes a directory of that name there"
            )


def check_overwritten(config: Mapping[str, Any], source: str) -> None:
    """Refuse what would overwrite a file that DeepSpeed has not written.

    It looks at this machine's files, so that ranks on several machines may disagree.

    Raises:
        ValueError: with the setting and the reason.
    """
    for setting, path in _overwritten(config):
        if os.path.lexists(path) and not _is_a_profile(path):
            raise ValueError(
                f"{source} has {setting} = {printable(path)}, which exists and is no profile that DeepSpeed wrote: it "
                "would be overwritten. Name another file, or remove it"
            )


def check_imported(config: Mapping[str, Any], source: str) -> None:
    """Refuse to import what is not part of the program that is running.

    Raises:
        ValueError: with the setting and the reason.
    """
    for name in _imported(config):
        package = name.rpartition(".")[0]
        if package not in sys.modules and package.split(".")[0] not in _OWN_PACKAGES:
            raise ValueError(
                f"{source} has {printable(repr(name))} in torch_autocast.lower_precision_safe_modules: DeepSpeed would "
                f"import {printable(package or name)}, which is not part of this program. Leave it out"
            )


def side_effects(config: Mapping[str, Any]) -> Iterator[str]:
    """Say in a sentence each what a config does besides training.

    Args:
        config: content of a DeepSpeed config, complete or not.

    Yields:
        Sentences fit for a terminal, without a full stop.
    """
    for monitor in _MONITORS:
        section = _section(config, monitor)
        if _is_on(section):
            directory = os.path.join(
                str(section.get("output_path", "")), str(section.get("job_name", _JOB_NAME))
            )
            yield f"{monitor} writes into the directory {_shown(directory)}"
    for name, service in _SERVICES.items():
        if _is_on(_section(config, name)):
            yield f"{name} sends the run's metrics to {service}"
    for setting, path in _overwritten(config):
        yield f"{setting} overwrites the file {_shown(path)}"
    tuning = _section(config, "autotuning")
    if _is_on(tuning):
        yield "autotuning ends every rank's process after a few updates, when it has measured them"
        for key, default in (("results_dir", "autotuning_results"), ("exps_dir", "autotuning_exps")):
            directory = str(tuning.get(key) or default)
            yield f"autotuning.{key}: 'deepspeed --autotuning' removes and remakes the directory {_shown(directory)}"
    zero = _section(config, "zero_optimization")
    for key in OFFLOADS:
        if offload_device(zero, key) == "nvme":
            directory = os.path.join(str(_section(zero, key).get("nvme_path")), "zero_stage_3")
            removed = "; what is in its */rank* is removed first" if key == "offload_param" else ""
            yield f"zero_optimization.{key}.nvme_path: tensors are swapped to {_shown(directory)}{removed}"
    for setting, path in _data_paths(config):
        yield f"{setting} writes into the directory {_shown(path)}"
    for name in _imported(config):
        yield f"torch_autocast.lower_precision_safe_modules imports the module {printable(name.rpartition('.')[0])}"
    if config.get("datastates_ckpt", False) is not False:
        yield "datastates_ckpt has checkpoints written by the package datastates"


def check_swap_directory(zero: Mapping[str, Any]) -> None:
    """Refuse to swap to NVMe through a directory that somebody else prepared.

    DeepSpeed removes and writes below it.

    Args:
        zero: the section zero_optimization of a config.

    Raises:
        ValueError: DeepSpeed's directory below `nvme_path` is a link, or belongs to another user.
    """
    for key in OFFLOADS:
        path = _section(zero, key).get("nvme_path")
        if offload_device(zero, key) != "nvme" or not isinstance(path, str):
            continue
        directory = Path(path) / "zero_stage_3"
        found = directory.lstat() if os.path.lexists(directory) else None
        if found is not None and (directory.is_symlink() or found.st_uid != os.getuid()):
            raise ValueError(
                f"zero_optimization.{key}.nvme_path: {directory}, below which DeepSpeed removes and writes files, is a "
                "link or belongs to another user: choose a directory of your own"
            )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}


def _is_on(section: Mapping[str, Any]) -> bool:
    return str(section.get("enabled", False)).lower() not in _OFF


def _overwritten(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    profiler, tuning = _section(config, "flops_profiler"), _section(config, "autotuning")
    if profiler.get("output_file") and (_is_on(profiler) or _is_on(tuning)):
        yield "flops_profiler.output_file", str(profiler["output_file"])
    if _is_on(tuning):
        yield "autotuning.metric_path", str(tuning.get("metric_path") or "autotuning_metric.json")
        if _section(tuning, "model_info"):
            path = tuning.get("model_info_path")
            yield "autotuning.model_info_path", str(path or "autotuning_model_info.json")


def _data_paths(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    efficiency = _section(config, "data_efficiency")
    sampling = _section(efficiency, "data_sampling")
    if not (_is_on(efficiency) and _is_on(sampling)):
        return
    for part, key in (("curriculum_learning", "data_cluster_path"), ("dynamic_batching", "metrics_path")):
        section = _section(sampling, part)
        if _is_on(section) and section.get(key):
            yield f"data_efficiency.data_sampling.{part}.{key}", str(section[key])


def _imported(config: Mapping[str, Any]) -> Iterator[str]:
    section = _section(config, "torch_autocast")
    names = section.get("lower_precision_safe_modules")
    if _is_on(section) and isinstance(names, list):
        yield from map(str, names)


def _is_a_profile(path: str) -> bool:
    try:
        with open_regular(Path(path)) as file:
            return _PROFILE_HEAD in file.read(200)
    except (OSError, ValueError):  # a link, a directory, a name that is none
        return False


def _shown(path: str) -> str:
    return printable(os.path.abspath(path))
