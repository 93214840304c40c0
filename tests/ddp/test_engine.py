"""The engine `ddp` in one process; what several ranks do is in tests/engines, tests/imagenet and tests/checkpoint."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
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
from arsg_dist.ddp.reducer import Reducer
from arsg_dist.ddp.shards import load_sharded
from arsg_dist.engine import Communicator, JobError, Ranks, SingleProcessEngine, discover_ranks, load_builder
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


def test_a_divided_update_sends_buckets_as_they_become_complete(
    communicator: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an exchange that begins when the backward pass is over, or is made in every micro-batch."""
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    happened, send = list[str](), dist.all_to_all_single
    module[0].weight.register_post_accumulate_grad_hook(lambda _: happened.append("first layer"))
    shards = Shards(module.parameters(), bucket_cap_mb=24 / 2**20)
    engine = DDPEngine(module, ARSG(shards.groups, lr=0.1), communicator, accumulation_steps=2, shards=shards)

    def counted(*arguments: Any, **options: Any) -> Any:
        happened.append("sent")
        return send(*arguments, **options)

    monkeypatch.setattr(dist, "all_to_all_single", counted)
    for _ in range(4):
        happened.append("micro-batch")
        engine.backward(engine.module(torch.ones(4, 3)).square().sum())
        engine.step()
    update = ["micro-batch", "first layer", "micro-batch", "sent", "first layer", "sent"]
    assert happened == 2 * update


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
    for name, norm in (("fp32", 0.0), ("clipped", 0.5), ("buckets", 0.0), ("skipping", 0.0)):
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
    """Catches elements that no rank updates or two do, a part that takes another's gradient, and gradients that are
    sent before all micro-batches are in them."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 1))
        return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def groups_of(module: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": module[0].parameters(), "lr": 0.1},
            {"params": [*module[2:].parameters()], "mu": 0.5},
        ]

    def backward(module: nn.Sequential, seed: int, weight: float) -> None:
        torch.manual_seed(seed)
        (weight * module(torch.randn(5, 3, 2, 2)).square().sum()).backward()

    acting, parts = 0, list[list[torch.Tensor]]()
    sent_by: list[list[torch.Tensor]] = [[] for _ in range(ranks)]

    def all_to_all(received: torch.Tensor, whole: torch.Tensor, *, async_op: bool) -> SimpleNamespace:
        assert async_op
        number, rank = len(sent_by[acting]), acting
        sent_by[rank].append(whole.clone())
        return SimpleNamespace(
            wait=lambda: received.copy_(torch.cat([sent[number].chunk(ranks)[rank] for sent in sent_by]))
        )

    def broadcast(sent: torch.Tensor, source: int, *, async_op: bool) -> SimpleNamespace:
        assert async_op
        bucket = number[0] // ranks
        number[0] += 1
        return SimpleNamespace(wait=lambda: sent.copy_(parts[source][bucket]))

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    whole = network()
    expected = ARSG(groups_of(whole), eps=1e-3)
    modules, shards, optimizers, reducers = [], [], [], []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        modules.append(network())
        shards.append(
            Shards(groups_of(modules[-1]), order=modules[-1].parameters(), bucket_cap_mb=68 / 2**20)
        )
        optimizers.append(ARSG(shards[-1].groups, eps=1e-3))
        communicator: Any = SimpleNamespace(
            rank=rank, world_size=ranks, start_sum=lambda used: lambda: used * ranks
        )
        reducers.append(Reducer(modules[-1], shards[-1], communicator, find_unused=False))
    assert [[*bucket.starts.values()] for bucket in shards[0].buckets] == [[0, 1, 4], [0, 12], [0]]
    for update in range(3):
        expected.zero_grad()
        for micro_batch in range(2):
            backward(whole, 2 * update + micro_batch, 1.0)
        expected.step()
        for acting in range(ranks):
            for micro_batch in range(2):
                reducers[acting].begin(ends_update=micro_batch == 1)
                backward(modules[acting], 2 * update + micro_batch, 1 + 0.1 * (acting - (ranks - 1) / 2))
            assert len(sent_by[acting]) == 3 * (update + 1)
        for acting in range(ranks):
            reducers[acting].finish()
        for optimizer in optimizers:
            optimizer.step()
        parts = [[bucket.part.clone() for bucket in own.buckets] for own in shards]
        for module, own in zip(modules, shards, strict=True):
            number = [0]
            own.gather()
            for name, tensor in whole.state_dict().items():
                torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    assert len({tuple(part.numel() for part in of_rank) for of_rank in parts}) == 1


class _Branches(nn.ModuleDict):
    """Leaves one branch out of the second forward pass."""

    passes = 0

    def __init__(self) -> None:
        super().__init__({name: nn.Linear(3, 2) for name in ("used", "left_out", "frozen")})
        self["frozen"].requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        names = ("used", "left_out", "frozen") if self.passes == 1 else ("used", "frozen")
        return torch.stack([self[name](inputs) for name in names]).sum(0)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("find", [False, True])
def test_what_a_loss_leaves_out_is_found_or_refused(
    communicator: Communicator, divided: bool, find: bool
) -> None:
    """Catches a parameter that goes on by its momentum although no loss has used it, a frozen one taken for left out,
    and an option that is lost on its way."""
    options = {"find_unused_parameters": find, "shard_update": divided}
    module = _Branches()
    wanted = settings(
        engine_options=options, build_optimizer=lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9)
    )
    engine = load_builder("ddp")(wanted, 1).build(module, communicator, ALONE)

    def update() -> set[str]:
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        engine.backward(engine.module(torch.ones(4, 3)).square().sum())
        engine.step()
        now = module.state_dict()
        return {
            name.partition(".")[0] for name, tensor in before.items() if not torch.equal(now[name], tensor)
        }

    assert update() == {"used", "left_out"}
    if find:
        assert update() == {"used"}
        assert update() == {"used"}
    else:
        with pytest.raises((JobError, RuntimeError), match="find_unused_parameters"):
            update(), update()  # torch says it in the next forward pass


def test_a_divided_update_of_what_is_unfrozen_later(communicator: Communicator) -> None:
    """Catches gradients that begin to come after the engine was made, and never get to the parts."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    shards = Shards(module.parameters())
    engine = DDPEngine(module, ARSG(shards.groups, lr=0.1), communicator, shards=shards)
    before = module[0].weight.clone()
    for moves in (False, True):
        engine.backward(engine.module(torch.ones(4, 3)).square().sum())
        engine.step()
        assert torch.equal(module[0].weight, before) is not moves
        module[0].requires_grad_(True)
        engine._announce_micro_batch()


def test_a_second_backward_pass_of_one_micro_batch_is_refused(communicator: Communicator) -> None:
    """Catches a gradient that is added to one that has been sent, and lost; and hooks that outlive their engine."""
    module = nn.Linear(3, 2)
    shards = Shards(module.parameters())
    engine = DDPEngine(module, ARSG(shards.groups, lr=0.1), communicator, shards=shards)
    engine.backward(engine.module(torch.ones(4, 3)).sum())
    with pytest.raises(RuntimeError, match=r"weight has a gradient from a second backward pass|bias has"):
        engine.backward(engine.module(torch.ones(4, 3)).sum())
    with pytest.raises(TypeError, match=r"bucket_cap_mb: of DistributedDataParallel, .* leave it out"):
        DDPEngine(module, engine.optimizer, communicator, shards=shards, bucket_cap_mb=1)
    del engine
    module.zero_grad()
    module(torch.ones(4, 3)).sum().backward()
    assert module.weight.grad is not None


def test_every_rank_has_the_settings_of_every_group_after_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rank that has no part of a group and writes its first learning rate into the next checkpoint."""
    # Saved in three groups and loaded into two: an empty one could not be told by its place.
    module = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((4, 4), (4, 1), (1, 1))))
    groups_of = [
        {"params": [layer.weight], "lr": lr} for layer, lr in zip(module, (0.1, 0.02, 0.02), strict=True)
    ]
    alone = SingleProcessEngine(module, ARSG(groups_of))
    path = save_run(CheckpointStore(tmp_path, alone.communicator), 1, alone.state(), {}, alone.communicator)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank, parts in ((0, [1, 2]), (1, [1, 0])):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shards = Shards([{"params": [module[0].weight]}, {"params": [module[1].weight, module[2].weight]}])
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
    wanted = settings(optimizer_type="Adafactor", engine_options={"shard_update": True})
    with pytest.raises(
        TypeError, match=r"Adafactor is not known to update every element .*: leave shard_update"
    ):
        load_builder("ddp")(wanted, world_size=2)
    with pytest.raises(ValueError, match="in two groups, or twice"):
        Shards([module.weight, module.weight])


@pytest.mark.parametrize("environment", [{}, {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}])
def test_a_start_without_a_launcher_that_fits_says_how(environment: dict[str, str]) -> None:
    """Catches a job that waits for ranks nobody starts, or N jobs of one rank."""
    with pytest.raises(ValueError, match="start it with 'torchrun --nproc-per-node 2"):
        connect(discover_ranks(environment))
