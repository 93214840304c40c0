"""`arsg-dist checkpoint show|verify|convert|export`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.checkpoint.convert import to_portable
from arsg_dist.cli.main import main
from arsg_dist.engine import SingleProcessCommunicator
from tests.checkpoint.runs import Tied, engine, saved


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_show_says_what_wrote_it_and_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a manifest that only programs can read."""
    assert command("show", saved(tmp_path), "--tensors") == 0
    said = capsys.readouterr().out
    for text in ("engine single, 1 ranks", "torch 2.13", "mu 0.1", "update: 2", "max_exp_avg_sq:conv.weight"):
        assert text in said
    assert command("show", tmp_path) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that says all is well without reading."""
    path = saved(tmp_path)
    assert command("verify", path) == 0
    assert "all digests match" in capsys.readouterr().out
    shard = path / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 128
    shard.write_bytes(content)
    assert command("verify", path) == 1
    assert f"{shard} is damaged" in capsys.readouterr().err


def test_converted_for_torch_it_goes_on_in_plain_torch(tmp_path: Path) -> None:
    """Catches a state dict whose parameters are numbered in another order than torch's."""
    path, made = saved(tmp_path), engine()
    assert command("convert", path, tmp_path / "run.pt", "--to", "torch") == 0
    assert command("convert", path, tmp_path / "run.pt", "--to", "torch") == 2
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    model = Tied()
    model.load_state_dict(content["model"])
    optimizer = ARSG(model.parameters(), lr=1.0)
    optimizer.load_state_dict(content["optimizer"])
    assert content["parameters"] == [name for name, _ in model.named_parameters()]
    torch.manual_seed(5)
    inputs = torch.randn(5, 3)
    made.backward(made.module(inputs))
    made.step()
    model(inputs).backward()
    optimizer.step()
    for name, tensor in made.module.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_engines_counters_go_along(tmp_path: Path) -> None:
    """Catches a converted DeepSpeed run that counts its updates, and so its schedule, from 0 again."""
    made, communicator = engine(), SingleProcessCommunicator()
    state = made.state()
    state.counters = {"global_steps": 4}
    path = save_run(CheckpointStore(tmp_path / "runs", communicator), 1, state, {}, communicator)
    to_portable(SavedRun(path), tmp_path / "again", "single", {})
    assert SavedRun(tmp_path / "again").counters == {"global_steps": 4}


def test_exported_weights_are_those_of_the_module(tmp_path: Path) -> None:
    """Catches tied parameters left out, θ in place of x, and a dtype that is not the one asked for."""
    path, made = saved(tmp_path), engine()
    assert command("export", path, tmp_path / "x.safetensors") == 0
    assert command("export", path, tmp_path / "half.safetensors", "--dtype", "bfloat16") == 0
    assert command("export", path, tmp_path / "theta.safetensors", "--at", "theta") == 0
    weights = load_file(tmp_path / "x.safetensors")
    assert weights.keys() == made.module.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in made.module.state_dict().items())
    assert load_file(tmp_path / "half.safetensors")["last.weight"].dtype == torch.bfloat16
    with made.base_iterate():
        for name, theta in load_file(tmp_path / "theta.safetensors").items():
            assert torch.allclose(made.module.state_dict()[name], theta), name
