"""The engine `fsdp`; what it shares with others is in tests/engines, tests/imagenet and tests/checkpoint."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard

from arsg_dist import ARSG
from arsg_dist.engine import SingleProcessCommunicator, SingleProcessEngine, discover_ranks, load_builder
from arsg_dist.fsdp import FSDPEngine, shard, units_of
from arsg_dist.fsdp.state import place_of
from arsg_dist.fsdp.units import recompute_activations, replicas_of_shards
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.recipe import read_arguments
from tests.engines.test_registry import settings
from tests.fsdp.jobs.mesh_job import HIDDEN, OPTIMIZERS
from tests.support import toy
from tests.support.compare import assert_same_weights, skip_without_sharding_on_cpu
from tests.support.results import results_of


def result(name: str) -> Any:
    skip_without_sharding_on_cpu()
    return results_of("warm torchrun", 4, "fsdp/jobs/mesh_job")[name]


def started_from() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in toy.build_model().state_dict().items()}


@pytest.mark.ranks
def test_replicas_of_shards_equal_one_process() -> None:
    """Catches gradients averaged over one dimension of the mesh, a norm of one shard, and weights that ranks began
    with on their own."""
    assert_same_weights(
        result("trained"), toy.single_process_weights(clip_grad_norm=0.5), started_from=started_from()
    )


@pytest.mark.ranks
def test_replicas_of_shards_resume_with_the_same_bits() -> None:
    """Catches shards that are written by both replicas, or read at another place."""
    for name, tensor in result("trained").items():
        assert torch.equal(result("resumed")[name], tensor), name


@pytest.mark.ranks
def test_a_script_with_torchs_own_checkpoints_goes_on_with_the_same_bits() -> None:
    """Catches shards put together at another place, and state or settings that torch's load does not find in what
    `to_dcp` wrote."""
    assert result("differences") == []
    for name, tensor in result("resumed").items():
        assert torch.equal(result("through torch's format")[name], tensor), name


@pytest.mark.ranks
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_optimizer_alone_on_tensor_parallel_parameters_equals_one_process(name: str) -> None:
    """Catches an update of a layer cut by columns that takes its state for one cut by rows, whole parameters beside cut
    ones, and two meshes in one optimizer."""
    model = toy.build_model(*HIDDEN)
    started = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    settings: Any = {**toy.HYPERPARAMETERS, **OPTIMIZERS[name], "foreach": False, "fused": False}
    optimizer = ARSG(model.parameters(), **settings)
    for update in range(toy.UPDATES):
        optimizer.zero_grad()
        inputs, targets = toy.batch(update)
        toy.loss_of(model(inputs), targets).backward()
        optimizer.step()
    for mesh in ("row and column", "two dimensions"):
        assert_same_weights(result(f"{mesh}, {name}"), dict(model.state_dict()), started_from=started)


@pytest.mark.ranks
def test_one_ranks_bad_gradient_leaves_the_update_out_everywhere() -> None:
    """Catches ranks that decide alone, of which one then waits for the others."""
    assert result("skipped") == 1


@pytest.mark.ranks
def test_the_base_iterate_is_reached_through_shards() -> None:
    """Catches an evaluation with the weights that were gathered at x, and an x that does not come back."""
    module = toy.build_model()
    engine = SingleProcessEngine(module, ARSG(module.parameters(), **toy.HYPERPARAMETERS), clip_grad_norm=0.5)
    for update in range(toy.UPDATES):
        inputs, targets = toy.batch(update)
        engine.backward(toy.loss_of(engine.module(inputs), targets))
        engine.step()
    with engine.base_iterate():
        # θ has moved little, by differences of numbers as large as the movement of x: their roundings remain.
        assert_same_weights(
            result("theta"), dict(module.state_dict()), started_from=started_from(), relative=1e-3
        )
        expected = module(toy.batch(0)[0]).detach()
    torch.testing.assert_close(result("logits at theta"), expected, rtol=1e-4, atol=1e-5)
    for name, tensor in result("trained").items():
        assert torch.equal(result("after")[name], tensor), name


@pytest.fixture
def _alone() -> Iterator[None]:
    """A process group of this process."""
    skip_without_sharding_on_cpu()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class AnotherIsBad(SingleProcessCommunicator):
    """Answers as if another rank said what `other` is."""

    other = False

    def __init__(self) -> None:
        self.said = list[bool]()

    def start_any(self, flag: bool) -> Callable[[], bool]:
        self.said.append(flag)
        return lambda: flag or self.other


@pytest.mark.usefixtures("_alone")
def test_a_bad_shard_of_any_rank_leaves_the_update_out() -> None:
    """Catches a rank that looks at its own shard alone: with a bad element in one shard it would be the only one that
    leaves the update out, or does not say so."""
    module = nn.Linear(2, 2)
    shard(module)
    communicator = AnotherIsBad()
    engine = FSDPEngine(
        module, torch.optim.SGD(module.parameters(), lr=0.1), communicator, skip_nonfinite=True
    )
    for own, other, skipped in ((1.0, True, 1), (float("nan"), False, 2), (1.0, False, 2)):
        communicator.other = other
        before = [parameter.clone() for parameter in engine.local_parameters()]
        engine.backward(module(torch.full((1, 2), own)).sum())
        engine.step()
        assert engine.skipped_updates == skipped
        after = engine.local_parameters()
        changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert changed == [not other and own == 1.0] * 2
    assert communicator.said == [False, True, False]


@pytest.mark.usefixtures("_alone")
def test_an_overflow_in_any_shard_lowers_the_scale_and_leaves_the_update_out() -> None:
    """Catches ranks that scale and update on their own: the scaler of each looks at its own shards."""
    ranks = discover_ranks({})
    wanted = settings(precision="fp16", clip_grad_norm=0.5)
    communicator = AnotherIsBad()
    engine: Any = load_builder("fsdp")(wanted, world_size=1).build(nn.Linear(2, 2), communicator, ranks)
    assert engine.loss_scaling
    for other, scale in ((False, 65536.0), (True, 32768.0), (False, 32768.0)):
        communicator.other = other
        before = [parameter.clone() for parameter in engine.local_parameters()]
        engine.backward(engine.module(torch.ones(1, 2)).sum())
        engine.step()
        moved = [(x - y).norm() for x, y in zip(before, engine.local_parameters(), strict=True)]
        assert engine.state().loss_scale["scale"] == scale
        expected = 0.0 if other else 0.5 * 0.1  # the gradient's norm times the learning rate of SGD
        torch.testing.assert_close(torch.stack(moved).norm(), torch.tensor(expected))


class Block(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.passes = nn.Linear(3, 3), 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.layer(inputs).tanh()


@pytest.mark.usefixtures("_alone")
def test_activations_are_computed_again_and_the_gradient_is_the_same() -> None:
    """Catches an option that does nothing, and names that checkpoints of other engines do not have."""
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block())
    engines = []
    for again in (False, True):
        module = copy.deepcopy(plain)
        wanted = settings(
            engine_options={"activation_checkpointing": again, "reshard_after_forward": not again}
        )
        builder = load_builder("fsdp")(wanted, world_size=1)
        engine: Any = builder.build(module, SingleProcessCommunicator(), discover_ranks({}))
        engine.backward(engine.module(torch.ones(2, 3)).sum())
        assert [block.passes for block in module] == [2 if again else 1] * 2
        engine.step()
        engines.append(engine)
    first, second = (engine.whole_weights() for engine in engines)
    assert first.keys() == second.keys() == plain.state_dict().keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("half", [True, False], ids=["bf16 by policy", "offloaded"])
def test_policies_of_fully_shard_reach_it(half: bool) -> None:
    """Catches a policy that is dropped, masters in half precision, and a clipping of other gradients."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    sharded, inputs = copy.deepcopy(plain), torch.randn(4, 5)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(
        sharded, **({"mp_policy": policy} if half else {"offload_policy": CPUOffloadPolicy(pin_memory=False)})
    )
    engine = FSDPEngine(
        sharded, ARSG(sharded.parameters(), lr=0.1), SingleProcessCommunicator(), clip_grad_norm=0.5
    )
    optimizer = ARSG(plain.parameters(), lr=0.1)
    for _ in range(2):
        engine.backward(engine.module(inputs).float().square().mean())
        engine.step()
        computed = copy.deepcopy(plain).bfloat16() if half else plain
        computed(inputs.bfloat16() if half else inputs).float().square().mean().backward()
        for parameter, copied in zip(plain.parameters(), computed.parameters(), strict=True):
            parameter.grad = copied.grad.float()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in engine.whole_weights().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    assert engine.state().tensors["exp_avg:0.weight"].dtype == torch.float32


def test_the_plan_of_a_recipe_names_what_is_gathered(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that starts a training, or sums up other parameters than the network has; and an option that is
    read as text."""
    arguments = ["--engine", "fsdp", "--model", "resnet20", "--print-plan"]
    assert train_command([*arguments, "--engine_options.reshard_after_forward", "false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "gathers 9 parts of resnet20" in lines[0]
    numbers = [int(line.split()[0].replace(",", "")) for line in lines[1:]]
    assert sum(numbers) == sum(x.numel() for x in build_model("resnet20", 1000).parameters())
    options = read_arguments(
        [*arguments[:4], "--engine_options.reshard_after_forward", "false"]
    ).engine_options
    load_builder("fsdp").check_options("fsdp", options)
    assert train_command(["--engine", "single", "--model", "resnet20", "--print-plan"]) == 0
    assert "gathers no parts" in capsys.readouterr().out


def test_networks_that_cannot_be_computed_twice_are_refused() -> None:
    """Catches batch norm's statistics that count each batch twice, and an option without an effect."""
    with pytest.raises(
        ValueError, match=r"statistics of its bn1 \(batch norm\) would count every batch twice"
    ):
        recompute_activations(build_model("resnet18", 10))
    with pytest.raises(ValueError, match="needs a network with blocks"):
        recompute_activations(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("hosts", "mesh"),
    [("aabb", (2, 2)), ("aaa", (1, 3)), ("aab", None), ("abab", None), ("ab", None), ("aabbb", None)],
)
def test_shards_within_a_host_need_as_many_ranks_on_each(hosts: str, mesh: tuple[int, int] | None) -> None:
    """Catches shards spread over hosts, and replicas that are no replicas."""
    if mesh:
        assert replicas_of_shards([*hosts]) == mesh
    else:
        with pytest.raises(ValueError, match="shard_group: node"):
            replicas_of_shards([*hosts])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_the_place_of_a_shard_is_where_torch_has_cut_it(rows: int, ranks: int) -> None:
    """Catches rows that do not divide by the ranks counted as if they did, a rank that has none, and a dimension of
    replicas that counts as one of shards."""
    whole = torch.arange(rows * 3.0).view(rows, 3)
    parts = [*whole.chunk(ranks), *[whole[:0]] * ranks][:ranks]
    for rank, part in enumerate(parts):
        for placements, mesh in (((Shard(0),), [ranks]), ((Replicate(), Shard(0)), [2, ranks])):
            tensor: Any = SimpleNamespace(
                shape=whole.shape,
                placements=placements,
                device_mesh=SimpleNamespace(
                    size=lambda dim, mesh=mesh: mesh[dim],
                    get_local_rank=lambda dim, mesh=mesh, rank=rank: rank if dim == len(mesh) - 1 else 1,
                ),
                to_local=lambda part=part: part,
            )
            start, numel = place_of(tensor)
            assert torch.equal(whole.view(-1)[start : start + numel], part.reshape(-1))
    tensor.placements = (Shard(1),)
    with pytest.raises(ValueError, match="shard dimension 0 only"):
        place_of(tensor)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Outer(nn.Module):
    """A block with a row of blocks in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Sequential(Inner(), Inner())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (build_model("resnet18", 10), [f"layer{row}.{index}" for row in range(1, 5) for index in range(2)]),
        (build_model("vit_b_16", 10), [f"encoder.layers.encoder_layer_{index}" for index in range(12)]),
        (build_model("resnet20", 10), [f"blocks.{index}" for index in range(9)]),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), []),
        (nn.Sequential(Outer(), Outer(), Inner()), ["0", "1", "2"]),
    ],
    ids=["resnet18", "vit_b_16", "resnet20", "two layers", "blocks in blocks"],
)
def test_units_are_the_blocks(module: nn.Module, expected: list[str]) -> None:
    """Catches a network gathered whole, layer by layer, or the blocks in a block one by one."""
    assert [name for name, _ in units_of(module)] == expected


def test_a_torch_that_cannot_shard_on_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the AttributeError of torch 2.6's streams at the first forward pass."""
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(
        ValueError, match="does not work on CPU: take a newer torch or a GPU, or use the engine ddp"
    ):
        shard(nn.Linear(2, 2))


def test_what_does_not_work_is_refused_before_training() -> None:
    """Catches whole parameters under an engine of shards, scalars, and options that another engine has."""
    for options, message in (
        (
            {"find_unused_parameters": True},
            "is no option of the engine fsdp: it has activation_checkpointing",
        ),
        ({"shard_group": "rack"}, "must be one of job, node, not 'rack'"),
        ({"reshard_after_forward": 1}, "must be one of true, false, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_builder("fsdp").check_options("fsdp", options)
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"call arsg_dist\.fsdp\.shard"):
        FSDPEngine(module, ARSG(module.parameters()), SingleProcessCommunicator())
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="'scale' has no dimension"):
        shard(module)
    pytest.importorskip("horovod", reason="the rest of the test is about another engine")
    with pytest.raises(ValueError, match="engine horovod: it has none"):
        load_builder("horovod").check_options("horovod", {"reshard_after_forward": True})
