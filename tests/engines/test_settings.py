"""Settings that differ between the ranks are found at the update where they begin to differ."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.engine import JobError, LocalEngine
from arsg_dist.engine.settings import agree, message_of, settings_of
from tests.engines.settings_job import CHANGED
from tests.engines.test_agreement import ThreadCommunicator
from tests.support.launchers import launch


class Ranks(ThreadCommunicator):
    """Ranks that are threads, and can add up."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.all_gather_object(tensor)).sum(0)


def on_ranks(act: Any, ranks: int = 3) -> list[str]:
    """What each of several threads raised in `act(rank, communicator)`."""
    raised = [""] * ranks
    shared: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks)

    def rank(index: int) -> None:
        try:
            act(index, Ranks(index, shared, barrier))
        except JobError as error:
            raised[index] = str(error)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return raised


def numbers(**settings: Any) -> Tensor:
    return message_of(settings_of(ARSG([nn.Parameter(torch.ones(1))], **settings)))


@pytest.mark.parametrize("setting", [*CHANGED, "preconditioner", "maximize"])
def test_every_setting_counts_but_not_its_last_digit(setting: str) -> None:
    """Catches a setting, or the second of a pair, that is not compared; a text, which is no number; and a comparison
    bit by bit, which the C libraries of two hosts fail."""
    changed = {**CHANGED, "betas": (0.999, 0.5), "preconditioner": "none", "maximize": True}[setting]
    same = numbers()
    assert agree(same * 7)
    assert not agree(same * 1000 + numbers(**{setting: changed}))
    assert agree(same * 1000 + numbers(lr=1e-3 * (1 + 1e-15)))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_engine_names_the_ranks_before_its_update(clip: float) -> None:
    """Catches an update that is made all the same, on the rank that differs or on the others, a rank that goes on
    alone, and a first group that stands for all."""
    weights: list[Any] = [None] * 3

    def train(rank: int, communicator: Ranks) -> None:
        first, last = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        module = nn.ParameterList([first, last])
        optimizer = ARSG([{"params": [first]}, {"params": [last]}], lr=0.125, mu=0.0, preconditioner="none")
        engine = LocalEngine(module, optimizer, communicator, clip_grad_norm=clip)
        weights[rank] = module
        for update in range(3):
            if rank == 1 and update == 2:
                optimizer.param_groups[1]["lr"] = 0.5
            engine.backward((first + last).sum())
            engine.step()

    expected = (
        "of this update differ between the ranks: lr of group 1 is 0.125 on rank 0, 0.5 on rank 1. A schedule"
    )
    assert all(expected in text for text in on_ranks(train))
    values = [[parameter.item() for parameter in module] for module in weights]
    assert values[0] == values[1] == values[2]
    assert 0.99 < values[0][0] == values[0][1] < 1.0


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("launcher", "names"),
    [("warm deepspeed", ["stage0", "stage1", "stage2", "stage3"]), ("warm torchrun", ["ddp", "fsdp"])],
)
def test_engines_on_ranks_find_what_differs(launcher: str, names: list[str], tmp_path: Path) -> None:
    """Catches an engine, a ZeRO stage or a setting that is not compared, an update made before the answer, a rank that
    does not raise, and a weight written on one rank only, of which the others know nothing."""
    job = launch(launcher, 2, "tests/engines/settings_job.py", tmp_path / "results.pt", *names)
    assert job.code == 0, job.output[-5000:]
    (first, adam), (second, other_adam) = torch.load(tmp_path / "results.pt", weights_only=True)
    assert first == second
    if "stage1" in names:
        assert "1.weight was written since the last update" in first.pop("written")[""]
        assert "(on rank 1)" in second["written"][""]
    assert list(first) == names
    for name in (
        adam
    ):  # it is not ARSG's: replicas drift apart (stage 0), or parts of the model have rates of their own
        drifted = ([0.125], [0.25]) if name == "stage0" else ([0.125, 0.25], [0.125, 0.25])
        assert (adam[name], other_adam[name]) == drifted, name
    before = {"lr": "0.1", "betas": "0.9", "mu": "0.1", "weight_decay": "0", "eps": "1e-08"}
    after = {"lr": "0.25", "betas": "0.5", "mu": "0.2", "weight_decay": "0.1", "eps": "0.001"}
    for name, raised in first.items():
        for setting in CHANGED:
            expected = f"{setting} of group 1 is {before[setting]} on rank 0, {after[setting]} on rank 1"
            assert expected in raised[setting], (name, raised)
