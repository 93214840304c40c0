"""Checkpoints under DeepSpeed on the number of ranks that wrote them, and the export of the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import arsg_dist.deepspeed
from arsg_dist import ARSG
from arsg_dist.checkpoint.safetensors_file import write_safetensors
from arsg_dist.deepspeed.checkpoint.guard import _guarded_load, _guarded_save
from tests.deepspeed.checkpoint_cases import Everything, Kept, kept_cases
from tests.deepspeed.saved_checkpoints import results_saved_by, saved_by
from tests.support.turns import parts

LAUNCHES: list[tuple[int, str, list[pytest.MarkDecorator]]] = [
    (2, "core", []),
    *((ranks, part, marks) for part, marks in parts() for ranks in (2, 3)),
]
ALL = [
    pytest.param(
        ranks,
        selection,
        config,
        id=f"{ranks}ranks-{'' if selection == 'core' else f'part{selection}-'}{config}",
        marks=[pytest.mark.ranks, *marks],
    )
    for ranks, selection, marks in LAUNCHES
    for config in kept_cases(selection)
]
everywhere = pytest.mark.parametrize(("ranks", "selection", "config"), ALL)


@everywhere
@pytest.mark.parametrize("how", ["fresh", "stepped"])
def test_resuming_continues_with_the_same_bits(ranks: int, selection: str, config: Kept, how: str) -> None:
    """Catches masters, moments, v̂, steps, settings, loss scale, buffers or counters that are lost, rounded or kept
    from before loading; and an engine that has exported or visited θ going on differently."""
    for rank in results_saved_by(ranks, selection)[str(config)]["ranks"]:
        assert rank[how]["loaded"]
        assert rank[how]["differs after loading"] == []
        assert rank[how]["differs at the end"] == []


@everywhere
def test_state_is_linked_after_loading(ranks: int, selection: str, config: Kept) -> None:
    """Catches DeepSpeed's safe_get_full_optimizer_state broken for good by loading into an engine that has stepped."""
    for rank in results_saved_by(ranks, selection)[str(config)]["ranks"]:
        assert rank["fresh"]["fragments"]
        assert rank["stepped"]["fragments"]


def exported(ranks: int, selection: str, config: Kept, point: str) -> tuple[dict[str, Tensor], Path]:
    directory = saved_by(ranks, selection)[1]
    return load_file(directory / f"{config}-{point}.safetensors"), directory / str(config)


@everywhere
def test_export_has_the_masters_under_the_keys_of_the_module(
    ranks: int, selection: str, config: Kept
) -> None:
    """Catches half-precision copies exported instead of masters, parts of ranks in the wrong place, and tied
    parameters, buffers or frozen parameters left out."""
    masters = results_saved_by(ranks, selection)[str(config)]["saved"]
    tensors, _ = exported(ranks, selection, config, "x")
    for name, master in masters.items():
        assert torch.equal(tensors[name].view(torch.int32), master.view(torch.int32)), name
    model = Everything()
    model.load_state_dict(tensors)
    assert torch.equal(tensors["second.weight"], tensors["first.weight"])
    assert model.seen[0] == model.forwards == 4


@everywhere
def test_export_at_theta_is_what_the_model_had_at_theta(ranks: int, selection: str, config: Kept) -> None:
    """Catches θ of another group's settings, or of half-precision copies."""
    theta, _ = exported(ranks, selection, config, "theta")
    for name, weight in results_saved_by(ranks, selection)[str(config)]["theta"].items():
        assert torch.equal(theta[name].to(weight.dtype), weight), name


@everywhere
@pytest.mark.parametrize("point", ["x", "theta"])
def test_export_from_the_files_is_that_from_the_engine(
    ranks: int, selection: str, config: Kept, point: Any, tmp_path: Path
) -> None:
    """Catches a reader of DeepSpeed's files that mixes up padding, ranks, groups or sub-groups."""
    expected, folder = exported(ranks, selection, config, point)
    path = tmp_path / "model.safetensors"
    arsg_dist.deepspeed.export(folder, path, at=point)
    actual = load_file(path)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        assert actual[name].dtype == tensor.dtype, name


@everywhere
def test_zero_to_fp32_reads_our_checkpoints(ranks: int, selection: str, config: Kept) -> None:
    """Catches something of ours in the files that DeepSpeed's script stumbles over; and the day it reads the rest."""
    folder = saved_by(ranks, selection)[1] / str(config)
    masters = results_saved_by(ranks, selection)[str(config)]["saved"]
    if config.case.stage == 0 or str(config) == "zero1-bf16-fp32grads":
        with pytest.raises((TypeError, ValueError, FileNotFoundError)):
            get_fp32_state_dict_from_zero_checkpoint(str(folder))
        return
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    for name, master in masters.items():
        if config.case.stage == 1 and name.startswith("frozen"):
            assert name not in weights  # DeepSpeed writes them for its script under stages 2 and 3 only
        else:
            assert torch.equal(weights[name].float(), master), name


def test_export_can_round_and_refuses_nonsense(tmp_path: Path) -> None:
    """Catches a dtype or point that is silently taken for another."""
    for options, message in [({"at": "y"}, "choose 'x' or 'theta'"), ({"dtype": torch.int8}, "not floating")]:
        with pytest.raises(ValueError, match=message):
            arsg_dist.deepspeed.export(tmp_path, tmp_path / "m", **options)
    with pytest.raises(ValueError, match="no DeepSpeed checkpoint"):
        arsg_dist.deepspeed.export(tmp_path, tmp_path / "m")
    with pytest.raises(ValueError, match="does not exist"):
        arsg_dist.deepspeed.export(tmp_path / "nowhere", tmp_path / "m")
    with pytest.raises(TypeError, match=r"deepspeed\.initialize returns, got int"):
        arsg_dist.deepspeed.export(3, tmp_path / "m")


def test_safetensors_library_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    """Catches a header that the library refuses, padding it does not expect, or bytes in another order."""
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "ä": torch.tensor([-0.0, float("nan")]),
        **{str(dtype): torch.tensor([[1, 0, 1]]).to(dtype) for dtype in (torch.bfloat16, torch.float16)},
        **{str(dtype): torch.tensor([1, 0]).to(dtype) for dtype in (torch.bool, torch.uint8, torch.int64)},
    }
    path = tmp_path / "all.safetensors"
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, layout, tensors.values(), {"some": "thing"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor) or name == "ä"
    assert torch.equal(read["ä"].view(torch.int32), tensors["ä"].view(torch.int32))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"some": "thing"}


def test_a_broken_off_export_leaves_the_old_file(tmp_path: Path) -> None:
    """Catches half a file under the final name."""
    path = tmp_path / "m.safetensors"
    layout = dict.fromkeys("ab", (torch.float32, (2,)))
    write_safetensors(path, layout, iter([torch.zeros(2), torch.ones(2)]), {})

    def broken():
        yield torch.ones(2)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write_safetensors(path, layout, broken(), {})
    assert torch.equal(load_file(path)["b"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(path, {"c": (torch.complex64, (1,))}, [], {})


@pytest.mark.parametrize("where", ["optimizer", "param"])
def test_nvme_is_refused_instead_of_losing_the_state(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches DeepSpeed's resume from NVMe, which silently starts with an empty optimizer state."""
    zero = DeepSpeedZeroConfig(stage=3, **{f"offload_{where}": {"device": "nvme", "nvme_path": "/nvme"}})
    engine = SimpleNamespace(
        basic_optimizer=ARSG([torch.nn.Parameter(torch.ones(1))]),
        zero_offload_optimizer=lambda: zero.offload_optimizer,
        zero_offload_param=lambda: zero.offload_param,
        load_universal_checkpoint=lambda: False,
        device=torch.device("cpu"),
    )
    communicator = SimpleNamespace(all_gather_object=lambda value: [value])
    monkeypatch.setattr("arsg_dist.deepspeed.checkpoint.guard.TorchCommunicator", lambda device: communicator)
    called: list[Any] = []
    with pytest.raises(ValueError, match="NVMe"):
        _guarded_save(called.append)(engine, str(tmp_path))
    with pytest.raises(ValueError, match="NVMe"):
        _guarded_load(called.append)(engine, str(tmp_path), tag="some")
    assert called == []


def test_saving_inside_an_update_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gradients of micro-batches lost without a word."""
    engine = SimpleNamespace(
        basic_optimizer=ARSG([torch.nn.Parameter(torch.ones(1))]),
        zero_offload_optimizer=lambda: None,
        zero_offload_param=lambda: None,
        optimizer=None,
        micro_steps=5,
        gradient_accumulation_steps=lambda: 4,
        zero_optimization=lambda: False,
    )
    called: list[Any] = []

    def save(engine: Any, directory: str, *rest: Any) -> None:
        called.append(directory)

    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    monkeypatch.setattr("arsg_dist.deepspeed.checkpoint.guard._agree", lambda engine, check: check())
    with pytest.warns(UserWarning, match="1 of 4 micro-batches"):
        _guarded_save(save)(engine, str(tmp_path))
    assert called == [str(tmp_path)]
