"""DeepSpeed's checkpoints and configs from somebody else: read as data or refused; nothing executed or outside."""

import atexit
import contextlib
import functools
import itertools
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import arsg_dist.deepspeed.build
from arsg_dist.checkpoint import SavedRun
from arsg_dist.cli import main as cli
from arsg_dist.deepspeed import universal
from arsg_dist.deepspeed.checkpoint import pickles
from arsg_dist.deepspeed.checkpoint.reader import read_checkpoint
from arsg_dist.deepspeed.config.resolve import resolve_config
from arsg_dist.deepspeed.config.side_effects import check_swap_directory
from arsg_dist.engine import Capabilities, SingleProcessCommunicator, discover_ranks
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.training.engines import build_engine, prepare
from tests.deepspeed.jobs.files import PRECISIONS, STATE
from tests.support.hostile import Own, Payload
from tests.support.launchers import REPOSITORY

SAVED = [f"zero{stage}-{precision}" for stage, precision in itertools.product(range(4), PRECISIONS)]


@functools.cache
def saved() -> Path:
    """Run the job once: a checkpoint for each of `SAVED`, and `loaded.json`."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    finished = subprocess.run(
        [sys.executable, "-m", "tests.deepspeed.jobs.files", directory],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    for config in ("zero1-fp32", "zero3-fp32"):
        universal.convert(directory / config, directory / f"{config}-universal" / "converted")
    return directory


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Make a copy of a saved checkpoint to spoil; its directory has the files, without a tag above it."""

    def copy(name: str) -> Path:
        (source,) = (path for path in (saved() / name).iterdir() if path.is_dir())
        return Path(shutil.copytree(source, tmp_path / "run"))

    return copy


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


TOOLS: dict[str, Callable[..., int]] = {
    "convert": lambda source, output, *more: command("checkpoint", "convert", source, output, *more),
    "universal": lambda source, output, *more: universal.main([str(source), str(output), *more]),
}


def with_payload(path: Path, thing: Any) -> None:
    content = torch.load(path, weights_only=False)
    torch.save({"content": content, "payload": thing}, path)


# Pickles.


@pytest.mark.parametrize("name", SAVED)
def test_checkpoints_of_real_runs_are_read_without_trust(name: str, tmp_path: Path) -> None:
    """Catches an allow-list without what DeepSpeed writes, and client state that does not come through unchanged."""
    source = saved() / name
    assert command("checkpoint", "convert", source, tmp_path / "portable") == 0
    assert universal.main([str(source), str(tmp_path / "converted")]) == 0
    arsg_dist.deepspeed.export(source, tmp_path / "a.safetensors")
    arsg_dist.deepspeed.export(tmp_path / "converted", tmp_path / "b.safetensors")
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys() == {"0.weight", "0.bias", "2.weight", "2.bias", "seen"}
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert SavedRun(tmp_path / "portable").counters["global_steps"] == 1
    model = torch.load(tmp_path / "converted" / "mp_rank_00_model_states.pt", weights_only=False)
    assert (model["epoch"], model["args"], model["best"]) == (7, STATE["args"], 0.5)
    assert type(model["numpy"]) is np.ndarray
    assert np.array_equal(model["numpy"], STATE["numpy"])


@pytest.mark.parametrize("name", ["zero0-fp32", "zero1-fp32", "zero3-fp32", "zero1-fp32-universal"])
def test_a_malicious_pickle_in_any_file_is_refused_by_name(
    name: str, copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a reader that executes what a file names, before or while it refuses it."""
    directory, marker = copied(name), tmp_path / "executed"
    tools = {key: tool for key, tool in TOOLS.items() if key == "convert" or "universal" not in name}
    files = sorted(directory.rglob("*.pt"))
    if "universal" in name:  # the model file's second name, of which DeepSpeed reads one or the other
        files.remove(directory / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for path in files:
        kept = path.read_bytes()
        with_payload(path, Payload(marker))
        for tool in tools.values():
            assert tool(directory, tmp_path / "out") == 2
            said = capsys.readouterr().err
            assert "builtins.getattr, pathlib.Path" in said, path
            assert "would execute" in said
            assert "--trust-pickle" in said
        path.write_bytes(pickle.dumps(Payload(marker)))
        assert TOOLS["convert"](directory, tmp_path / "out") == 2
        assert f"{path.name} is damaged" in capsys.readouterr().err
        path.write_bytes(kept)
        assert not marker.exists(), path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_export_executes_nothing(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches the function that has no command."""
    directory, marker = copied("zero1-fp32"), tmp_path / "executed"
    with_payload(directory / "mp_rank_00_model_states.pt", Payload(marker))
    with pytest.raises(ValueError, match=r"pathlib\.Path.*trust_pickle=True"):
        arsg_dist.deepspeed.export(directory, tmp_path / "x.safetensors")
    assert not marker.exists()
    assert not (tmp_path / "x.safetensors").exists()


def test_trust_lets_objects_of_own_classes_through(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches a way out, named in the message, that does not work."""
    directory = copied("zero1-fp32")
    path = directory / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(path, weights_only=False), "thing": Own(3)}, path)
    for name, tool in TOOLS.items():
        assert tool(directory, tmp_path / name) == 2
        assert tool(directory, tmp_path / name, "--trust-pickle") == 0
    model = torch.load(tmp_path / "universal" / "mp_rank_00_model_states.pt", weights_only=False)
    assert model["thing"].x == 3
    with pytest.raises(ValueError, match=r"hostile\.Own"):
        read_checkpoint(directory)
    assert read_checkpoint(directory, trust_pickle=True).counters["global_steps"] == 1


@pytest.mark.parametrize("arguments", [["checkpoint", "convert", "--help"], None])
def test_help_says_that_files_are_pickles(
    arguments: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that is silent about what it opens."""
    if arguments:
        assert command(*arguments) == 0
    else:
        with pytest.raises(SystemExit):
            universal.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "pickles" in said
    assert "--trust-pickle execute what" in said


def test_the_advice_to_convert_says_what_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches users sent to a command without being told that it opens pickles."""
    (tmp_path / "deepspeed").mkdir()
    assert command("checkpoint", "show", tmp_path) == 2
    assert "its files are pickles: the command takes data alone from them" in capsys.readouterr().err


class _Spoiling:
    """Has an enumeration's member changed by the file that names it."""

    def __reduce__(self) -> tuple[object, ...]:
        return ZeroStageEnum, (3,), {"_value_": 0}


def test_an_allowed_class_cannot_be_harmed(tmp_path: Path) -> None:
    """Catches DeepSpeed's own classes handed to a file: it could change their members for the whole process."""
    torch.save(_Spoiling(), tmp_path / "x.pt")
    pickles.load(tmp_path / "x.pt")
    assert ZeroStageEnum.weights.value == 3


@pytest.mark.parametrize(
    "array",
    [
        np.array([Payload(Path("executed"))], dtype=object),
        np.array([(1, 2)], dtype=[("a", "i4"), ("b", "i4")]),
        np.array(["text"]),
    ],
    ids=["objects", "records", "text"],
)
def test_of_numpy_only_numbers_are_built(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """Catches numpy's own reader at work, which takes memory addresses from a file."""
    torch.save(array, tmp_path / "x.pt")
    with pytest.raises(pickles.RefusedPickleError):
        pickles.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("seven ranks", "was written by 7 ranks and this job has 1"),
        ("latest", "latest: '../another/global_step1' leads out of its directory"),
        ("missing", "does not fit this engine"),
        ("another stage", "does not fit this engine"),
    ],
)
def test_an_engine_refuses_before_anything_is_executed(attempt: str, message: str) -> None:
    """Catches a refusal that comes when the payload has run, and a `latest` that leads elsewhere."""
    said = json.loads((saved() / "loaded.json").read_text())[attempt]
    assert message in said
    assert not list(saved().glob("*executed"))


def test_an_engine_resumes_with_objects_of_own_classes() -> None:
    """Catches a guard in the way of client state that DeepSpeed loads: of a class, and of one derived from dict."""
    said = json.loads((saved() / "loaded.json").read_text())
    assert (said["own"], said["own dictionary"]) == (3, 3)


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_with_experts_resumes(stage: int) -> None:
    """Catches an expert's file taken for the model's in the checks before a load: KeyError 'dp_world_size'."""
    assert json.loads((saved() / "loaded.json").read_text())[f"experts {stage}"] is True


# Names that become paths, and files that are none.


@pytest.mark.parametrize("tag", ["..", "../other", "a/../../other", "/etc", "", ".", "other", "ot\0her"])
def test_latest_stays_in_its_directory(tag: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches a tag that has another directory's pickles opened, by its name or through a link."""
    shutil.copytree(copied("zero1-fp32"), tmp_path / "other")
    run = tmp_path / "run"
    (run / "latest").write_text(tag)
    (run / "other").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match=r"leads out of its directory|is a link"):
        read_checkpoint(run)
    read_checkpoint(run / "other")  # a link that the user names


def test_a_tag_may_be_a_directory_in_a_directory(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches save_checkpoint(tag="epoch1/step5") refused, which DeepSpeed makes."""
    shutil.copytree(copied("zero1-fp32"), tmp_path / "again" / "epoch1" / "step5")
    (tmp_path / "again" / "latest").write_text("epoch1/step5\n")
    assert read_checkpoint(tmp_path / "again").where == tmp_path / "again" / "epoch1" / "step5"


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
@pytest.mark.parametrize("name", ["latest", "mp_rank_00_model_states.pt"])
def test_only_regular_files_are_opened(
    kind: str, name: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches a link followed out of the checkpoint, and a named pipe that is waited for."""
    run = copied("zero1-fp32")
    path = run / name
    if path.exists():
        path.rename(tmp_path / name)
    else:
        (tmp_path / name).write_text("other")
    {
        "link": lambda: path.symlink_to(tmp_path / name),
        "pipe": lambda: os.mkfifo(path),
        "directory": path.mkdir,
    }[kind]()
    with pytest.raises(ValueError, match=r"is a link|not a regular file"):
        read_checkpoint(run)


def rename_parameter(directory: Path, name: str) -> None:
    path = directory / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    (shapes,) = content["param_shapes"]
    content["param_shapes"] = [{name if key == "2.bias" else key: shape for key, shape in shapes.items()}]
    torch.save(content, path)


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/../../../evil", "..", ".", "", "a//b", "e\0"])
def test_a_parameter_name_stays_below_zero(
    name: str, copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a name that becomes a path outside of the checkpoint that is written or read."""
    directory = copied("zero1-fp32")
    rename_parameter(directory, name)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    assert universal.main([str(directory), str(tmp_path / "deep" / "er" / "out")]) == 2
    assert "leads out of its directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*") if "run" not in path.parts) == ["deep", "er"]
    converted = Path(shutil.copytree(saved() / "zero1-fp32-universal" / "converted", tmp_path / "universal"))
    path = converted / "zero" / "optimizer_state.pt"
    content = torch.load(path, weights_only=False)
    content["arsg"]["groups"] = [[name if key == "2.bias" else key for key in content["arsg"]["groups"][0]]]
    torch.save(content, path)
    assert command("checkpoint", "convert", converted, tmp_path / "out") == 2
    assert "leads out of its directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["module.0.norm..weight", "a/b.weight", "with space\n\x1b[2J"])
def test_unusual_names_that_stay_inside_are_kept(
    name: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches names refused that torch and DeepSpeed allow."""
    directory = copied("zero1-fp32")
    rename_parameter(directory, name)
    assert universal.main([str(directory), str(tmp_path / "out")]) == 0
    assert name in read_checkpoint(tmp_path / "out").trained


def test_a_conversion_removes_and_follows_nothing_of_others(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches a partial directory of a known name that is emptied first, and a link that is written through."""
    directory, other = copied("zero1-fp32"), tmp_path / "other"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").write_text("kept")
    other.write_text("kept")
    (tmp_path / "latest_universal").symlink_to(other)
    (tmp_path / ".latest_universal.partial").symlink_to(other)
    assert universal.main([str(directory), str(tmp_path / "out")]) == 0
    assert (tmp_path / "latest_universal").read_text() == "out"
    assert not (tmp_path / "latest_universal").is_symlink()
    assert (tmp_path / ".out.partial" / "mine").read_text() == other.read_text() == "kept"
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for tool in TOOLS.values():
        assert tool(directory, tmp_path / "dangling") == 2
    assert not (tmp_path / "elsewhere").exists()


# Content that is not as DeepSpeed writes it.


def spoil(directory: Path, change: Callable[[dict[str, Any]], object], name: str) -> None:
    (path,) = directory.glob(f"*{name}.pt")
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


SPOILT: dict[str, tuple[str, Callable[[Any], object]]] = {
    "no shapes": ("model_states", lambda c: c.pop("param_shapes")),
    "shapes of another kind": ("model_states", lambda c: c.update(param_shapes=7)),
    "a shape beyond the file": (
        "model_states",
        lambda c: c["param_shapes"][0].update({"0.weight": (2**40, 2**40)}),
    ),
    "a negative shape": ("model_states", lambda c: c["param_shapes"][0].update({"0.weight": (-4, 4)})),
    "very many ranks": ("model_states", lambda c: c.update(dp_world_size=2**62)),
    "ranks of another kind": ("model_states", lambda c: c.update(dp_world_size={})),
    "a module that is text": ("model_states", lambda c: c.update(module="x")),
    "a counter that is text": ("model_states", lambda c: c.update(global_steps="x")),
    "aliases of another kind": ("model_states", lambda c: c["arsg"].update(aliases=[1])),
    "no optimizer": ("optim_states", lambda c: c.clear()),
    "groups of another kind": (
        "optim_states",
        lambda c: c["optimizer_state_dict"]["base_optimizer_state"].update(param_groups=[1]),
    ),
    "a tensor larger than its file": (
        "optim_states",
        lambda c: c["optimizer_state_dict"].update(
            single_partition_of_fp32_groups=[torch.zeros(1).expand(2**45)]
        ),
    ),
    "a scale that is text": (
        "optim_states",
        lambda c: vars(c["optimizer_state_dict"]["loss_scaler"]).update(dynamic=True, cur_scale="x"),
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_other_content_is_refused_with_the_place(
    what: str, copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tracebacks, and memory taken for what a file says instead of what it has."""
    directory = copied("zero1-fp32")
    spoil(directory, SPOILT[what][1], SPOILT[what][0])
    for tool in TOOLS.values():
        assert tool(directory, tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1
        assert str(directory) in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_packed_file_is_not_unpacked(tmp_path: Path) -> None:
    """Catches a small file that unpacks to all of the memory."""
    torch.save({"x": 1}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="is packed or large"):
        pickles.load(tmp_path / "packed.pt")


# Configs.


def explained(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (tmp_path / "ds.json").write_text(config if isinstance(config, str) else json.dumps(config))
    code = command("check-config", tmp_path / "ds.json")
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


EFFECTS: list[tuple[dict[str, Any], str]] = [
    (
        {"tensorboard": {"enabled": True, "output_path": "/logs", "job_name": "j"}},
        "tensorboard writes into the directory /logs/j",
    ),
    (
        {"csv_monitor": {"enabled": True, "output_path": "../x"}},
        "csv_monitor writes into the directory {above}/x/DeepSpeedJobName",
    ),
    ({"wandb": {"enabled": True}}, "wandb sends"),
    ({"comet": {"enabled": "true"}}, "comet sends"),
    ({"flops_profiler": {"enabled": True, "output_file": "/p/f"}}, "output_file overwrites the file /p/f"),
    (
        {"autotuning": {"enabled": True, "metric_path": "/p/m"}},
        "autotuning.metric_path overwrites the file /p/m",
    ),
    (
        {"autotuning": {"enabled": True}, "flops_profiler": {"output_file": "/p/f"}},
        "overwrites the file /p/f",
    ),
    ({"autotuning": {"enabled": True, "results_dir": "/home"}}, "removes and remakes the directory /home"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nv"}}},
        "offload_param.nvme_path: tensors are swapped to /nv/zero_stage_3; what is in its */rank* is removed first",
    ),
    (
        {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["antigravity.X"]}},
        "imports the module antigravity",
    ),
    (
        {
            "data_efficiency": {
                "enabled": True,
                "data_sampling": {
                    "enabled": True,
                    "curriculum_learning": {"enabled": True, "data_cluster_path": "/c"},
                },
            }
        },
        "curriculum_learning.data_cluster_path writes into the directory /c",
    ),
    ({"datastates_ckpt": {}}, "the package datastates"),
]


@pytest.mark.parametrize(("config", "message"), EFFECTS)
def test_what_a_config_does_besides_training_is_said(
    config: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a setting that writes, removes, imports or sends, and is passed over in silence."""
    code, said = explained(config, tmp_path, capsys)
    assert (code, message.format(above=Path.cwd().parent) in said) == (0, True), said


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json")), ids=lambda p: p.name
)
def test_usual_configs_have_no_effect_but_swapping(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a check that finds something in every config, or refuses those that are shipped."""
    assert command("check-config", path) == 0
    said = capsys.readouterr().out
    assert ("swapped to /local_nvme" in said) == ("nvme" in path.name)
    assert not any(word in said for word in ("writes into", "overwrites", "sends", "imports"))


@pytest.mark.parametrize("monitor", ["tensorboard", "csv_monitor"])
@pytest.mark.parametrize("name", ["../..", "..", "a/../../b", "/etc", "a\0b"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_job_name_stays_below_the_output_path(
    monitor: str, name: str, enabled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches logs made a directory above, under check-config and in the program's own reading."""
    config = {monitor: {"enabled": enabled, "output_path": "logs", "job_name": name}}
    code, said = explained(config, tmp_path, capsys)
    assert (code, f"{monitor}.job_name" in said) == (1, True)
    with pytest.raises(ValueError, match="leads out of"):
        resolved(tmp_path / "ds.json")


def resolved(config: Any) -> dict[str, Any]:
    return resolve_config(
        config,
        world_size=1,
        batch_size=4,
        accumulation_steps=1,
        clip_grad_norm=0.0,
        optimizer={"type": "ARSG", "params": {"lr": 0.1}},
    )


def test_a_profile_does_not_overwrite_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a .bashrc replaced by a profile; and a profile that cannot be written twice."""
    path = tmp_path / ".bashrc"
    path.write_text("mine")
    config = {"flops_profiler": {"enabled": True, "output_file": str(path)}}
    assert explained(config, tmp_path, capsys)[0] == 1
    with pytest.raises(ValueError, match=r"output_file = .*\.bashrc, which exists"):
        resolved(config)
    path.write_text("\n-------------------------- DeepSpeed Flops Profiler --------------------------\n")
    resolved(config)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="which exists"):
        resolved({"flops_profiler": {"enabled": True, "output_file": str(tmp_path / "link")}})


def test_a_config_imports_nothing_new() -> None:
    """Catches a module that DeepSpeed would import because a config names it."""
    section = {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="import antigravity, which is not part of this program"):
        resolved({"torch_autocast": {**section, "lower_precision_safe_modules": ["antigravity.X"]}})
    resolved({"torch_autocast": {**section, "lower_precision_safe_modules": ["torch.nn.Linear"]}})
    assert "antigravity" not in sys.modules


def test_the_program_says_what_a_config_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches effects that only check-config says, to whom runs it."""
    made = SimpleNamespace(capabilities=Capabilities())
    monkeypatch.setattr(arsg_dist.deepspeed.build, "DeepSpeedEngine", lambda *_, **__: made)
    config = {"csv_monitor": {"enabled": True, "output_path": "/logs"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    builder = prepare("deepspeed", TrainConfig(), str(tmp_path / "ds.json"), 1)
    rank = SingleProcessCommunicator()
    with pytest.warns(UserWarning, match="csv_monitor writes into the directory /logs/DeepSpeedJobName"):
        build_engine(builder, torch.nn.Linear(2, 2), TrainConfig(), rank, discover_ranks())


def test_tensors_are_not_swapped_through_a_link(tmp_path: Path) -> None:
    """Catches a directory of somebody else's, below which DeepSpeed would remove and write."""
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    check_swap_directory(zero)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "zero_stage_3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"nvme_path: .*zero_stage_3.* is a link"):
        check_swap_directory(zero)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"fp16": {}, "fp16": {}}', "the key 'fp16' is there twice"),
        ("[" * 5000 + "]" * 5000, "nested deeper than"),
        ('{"x": "' + "a" * 2**21 + '"}', "has more than"),
        ("[1]", "must hold a JSON object"),
        ('{"x": \x1b[2J}', "not valid JSON"),
    ],
    ids=["twice", "deep", "large", "a list", "escape"],
)
def test_a_hostile_file_is_refused_in_a_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a parser without bounds, and escape characters that reach the terminal."""
    code, said = explained(text, tmp_path, capsys)
    assert (code, message in said, "\x1b" in said) == (2, True, False)
    with pytest.raises(ValueError, match=message):
        resolved(tmp_path / "ds.json")


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.sampled_from(["auto", "../..", "/etc/passwd", "ARSG", "nvme", "cpu", "", "\0", "\x1b[2J", "true"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = {
    "optimizer": ("type", "params"),
    "scheduler": ("type", "params"),
    "zero_optimization": ("stage", "offload_optimizer", "offload_param", "cpu_offload", "reduce_bucket_size"),
    "fp16": ("enabled", "loss_scale"),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "data_types": ("grad_accum_dtype",),
    "flops_profiler": ("enabled", "output_file"),
    "csv_monitor": ("enabled", "output_path", "job_name"),
    "autotuning": ("enabled", "metric_path", "model_info", "results_dir"),
    "data_efficiency": ("enabled", "data_sampling"),
    "gradient_clipping": (),
    "train_batch_size": (),
}
OFFLOADS = ("device", "nvme_path", "buffer_count", "ratio", "pipeline_read")
SETTINGS = ("lr", "betas", "preconditioner", "state_dtype", "lookahead_k", "fused")


def some_of(keys: tuple[str, ...]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional={key: ANYTHING | st.just(True) for key in keys})


CONFIGS = st.sampled_from(sorted(SECTIONS)).flatmap(
    lambda name: (ANYTHING | some_of(SECTIONS[name])).map(lambda value: {name: value})
)
ZERO = some_of(OFFLOADS).map(
    lambda value: {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", **value},
            "offload_param": value,
        }
    }
)
OPTIMIZER = some_of(SETTINGS).map(lambda params: {"optimizer": {"type": "ARSG", "params": params}})


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current directory that must stay as it is, in a process that must start no other."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("current")
        patch.chdir(directory)

        def started(*_: object, **__: object) -> None:
            raise AssertionError("a process was started")

        patch.setattr(subprocess.Popen, "__init__", started)
        yield directory
    assert not list(directory.iterdir())


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(config=st.tuples(CONFIGS | OPTIMIZER, CONFIGS | ZERO).map(lambda pair: {**pair[0], **pair[1]}))
def test_any_config_gets_an_answer_or_an_error(
    config: dict[str, Any], watched: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches tracebacks, files written and processes started, whatever a config holds."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(config))
    assert command("check-config", path) in (0, 1, 2)
    with contextlib.suppress(ValueError):
        resolved(path)
    assert not list(watched.iterdir())


def test_outputs_have_the_modes_of_the_umask(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches converted files that only their owner, or anybody, may read."""
    before = os.umask(0o027)
    try:
        assert universal.main([str(copied("zero1-fp32")), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*.pt")}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
