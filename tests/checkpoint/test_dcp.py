"""Checkpoints of `torch.distributed.checkpoint`: read, written, and refused where they are bad."""

import dataclasses
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from arsg_dist import ARSG
from arsg_dist.checkpoint import SavedRun
from arsg_dist.checkpoint.dcp import DCPCheckpoint
from arsg_dist.checkpoint.dcp_index import read_index
from arsg_dist.checkpoint.pickles import read_value
from arsg_dist.engine import SingleProcessEngine
from arsg_dist.engine.state import PARAMETER, in_order, order_of
from tests.checkpoint.runs import Tied
from tests.checkpoint.test_commands import command
from tests.support.hostile import Payload

Groups = list[dict[str, Any]]


class Script(Tied):
    """A frozen parameter beside what `Tied` has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs * self.scale)


OPTIMIZERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "arsg": lambda groups: ARSG(groups, lr=0.01, eps=1e-3),
    "arsg counting": lambda groups: ARSG(groups, lr=0.01, preconditioner="adam"),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def script(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two groups of other settings, and in an order that is not the model's."""
    model = Script()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
        {
            "params": [parameter for parameter in trained if parameter.dim() > 1],
            "weight_decay": 0.1,
            "lr": 0.02,
        },
    ]
    return model, OPTIMIZERS[kind](groups)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(5, 3)).backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, layout: str) -> dict[str, Any]:
    """What a script saves, and gives to be loaded."""
    flat = StateDictOptions(flatten_optimizer_state_dict=layout == "torchtitan")
    of_model, of_optimizer = get_state_dict(model, optimizer, options=flat)
    return {
        "dcp": {"model": of_model, "optim": of_optimizer},
        "in app": {"app": {"model": of_model, "optim": of_optimizer}},
        "torchtitan": {
            **of_model,
            "optimizer": of_optimizer,
            "train_state": {"step": torch.tensor(2)},
            "lr_scheduler": {"last_epoch": 2},
        },
    }[layout]


def saved_by_script(directory: Path, kind: str, layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = script(kind)
    for seed in range(2):
        update(model, optimizer, seed)
    dcp.save(state_of(model, optimizer, layout), checkpoint_id=directory)
    return model, optimizer


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """To the rounding of one update: moments may lie in another order than a channels_last parameter."""
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("arsg", "dcp"),
        ("arsg", "torchtitan"),
        ("arsg counting", "in app"),
        ("adamw", "torchtitan"),
        ("adamw", "dcp"),
        ("sgd", "dcp"),
    ],
)
def test_there_and_back_a_script_goes_on_as_it_would_have(kind: str, layout: str, tmp_path: Path) -> None:
    """Catches state of another parameter, the first group's settings for all, steps that start again, a tied name that
    is a parameter of its own afterwards, and what torch's strict load does not find."""
    model, optimizer = saved_by_script(tmp_path / "theirs", kind, layout)
    assert command("convert", tmp_path / "theirs", tmp_path / "run", "--frozen", "scale") == 0
    saved = SavedRun(tmp_path / "run")
    assert saved.aliases == {"last.weight": "first.weight"}
    assert set(saved.parameters) - set(saved.trained) == {"scale"}
    assert set(saved.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    update(model, optimizer, 5)

    here, ours = script(kind)
    engine = SingleProcessEngine(here, ours)
    engine.load_state(saved)
    update(here, ours, 5)
    assert_same(here, model)

    target = "torchtitan" if layout == "torchtitan" else "dcp"
    assert command("convert", tmp_path / "run", tmp_path / "back", "--to", target) == 0
    there, theirs = script(kind)
    state = state_of(there, theirs, target)
    state.pop("train_state", None)
    state.pop("lr_scheduler", None)
    dcp.load(state, checkpoint_id=tmp_path / "back")
    set_state_dict(
        there,
        theirs,
        model_state_dict=state.get("model") or {k: v for k, v in state.items() if k != "optimizer"},
        optim_state_dict=state.get("optim") or state["optimizer"],
    )
    update(there, theirs, 5)
    assert_same(there, model)


def test_what_cannot_be_told_is_asked_for_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a frozen parameter taken for a buffer in silence, and a schedule that is lost in silence."""
    saved_by_script(tmp_path / "theirs", "sgd", "torchtitan")
    assert command("convert", tmp_path / "theirs", tmp_path / "run") == 2
    assert "whether scale are frozen parameters or buffers" in capsys.readouterr().err
    assert command("convert", tmp_path / "theirs", tmp_path / "run", "--buffers", "sc*") == 0
    said = capsys.readouterr().out
    assert "scale" in next(line for line in said.splitlines() if line.startswith("buffers: "))
    assert "left out: train_state.step, lr_scheduler.last_epoch" in said
    assert "further names of parameters: last.weight = first.weight" in said
    assert command("convert", tmp_path / "run", tmp_path / "out", "--to", "dcp", "--frozen", "x") == 2
    assert command("convert", tmp_path / "run", tmp_path / "run", "--to", "dcp") == 2
    assert "exists already" in capsys.readouterr().err


def spoil(index: Metadata, what: str) -> None:
    first = next(key for key in index.storage_data if key.fqn == "model.conv.weight")
    info, described = index.storage_data[first], index.state_dict_metadata["model.conv.weight"]
    if what == "leads outside":
        info.relative_path = "../theirs/" + info.relative_path
    elif what == "beyond the file":
        info.offset += 1 << 40
    elif what == "shorter":
        info.length //= 2
    elif what == "compressed":
        info.transform_descriptors = ["zstd"]
    elif what == "larger":
        described.size = torch.Size([1 << 20, 1 << 20, 3, 3])
    elif what == "another place":
        described.chunks[0].offsets = torch.Size([1, 0, 0, 0])
    elif what == "not there":
        del index.storage_data[first]
    elif what == "another shape":
        described.size = described.chunks[0].sizes = torch.Size([4, 6, 3, 3])
    elif what == "weights alone":
        for key in [key for key in index.state_dict_metadata if key.startswith("optim")]:
            del index.state_dict_metadata[key]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("leads outside", "is no name of a file in"),
        ("beyond the file", "it ends within 'model.conv.weight'"),
        ("shorter", "theirs/.* is damaged|larger than its bytes"),
        ("compressed", "are compressed, which is not read"),
        ("larger", "parts of 'model.conv.weight' are missing"),
        ("another place", "a part of 'model.conv.weight' lies outside of it"),
        ("not there", "is not as torch writes it"),
        ("another shape", "a part of 'model.conv.weight' is of another size"),
        ("weights alone", "has no optimizer's state under 'optim' or 'optimizer'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(
    what: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, memory that is asked for by a number in a file, and files read outside of the directory."""
    saved_by_script(tmp_path / "theirs", "sgd", "dcp")
    index = pickle.loads((tmp_path / "theirs" / ".metadata").read_bytes())
    spoil(index, what)
    (tmp_path / "theirs" / ".metadata").write_bytes(pickle.dumps(index))
    assert command("convert", tmp_path / "theirs", tmp_path / "run", "--frozen", "scale") == 2
    said = capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_parts_that_overlap_leave_nothing_unset(tmp_path: Path) -> None:
    """Catches parts that are as many elements as the tensor, and of which two overlap: others are not set."""
    model, optimizer = script("sgd")
    update(model, optimizer, 0)
    state = {**state_of(model, optimizer, "dcp"), "part": model.get_parameter("conv.weight").detach()[:3]}
    dcp.save(state, checkpoint_id=tmp_path)
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    places = {key.fqn: key for key in index.storage_data}
    whole, part = places["model.conv.weight"], index.storage_data[places["part"]]
    del index.storage_data[whole]
    index.state_dict_metadata["model.conv.weight"].chunks = [
        ChunkStorageMetadata(torch.Size([row, 0, 0, 0]), torch.Size([3, 4, 3, 3])) for row in (0, 2)
    ]
    for row in (0, 2):
        index.storage_data[dataclasses.replace(whole, offset=torch.Size([row, 0, 0, 0]))] = part
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    saved = DCPCheckpoint(tmp_path, frozen=["scale"])
    with pytest.raises(ValueError, match=r"incomplete: parts of .model\.conv\.weight. are missing"):
        saved.whole(PARAMETER, "conv.weight")


def test_elements_are_read_in_any_order_of_dimensions(tmp_path: Path) -> None:
    """Catches a rank whose part of a channels_last parameter is that of a contiguous one."""
    model, _ = saved_by_script(tmp_path, "arsg", "dcp")
    saved, weight = DCPCheckpoint(tmp_path, frozen=["scale"]), model.get_parameter("conv.weight").detach()
    order = order_of(weight.stride(), weight.shape)
    assert order != tuple(range(4))
    part = saved.read(PARAMETER, "conv.weight", 5, 20, order)
    assert torch.equal(part, in_order(weight, order)[5:25])
    assert not torch.equal(part, weight.reshape(-1)[5:25])


def test_zeros_are_no_further_name_of_other_zeros(tmp_path: Path) -> None:
    """Catches a frozen bias that never moved, taken for a further name of a trained one that has not yet."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer in model:
        nn.init.zeros_(layer.bias)
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.0, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    dcp.save(state_of(model, optimizer, "dcp"), checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"does not tell whether 0\.bias are frozen"):
        DCPCheckpoint(tmp_path)
    assert DCPCheckpoint(tmp_path, frozen=["0.bias"]).aliases == {}


class Shell:
    """Unpickling it starts a shell."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def test_nothing_that_a_file_names_is_executed(tmp_path: Path) -> None:
    """Catches an index or a value that is unpickled with whatever it names."""
    made = tmp_path / "made"
    for payload in (Payload(made), Shell(f"touch {made}")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=payload)))
        with pytest.raises(ValueError, match="which reading it would execute: refused"):
            read_index(tmp_path / ".metadata")
        content = io.BytesIO()
        torch.save({"lr": payload}, content)
        with pytest.raises(ValueError, match="more than tensors and plain values: refused"):
            read_value(content.getvalue(), "a value")
    assert not made.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        pickle.dumps({"no": "index"}),
        pickle.dumps(Metadata({}))[:-9],
        b"ctorch\nSize\n(dS'x'\nI1\nsb.",  # a class that is given attributes
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}\x8c\x01xK\x01s(K\x01K\x02ub.",
    ],
    ids=["empty", "nothing", "another pickle", "cut off", "a class is changed", "an object is filled"],
)
def test_an_index_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    """Catches an error of the unpickler's own, and classes of torch's that a file has changed."""
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="metadata"):
        DCPCheckpoint(tmp_path)
    assert not hasattr(torch.Size, "x")
