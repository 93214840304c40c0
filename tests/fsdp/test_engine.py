"""The engine `fsdp`; what it shares with others is in tests/engines, tests/imagenet and tests/checkpoint."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import SingleProcessCommunicator, SingleProcessEngine, discover_ranks, load_builder
from arsg_dist.fsdp import FSDPEngine, shard, units_of
from arsg_dist.fsdp.state import place_of
from arsg_dist.fsdp.units import recompute_activations, replicas_of_shards
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.recipe import read_arguments
from tests.engines.test_registry import settings
from tests.fsdp import features
from tests.fsdp.jobs.mesh_job import HIDDEN, OPTIMIZERS
from tests.imagenet.jobs.small_network import SmallResNet
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
@pytest.mark.parametrize("name", ["shards", "kept", "replicas", "offloaded", "gone on"])
def test_weights_and_their_average_are_those_of_one_process(name: str) -> None:
    """Catches a forward pass with the weights that an evaluation has left gathered, at θ or of the update before; an
    average of other weights or of another rank's part, lost in a checkpoint, or gathered once for ever; a shared weight
    that becomes two; a frozen or unused one that moves; a norm that counts each replica."""
    start = {key: tensor.detach().clone() for key, tensor in features.network().state_dict().items()}
    for actual, expected in zip(result(name), features.alone(), strict=True):
        assert actual.keys() == expected.keys()
        for key in [key for key in start if torch.equal(start[key], expected[key])]:
            assert torch.equal(actual[key], start[key]), key
        assert torch.equal(actual["blocks.3.first.weight"], actual["blocks.2.first.weight"])
        moved = [key for key in start if not torch.equal(start[key], expected[key])]
        assert len(moved) > len(start) // 2
        actual, expected, moved_from = (
            {key: made[key] for key in moved} for made in (actual, expected, start)
        )
        # The average of a bias has moved so little that a unit of its last place is 3e-5 of that.
        assert_same_weights(actual, expected, started_from=moved_from, relative=1e-4)


@pytest.mark.ranks
def test_the_average_is_as_large_as_the_shards() -> None:
    """Catches an average that every rank holds whole."""
    whole = sum(parameter.numel() for parameter in features.network().parameters())
    assert sum(result("shards: held")) == whole
    assert max(result("replicas: held")) < 0.75 * whole


@pytest.mark.ranks
def test_replicas_of_a_shard_are_compared() -> None:
    """Catches a comparison of different shards, and a bit flipped in one replica that goes unseen."""
    assert result("replicas agree") == ""
    assert result("replicas: differs").startswith(
        "ranks that must hold the same weights do not: the 2 ranks 1, 3 differ, and no majority tells which is right; "
    )
    assert "inlet.weight" in result("replicas: differs")


@pytest.mark.ranks
def test_micro_batches_send_nothing_that_is_not_needed() -> None:
    """Catches gradients that travel in every micro-batch, and parameters gathered anew where they are kept."""
    assert result("units") == ["blocks.0", "blocks.1"]
    groups = 3  # two blocks, and the rest
    assert result("sent, kept False") == {"allgather": 2 * 2 * groups, "reduce_scatter": groups}
    assert result("sent, kept True") == {"allgather": groups, "reduce_scatter": groups}


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


@pytest.mark.usefixtures("_alone")
def test_options_of_a_recipe_are_the_policies_that_they_name() -> None:
    """Catches an option that is dropped on its way, here or in the average beside the weights; and a network of another
    precision: the first update and the average follow those of one process that casts its weights by hand."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    module, beside, inputs = copy.deepcopy(plain), copy.deepcopy(plain), torch.randn(4, 5)
    options = {"param_dtype": "bf16", "cpu_offload": True, "reshard_after_forward": False}
    wanted = settings(precision="bf16", engine_options=options)
    engine: Any = load_builder("fsdp")(wanted, world_size=1).build(
        module, SingleProcessCommunicator(), discover_ranks({})
    )
    engine.hold(beside)
    before = engine.weights_of(beside)
    outputs = engine.module(inputs)
    assert outputs.dtype == beside(inputs).dtype == torch.bfloat16
    engine.backward(outputs.float().square().mean())
    engine.step()
    half = copy.deepcopy(plain).bfloat16()
    half(inputs.bfloat16()).float().square().mean().backward()
    for (name, tensor), parameter in zip(engine.whole_weights().items(), half.parameters(), strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, plain.state_dict()[name] - 0.1 * parameter.grad.float())  # type: ignore[union-attr]
        assert torch.equal(engine.weights_of(beside)[name], before[name])
    with pytest.raises(NotImplementedError, match="no two ranks hold the same"):
        next(iter(engine.replicated_tensors()))


@pytest.mark.usefixtures("_alone")
def test_blocks_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compiled network that is traced through the gathering of its parameters, or trains with others."""
    compiled, plain_compile = list[Any](), torch.compile

    def counted(function: Any, *positional: Any, **keywords: Any) -> Any:
        compiled.append(function)
        return plain_compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", counted)
    weights = []
    for compile_it in (False, True):
        module = features.network()
        builder = load_builder("fsdp")(settings(clip_grad_norm=0.5), world_size=1)
        if compile_it:
            builder.compile(module)
        engine: Any = builder.build(module, SingleProcessCommunicator(), discover_ranks({}))
        for update in range(2):
            engine.backward(engine.module(toy.batch(update)[0]).square().mean())
            engine.step()
        weights.append(engine.whole_weights())
    assert [function.__self__ for function in compiled] == [module.blocks[0], module.blocks[1]]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("_alone")
def test_ranks_begin_with_rank_0s_parameters_and_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches batch norm's statistics of other ranks that begin as each rank made them."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    sent = list[int]()
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: sent.append(tensor.data_ptr()))
    expected = [tensor.data_ptr() for tensor in module.state_dict().values()]
    shard(module)
    assert sent == expected


@pytest.mark.usefixtures("_alone")
def test_a_network_that_is_sharded_in_part_is_refused() -> None:
    """Catches a broadcast of DTensors, of which torch says that it has no sharding strategy."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    fully_shard(module[1])
    with pytest.raises(
        ValueError, match=r"'1\.weight' is a DTensor: the network, or a part of it, is sharded already"
    ):
        shard(module)


@pytest.mark.usefixtures("_alone")
def test_moments_keep_their_dtype_through_a_load(tmp_path: Path) -> None:
    """Catches moments in fp32 of parameters in bf16, rounded to these by a load."""
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        module = nn.Linear(5, 3).bfloat16()
        shard(module)
        engines.append(
            FSDPEngine(module, ARSG(module.parameters(), lr=0.1, eps=1e-3), SingleProcessCommunicator())
        )
    trained, loaded = engines
    store = CheckpointStore(tmp_path, trained.communicator)
    trained.backward(trained.module(torch.randn(4, 5).bfloat16()).square().mean())
    trained.step()
    loaded.load_state(SavedRun(save_run(store, 1, trained.state(), {}, trained.communicator)))
    saved = moments(trained)
    assert len(saved) == 4
    for key, piece in moments(loaded).items():
        assert piece.dtype == torch.float32
        assert torch.equal(piece, saved[key]), key
    inputs = torch.randn(4, 5).bfloat16()
    for engine in engines:
        engine.backward(engine.module(inputs).square().mean())
        engine.step()
    for name, tensor in trained.whole_weights().items():
        assert torch.equal(loaded.whole_weights()[name], tensor), name


def moments(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    return {
        f"{number} {entry}": value.to_local()
        for number, parameter in enumerate(engine.module.parameters())
        for entry, value in engine.optimizer.state[parameter].items()
        if entry.startswith("exp_avg")
    }


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
    assert train_command(["--engine", "fsdp", "--model", "regnet_y_400mf", "--print-plan"]) == 0
    lines = capsys.readouterr().out.splitlines()  # of a network that cannot be built without memory
    numbers = [int(line.split()[0].replace(",", "")) for line in lines[1:]]
    assert sum(numbers) == sum(x.numel() for x in build_model("regnet_y_400mf", 1000).parameters())


class Around(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers


def test_networks_that_cannot_be_computed_twice_are_refused() -> None:
    """Catches batch norm's statistics that count each batch twice, and an option without an effect."""
    with pytest.raises(
        ValueError, match=r"statistics of its bn1 \(batch norm\) would count every batch twice"
    ):
        recompute_activations(build_model("resnet18", 10))
    deep = [nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]
    within = nn.ModuleList(Around(layers) for layers in deep)
    with pytest.raises(ValueError, match=r"computes 1 twice .* statistics of its layers\.1 \(batch norm\)"):
        recompute_activations(within)
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
        # A stage is a row of blocks, whatever its class; a block of which there is one is no block.
        (
            build_model("convnext_tiny", 10),
            [f"features.{s}.{i}" for s, n in ((1, 3), (3, 3), (5, 9), (7, 3)) for i in range(n)],
        ),
        (
            build_model("timm:swin_tiny_patch4_window7_224", 10),
            [f"layers.{s}.blocks.{i}" for s, n in enumerate((2, 2, 6, 2)) for i in range(n)],
        ),
        (
            build_model("googlenet", 10),
            [
                *(f"inception{n}" for n in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")),
                "aux1",
                "aux2",
            ],
        ),
        (build_model("alexnet", 10), ["classifier.1", "classifier.4"]),
        (features.network(), ["blocks.0", "blocks.1"]),
        (SmallResNet(3), ["blocks.0"]),
    ],
    ids=[
        "resnet18",
        "vit_b_16",
        "resnet20",
        "two layers",
        "blocks in blocks",
        "convnext",
        "swin",
        "googlenet",
        "alexnet",
        "shared",
        "one block",
    ],
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
        ({"param_dtype": "int8"}, "must be one of fp32, bf16, not 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_builder("fsdp").check_options("fsdp", options)
    for changes, message in (
        ({"precision": "fp32", "engine_options": {"param_dtype": "bf16"}}, "contradicts precision: fp32"),
        ({"precision": "fp16", "engine_options": {"reduce_dtype": "bf16"}}, "contradicts precision: fp16"),
        ({"precision": "fp16", "engine_options": {"cpu_offload": True}}, "contradicts precision: fp16"),
        ({"engine_options": {"backend": "nccl"}}, "nccl was asked for, and the ranks came up over nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_builder("fsdp")(settings(**changes), world_size=2)
    half = settings(precision="bf16", engine_options={"param_dtype": "bf16"})
    with pytest.raises(ValueError, match="the batch norm bn1 with bfloat16 weights"):
        load_builder("fsdp")(half, world_size=2).check_network(build_model("resnet18", 10))
    with pytest.raises(ValueError, match="no blocks were found in Linear"):
        load_builder("fsdp")(settings(), world_size=2).check_network(nn.Linear(2, 2))
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"call arsg_dist\.fsdp\.shard"):
        FSDPEngine(module, ARSG(module.parameters()), SingleProcessCommunicator())
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="'scale' has no dimension"):
        shard(module)
    pytest.importorskip("horovod", reason="the rest of the test is about another engine")
    with pytest.raises(ValueError, match="engine horovod: it has none"):
        load_builder("horovod").check_options("horovod", {"reshard_after_forward": True})
