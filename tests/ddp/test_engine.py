"""The engine `ddp` in one process; what several ranks do is in tests/engines, tests/imagenet and tests/checkpoint."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.ddp import DDPEngine, Shards, connect
from arsg_dist.ddp import engine as engine_module
from arsg_dist.ddp.shards import load_sharded
from arsg_dist.engine import Communicator, Ranks, SingleProcessEngine, discover_ranks, load_builder
from tests.ddp.jobs.shards_job import groups
from tests.engines.test_registry import settings
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.results import results_of

ALONE = Ranks(rank=0, world_size=1, local_rank=0, launcher="deepspeed or torchrun")


@pytest.fixture
def communicator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """Of a job of one rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what connect() sets is undone
        monkeypatch.delenv(name)
    connected = connect(ALONE)
    yield connected
    connected.close()


def test_gradients_travel_in_the_last_micro_batch_of_an_update_only(communicator: Communicator) -> None:
    """Catches an exchange in every backward pass, which costs as many times the network."""
    module = nn.Linear(3, 2)
    engine = DDPEngine(
        module, ARSG(module.parameters(), lr=0.1), communicator, accumulation_steps=3, bucket_cap_mb=1
    )
    exchanged_at, micro_batch = list[int](), 0

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged_at.append(micro_batch)
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    engine.module.register_comm_hook(None, hook)  # type: ignore[operator]
    for micro_batch in range(6):  # noqa: B007
        engine.backward(engine.module(torch.ones(4, 3)).sum())
        engine.step()
    assert exchanged_at == [2, 5]


def test_names_are_those_of_the_network(communicator: Communicator) -> None:
    """Catches 'module.' before the names in checkpoints and weight files, which no other engine would find."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    engine = DDPEngine(module, ARSG(module.parameters(), lr=0.1), communicator)
    engine.backward(engine.module(torch.randn(4, 3)).square().sum())
    engine.step()
    assert engine.whole_weights().keys() == module.state_dict().keys()
    assert {name for name, _ in engine.replicated_tensors()} >= {"0.weight", "0.weight's exp_avg"}
    assert {key.partition(":")[2] for key in engine.state().tensors} >= {"0.weight", "1.running_mean"}


@pytest.mark.parametrize("older", [False, True])
def test_buffers_are_sent_at_the_start_only(
    communicator: Communicator, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """Catches batch norm's statistics of every rank that are replaced by rank 0's at every forward pass, and a torch
    before 2.13, which has another argument for it, with which nothing is sent at the start either."""
    if older:
        monkeypatch.setattr(engine_module, "signature", lambda _: signature(lambda broadcast_buffers: None))
    sent, broadcast = list[int](), dist._broadcast_coalesced

    def counted(group: Any, tensors: list[torch.Tensor], *rest: Any) -> None:
        sent.append(len(tensors))
        broadcast(group, tensors, *rest)

    monkeypatch.setattr(dist, "_broadcast_coalesced", counted)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    engine = DDPEngine(module, ARSG(module.parameters(), lr=0.1), communicator)
    assert sum(sent) == 4 + 3  # parameters, and batch norm's statistics
    engine.backward(engine.module(torch.randn(4, 3)).square().sum())
    engine.step()
    assert sum(sent) == 4 + 3


def test_the_base_iterate_is_reached_and_left(communicator: Communicator) -> None:
    """Catches an evaluation at x, or parameters that do not come back."""
    module = nn.Linear(3, 2)
    optimizer = ARSG(module.parameters(), lr=0.1)
    engine = DDPEngine(module, optimizer, communicator)
    engine.backward(engine.module(torch.ones(4, 3)).sum())
    engine.step()
    before = module.weight.detach().clone()
    with optimizer.base_iterate():
        expected = module.weight.detach().clone()
    with engine.base_iterate():
        assert torch.equal(module.weight, expected)
        assert engine.at_base_iterate
        with pytest.raises(RuntimeError, match="backward inside base_iterate"):
            engine.backward(torch.zeros((), requires_grad=True))
    assert torch.equal(module.weight, before)
    assert not torch.equal(expected, before)


def test_parameters_that_the_loss_leaves_out_are_found_where_it_is_asked_for(
    communicator: Communicator,
) -> None:
    """Catches an option that is lost on its way: torch ends the run in the next forward pass."""
    for find in (True, False):
        builder = load_builder("ddp")(settings(engine_options={"find_unused_parameters": find}), world_size=1)
        module = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
        module.forward = module["used"].forward  # type: ignore[method-assign]
        engine = builder.build(module, communicator, ALONE)
        before = module["used"].weight.detach().clone()
        engine.backward(engine.module(torch.ones(4, 3)).sum())
        engine.step()
        assert not torch.equal(module["used"].weight, before)
        if find:
            engine.module(torch.ones(4, 3))
        else:
            with pytest.raises(RuntimeError, match="find_unused_parameters"):
                engine.module(torch.ones(4, 3))


def divided(name: str) -> Any:
    return results_of("warm torchrun", 2, "ddp/jobs/shards_job")[name]


def alone(clip_grad_norm: float = 0.0) -> SingleProcessEngine:
    model = toy.build_model()
    engine = SingleProcessEngine(
        model, ARSG(groups(model), **toy.HYPERPARAMETERS), clip_grad_norm=clip_grad_norm
    )
    for update in range(toy.UPDATES):
        inputs, targets = toy.batch(update)
        engine.backward(toy.loss_of(model(inputs), targets))
        engine.step()
    return engine


@pytest.mark.ranks
def test_a_divided_update_equals_one_process() -> None:
    """Catches elements that no rank updates or two do, a part of the gradient's norm, the first group's settings for
    all, parameters of other ranks that stay as they were, and a rank that leaves an update out alone."""
    start = {name: tensor.detach().clone() for name, tensor in toy.build_model().state_dict().items()}
    for name, norm in (("fp32", 0.0), ("clipped", 0.5), ("skipping", 0.0)):
        weights, expected = divided(name), dict(alone(norm).module.state_dict())
        assert torch.equal(weights["0.bias"], start["0.bias"])  # which no group has
        trained = start.keys() - {"0.bias"}
        assert_same_weights(
            *({key: made[key] for key in trained} for made in (weights, expected)),
            started_from={key: start[key] for key in trained},
        )
    assert divided("skipping: skipped") == 1
    assert divided("fp32: skipped") == 0


@pytest.mark.ranks
def test_each_rank_holds_its_part_of_the_state_and_no_more() -> None:
    """Catches state of whole parameters, and parts that differ by more than the padding to whole numbers."""
    trained = sum(x.numel() for group in groups(toy.build_model()) for x in group["params"])
    held = divided("held")
    assert sum(held) == 3 * trained
    assert max(held) == 3 * -(-trained // 2)


@pytest.mark.ranks
def test_divided_and_whole_updates_go_on_from_each_others_checkpoints() -> None:
    """Catches parts written at another place, settings of the new optimizer left in place, and θ of a part."""
    for before in (True, False):
        for after in (True, False):
            for name, tensor in divided("fp32").items():
                assert torch.equal(divided(f"divided {before} to {after}")[name], tensor), name
    engine = alone()
    with engine.base_iterate():
        for name, tensor in divided("theta").items():
            torch.testing.assert_close(tensor, engine.module.state_dict()[name], rtol=1e-4, atol=1e-5)
    for name, tensor in divided("skipping").items():
        assert torch.equal(divided("after")[name], tensor)
        assert name == "0.bias" or not torch.equal(divided("theta")[name], tensor)


def test_shards_keep_the_layout_of_their_parameters(communicator: Communicator, tmp_path: Path) -> None:
    """Catches elements in another order than their gradients and checkpoints, and fp16 whose gradient stays scaled."""
    made = []
    for options in ({"shard_update": True}, {"shard_update": False}):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        wanted = settings(channels_last=True, precision="fp16", engine_options=options, clip_grad_norm=0.5)
        engine: Any = load_builder("ddp")(wanted, world_size=1).build(module, communicator, ALONE)
        assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
        engine.backward(engine.module(torch.randn(5, 3, 2, 2)).square().sum())
        engine.step()
        made.append(engine)
    for name, tensor in made[1].whole_weights().items():
        torch.testing.assert_close(made[0].whole_weights()[name], tensor, rtol=1e-6, atol=1e-7)
    path = save_run(CheckpointStore(tmp_path, communicator), 1, made[0].state(), {}, communicator)
    for name, tensor in made[0].whole_weights().items():
        assert torch.equal(SavedRun(path).whole("parameter", name), tensor)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_parts_of_all_ranks_make_the_whole_update(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches elements that no rank updates or two do, a part of a parameter that takes another's state, and a
    parameter without a gradient that is moved."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 3), nn.Linear(1, 1))
        return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def groups_of(module: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": module[0].parameters(), "lr": 0.1},
            {"params": [*module[2:].parameters()], "mu": 0.5},
        ]

    def backward(module: nn.Sequential, update: int) -> None:
        torch.manual_seed(update)
        module[:3](torch.randn(5, 3, 2, 2)).square().sum().backward()

    whole = network()
    expected = ARSG(groups_of(whole), eps=1e-3)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    modules, shards, optimizers = [], [], []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        modules.append(network())
        shards.append(Shards(groups_of(modules[-1])))
        optimizers.append(ARSG(shards[-1].groups, eps=1e-3))

    class Sent:
        def __init__(self, tensor: torch.Tensor, source: int, *, async_op: bool) -> None:
            self.tensor, self.source = tensor, source
            assert async_op

        def wait(self) -> None:
            self.tensor.copy_(parts[self.source])

    monkeypatch.setattr(dist, "broadcast", Sent)
    for update in range(3):
        expected.zero_grad()
        backward(whole, update)
        expected.step()
        for module, own, optimizer in zip(modules, shards, optimizers, strict=True):
            module.zero_grad()
            backward(module, update)
            own.take_gradients()
            optimizer.step()
        parts = [own._flats[0][1].detach().clone() for own in shards]
        for module, own in zip(modules, shards, strict=True):
            own.gather()
            for name, tensor in whole.state_dict().items():
                torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    assert len({part.numel() for part in parts}) == 1
    assert torch.equal(modules[0][3].weight, network()[3].weight)


def test_every_rank_has_the_settings_of_every_group_after_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rank that has no part of a group and writes its first learning rate into the next checkpoint."""
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    groups_of = [{"params": [layer.weight], "lr": lr} for layer, lr in zip(module, (0.1, 0.02), strict=True)]
    alone = SingleProcessEngine(module, ARSG(groups_of))
    path = save_run(CheckpointStore(tmp_path, alone.communicator), 1, alone.state(), {}, alone.communicator)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank, parts in ((0, [1, 0]), (1, [1, 1])):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shards = Shards([{"params": [layer.weight]} for layer in module])
        optimizer = ARSG(shards.groups, lr=9.0)
        assert [len(group["params"]) for group in optimizer.param_groups] == parts
        load_sharded(module, optimizer, shards, SavedRun(path))
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]


def test_an_update_that_looks_across_elements_is_not_divided(communicator: Communicator) -> None:
    """Catches an optimizer of whole matrices that is given pieces of them, and a parameter in two places."""
    module = nn.Linear(3, 2)
    shards = Shards(module.parameters())
    optimizer = torch.optim.Adafactor(shards.groups)
    with pytest.raises(TypeError, match="Adafactor is not known to update every element"):
        DDPEngine(module, optimizer, communicator, shards=shards)
    wanted = settings(optimizer_type="Muon", engine_options={"shard_update": True})
    with pytest.raises(TypeError, match=r"Muon is not known to update every element .*: leave shard_update"):
        load_builder("ddp")(wanted, world_size=2)
    with pytest.raises(ValueError, match="in two groups, or twice"):
        Shards([module.weight, module.weight])


@pytest.mark.parametrize("environment", [{}, {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}])
def test_a_start_without_a_launcher_that_fits_says_how(environment: dict[str, str]) -> None:
    """Catches a job that waits for ranks nobody starts, or N jobs of one rank."""
    with pytest.raises(ValueError, match="start it with 'torchrun --nproc-per-node 2"):
        connect(discover_ranks(environment))
