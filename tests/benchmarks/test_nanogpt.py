"""The optimizer track's script on a tiny network and tiny shards: its data, its updates, ranks, and going on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.nanogpt import __main__ as command
from benchmarks.nanogpt.data import Batches, read_shard, shards, write_shard, write_synthetic
from benchmarks.nanogpt.model import GPT, Affine, Size, rotate
from benchmarks.nanogpt.optimizers import OPTIMIZERS, groups_of, make, set_learning_rates
from tests.support.launchers import launch

SIZES = {
    **{
        "vocabulary": 64,
        "layers": 1,
        "width": 16,
        "head": 8,
        "time": 8,
        "tokens": 64,
        "micro": 2,
        "val-tokens": 64,
    },
    **{"val-every": 2, "steps": 4, "warmup": 2, "synthetic": 700},
}
TINY = [*(f"--{name}={number}" for name, number in SIZES.items()), "--dtype=float32", "--no-compile"]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_the_updates_tokens_come_in_the_tracks_order(tmp_path: Path) -> None:
    """Catches a token left out or used twice, at the end of a file too, and a rank that gets another's part."""
    for number, first in ((1, 0), (2, 100)):
        write_shard(tmp_path / f"x_train_{number:06}.bin", np.arange(first, first + 26))
    paths = shards(tmp_path, "train")
    assert paths == sorted(paths)
    # 26 tokens, 8 an update: 0-8, 8-16, 16-24; the loader of the track asks that one more follows: 24 + 1 < 26.
    begins = [0, 8, 16, 100, 108, 116]
    for rank in (0, 1):
        got, batches = [], Batches(paths, 8, 4, rank, 2).after(0)
        for _ in begins:
            tokens, following = next(batches)
            got.append(tokens[0].tolist())
            assert following[0].tolist() == [token + 1 for token in got[-1]]
        with pytest.raises(ValueError, match="used up"):
            next(batches)
        assert got == [list(range(begin + 4 * rank, begin + 4 * rank + 4)) for begin in begins]
    assert next(Batches(paths, 8, 4).after(4))[0].tolist() == [[108, 109, 110, 111], [112, 113, 114, 115]]
    (tmp_path / "y_val_000000.bin").write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match="copy it again"):
        read_shard(tmp_path / "y_val_000000.bin")
    with pytest.raises(ValueError, match="no whole sequences"):
        Batches(paths, 8, 4, 0, 3)


def test_the_network_is_the_tracks() -> None:
    """Catches a position that sees later ones, a rotation of the wrong half, logits without their cap."""
    model = GPT(Size(64, 2, 16, 8), torch.float32)
    model.start(1)
    assert math.isclose(
        model(torch.zeros(1, 8).long(), torch.ones(1, 8).long()).item(), 8 * math.log(64), rel_tol=1e-6
    )
    assert math.isclose(model.blocks[0].up.weight.std().item(), (3 * 16) ** -0.5, rel_tol=0.1)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(2)))
        tokens, ones = torch.arange(8)[None], torch.ones(1, 1, dtype=torch.int64)
        later = tokens.clone()
        later[0, 5:] = 63
        cut = [model(some[:, :5], ones.expand(1, 5)) for some in (tokens, later)]
        assert torch.equal(*cut)
        one_hot = torch.tensor([model(tokens[:, :1], token * ones) for token in range(64)])
        x = model.first_norm(model.embedding(tokens[:, :1]))
        for block in model.blocks:
            x = block(x)
        logits = model.head(model.last_norm(x)).flatten().double()
        capped = 15 * logits / (logits**2 + 225).sqrt()
        torch.testing.assert_close(one_hot.double(), -functional.log_softmax(capped, 0), rtol=1e-5, atol=1e-5)
    turned = rotate(torch.ones(1, 1, 3, 8))[0, 0]
    for place, rate in ((0, 1.0), (1, 1 / 1024)):  # two of four pairs turn
        angle = 2 * rate
        assert math.isclose(turned[2, place], math.cos(angle) + math.sin(angle), rel_tol=1e-5)
        assert math.isclose(turned[2, place + 4], math.cos(angle) - math.sin(angle), rel_tol=1e-5)
    assert torch.equal(turned[:, [2, 3, 6, 7]], torch.ones(3, 4))
    assert Affine(4, 2).to(torch.float32)(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_has_every_parameter_once_and_the_schedule(name: str) -> None:
    """Catches a parameter that nobody trains or two do, and a rate that the schedule forgets."""
    model = GPT(Size(64, 2, 16, 8), torch.float32)
    optimizers = make(name, model, 2.0)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(param) for group in groups for param in group["params"]]
    assert sorted(held) == sorted(id(param) for param in model.parameters())
    assert [len(found) for found in groups_of(model).values()] == [1, 1, 12, 19]
    begun = [group["lr"] for group in groups]
    for update, warmup, factor in ((0, 4, 0.25), (29, 0, 1.0), (65, 0, 0.5), (99, 0, 0.01 / 0.7)):
        assert math.isclose(set_learning_rates(optimizers, update, 100, warmup), factor)
        assert [group["lr"] for group in groups] == pytest.approx([factor * lr for lr in begun])


@pytest.mark.parametrize("name", ["muon", "remote-muon", "arsg"])
def test_an_interrupted_run_ends_as_the_uninterrupted(name: str, tmp_path: Path) -> None:
    """Catches state that a checkpoint lacks, tokens used twice, and a run that is done once more."""
    data = tmp_path / "data"
    common = ["--data", str(data), "--optimizers", name, "--seeds", "3", *TINY]
    assert command.main([*common, "--output", str(tmp_path / "whole")]) == 0
    assert command.main([*common, "--output", str(tmp_path / "cut"), "--minutes", "1e-9"]) == 75
    whole, cut = (tmp_path / which / f"{name}_seed3" for which in ("whole", "cut"))
    assert not cut.exists()  # no time at all: not begun

    job = command.Job()
    options = command._options([*common, "--output", str(tmp_path / "cut")])
    settings = command.Settings(Size(64, 1, 16, 8), 4, 64, 8, 2, 64, 2, 2, "float32", 1.0)
    assert not command.Run(job, data, cut, name, 3, settings, options.compile).carry_out(0.0)
    assert [record.get("step") for record in records(cut)] == [None, 0, 2]
    with pytest.raises(ValueError, match="another scale"):
        command.main([*common, "--output", str(tmp_path / "cut"), "--lr-scale", "2"])
    assert command.main([*common, "--output", str(tmp_path / "cut")]) == 0
    losses = [
        [{key: record.get(key) for key in ("step", "val_loss", "val_loss_theta")} for record in records(run)]
        for run in (whole, cut)
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1]["val_loss"] < losses[0][1]["val_loss"]
    assert ("val_loss_theta" in records(whole)[-1]) == (name != "muon")
    before = (cut / "records.jsonl").stat().st_mtime_ns
    assert command.main([*common, "--output", str(tmp_path / "cut")]) == 0
    assert (cut / "records.jsonl").stat().st_mtime_ns == before
    assert not (cut / "checkpoint.pt").exists()


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    """Catches gradients of one rank alone, a rank that trains on the other's tokens, and a loss counted twice."""
    common = ["--data", str(tmp_path / "data"), "--optimizers", "remote-muon", "arsg", *TINY]
    assert command.main([*common, "--output", str(tmp_path / "one")]) == 0
    job = launch(
        "warm torchrun", 2, "benchmarks/nanogpt/__main__.py", *common, "--output", str(tmp_path / "two")
    )
    assert job.code == 0, job.output[-3000:]
    for name in ("remote-muon", "arsg"):
        one, two = (records(tmp_path / which / f"{name}_seed0") for which in ("one", "two"))
        assert two[0]["ranks"] == 2
        for key in ("val_loss", "val_loss_theta"):
            assert [r.get(key) for r in two[2:]] == pytest.approx([r[key] for r in one[2:]], rel=1e-4)
        assert one[-1]["val_loss"] < one[1]["val_loss"]


def test_synthetic_tokens_follow_from_the_one_before_half_of_the_time(tmp_path: Path) -> None:
    """Catches shards in which nothing can be learned, or everything."""
    write_synthetic(tmp_path, 64, 5000, 1)
    tokens = read_shard(shards(tmp_path, "train")[0]).long()
    pairs = torch.bincount(64 * tokens[:-1] + tokens[1:], minlength=64 * 64).view(64, 64)
    share = pairs.max(dim=1).values.sum() / (len(tokens) - 1)
    assert 0.5 < share < 0.6
    assert not torch.equal(tokens, read_shard(shards(tmp_path, "val")[0]).long())


def test_every_optimizer_trains_in_bfloat16(tmp_path: Path) -> None:
    """Catches an optimizer that refuses the track's embedding, whose dtype is another than the rest's."""
    common = ["--data", str(tmp_path / "data"), "--output", str(tmp_path), "--optimizers", *OPTIMIZERS, *TINY]
    assert command.main([*common, "--dtype=bfloat16", "--steps=2", "--warmup=1"]) == 0
    for name in OPTIMIZERS:
        begin, end = records(tmp_path / f"{name}_seed0")[1:]
        assert end["val_loss"] < begin["val_loss"]
