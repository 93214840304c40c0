"""The DeepSpeed configs that the repository ships are trained with, and what is said about configs is counted."""

from pathlib import Path
from typing import Any

import pytest

from arsg_dist.deepspeed import check_config
from arsg_dist.deepspeed.config.explain import Explanation, explain
from arsg_dist.deepspeed.config.footprint import UPDATE
from tests.deepspeed import counted_bytes
from tests.deepspeed import shipped_configs as problem
from tests.deepspeed.nvme import needs_nvme
from tests.support.results import results_of

RANKS = 2


def result(name: str) -> Any:
    return results_of("warm deepspeed", RANKS, "deepspeed/jobs/shipped_configs")[name]


def skipped_without_nvme(value: Any, on_nvme: bool) -> Any:
    return pytest.param(value, marks=[needs_nvme] * on_nvme)


SHIPPED = [skipped_without_nvme(path, problem.needs_nvme(path)) for path in problem.CONFIGS]


@pytest.mark.ranks
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_trains_as_one_process_does(path: Path) -> None:
    """Catches a config that does not start, trains nothing, trains otherwise than it says, or keeps on NVMe nothing."""
    config = problem.config_of(path, RANKS, Path("/tmp"))
    check_config(config)
    seen, expected = result(path.name), problem.losses_of_one_process(path, config)
    assert bool(seen["swap files"]) == problem.needs_nvme(path)
    fall = expected[0] - expected[-1]
    assert fall > 0.02 * expected[0], "the reference does not learn, so the comparison would show nothing"
    # Half precision rounds each weight and each gradient: 2^-8 of the loss, and of each step a share of its size.
    allowed = 0.1 * fall if "bf16" in config or "fp16" in config else 1e-3 * fall
    for loss, reference in zip(seen["losses"], expected, strict=True):
        assert abs(loss - reference) < allowed, (seen["losses"], expected)


def explanation_of(name: str) -> Explanation:
    parameters = [parameter.numel() for parameter in counted_bytes.build_model(name).parameters()]
    return explain(counted_bytes.cases()[name], parameters=parameters, world_size=RANKS)


every_case = pytest.mark.parametrize(
    "name", [skipped_without_nvme(name, "nvme" in name) for name in counted_bytes.cases()]
)
OTHER_TENSORS = 400  # bytes: the loss, norms, flags


def in_memory(explanation: Explanation) -> dict[str, int]:
    """Bytes by what they are, on the device and the CPU."""
    said: dict[str, int] = {}
    for entry in explanation.memory:
        if entry.where != "nvme":
            said[entry.what] = said.get(entry.what, 0) + entry.bytes
    return said


@pytest.mark.ranks
@every_case
def test_bytes_said_are_bytes_held(name: str) -> None:
    """Catches a formula that forgets a copy, the padding, v̂ or a dtype."""
    said = in_memory(explanation_of(name))
    for counted in result("bytes")[name]:
        for what in ("parameters", "small parameters", "fp32 masters", "m", "v", "v̂"):
            assert said.get(what, 0) == counted[what], what


@pytest.mark.ranks
@every_case
def test_what_offload_adds_is_said_to_the_byte(name: str) -> None:
    """Catches a buffer on the way between CPU and device that is left out, counted twice, or of another dtype."""
    explanation = explanation_of(name)
    on_cpu: dict[str, int] = {}
    for entry in explanation.memory:
        if entry.where == "cpu":
            on_cpu[entry.what] = on_cpu.get(entry.what, 0) + entry.bytes
    for counted in result("bytes")[name]:
        for what in ("weights, updated", "swap buffers"):
            assert on_cpu.get(what, 0) == counted[what], what
        assert in_memory(explanation).get("a gradient on its way", 0) == counted["a gradient on its way"]
        if (
            "nvme" not in name
        ):  # of a sub-group that is swapped, gradients in memory are no tensor of the wrapper's
            assert on_cpu.get("gradients, fp32", 0) == counted["gradients in fp32 on the CPU"]
    accumulated = max(rank["accumulated on the CPU"] for rank in result("bytes")[name])
    assert on_cpu.get("gradients", 0) == accumulated


@pytest.mark.ranks
@every_case
def test_nothing_else_is_held(name: str) -> None:
    """Catches a kind of memory that no formula has, and one of a formula's that is not there: all tensors that live
    between a backward pass and the end of its update are counted."""
    explanation = explanation_of(name)
    by_kind = in_memory(explanation)
    buckets = by_kind.pop("gradient buckets", 0)
    said = sum(by_kind.values())
    # Copies that are sent live as long as the backend holds them.
    passing = by_kind["gradients on their way"]
    passing += sum(entry.bytes for entry in explanation.memory if entry.note == UPDATE)
    alive, in_buckets = (
        max(rank[kind] for rank in result("bytes")[name])
        for kind in ("alive without buckets", "gradient buckets")
    )
    assert alive <= said + OTHER_TENSORS
    assert in_buckets in (0, buckets)
    # Stage 1 releases the gradients of the whole model while it makes this rank's part, before they can be counted.
    if not (explanation.stage == 1 and "in fp32" in name):
        assert said - passing <= alive + OTHER_TENSORS


@pytest.mark.ranks
@every_case
def test_messages_said_are_messages_sent(name: str) -> None:
    """Catches an operation that is another one, comes more often, or in another dtype."""
    explanation = explanation_of(name)
    for counted in result("bytes")[name]:
        sent = counted["sent"]
        # DeepSpeed logs what one rank puts in: of an all_gather its part only.
        found = {
            "all_reduce": sent.pop("all_reduce", 0),
            "reduce_scatter": sent.pop("reduce_scatter_tensor", 0),
            "all_gather": RANKS * sent.pop("all_gather_into_tensor", 0),
        }
        assert sum(sent.values()) == 0, f"other messages: {sent}"
        assert {operation for operation, size in found.items() if size} == {
            message.operation for message in explanation.communication
        }
        for message in explanation.communication:
            if explanation.stage == 3 and message.operation == "all_gather":
                # Small parameters are gathered once per update only, in messages that are not counted.
                assert (
                    0.97 * message.times * message.bytes
                    < found["all_gather"]
                    <= message.most_times * message.bytes
                )
            else:
                assert found[message.operation] == message.times * message.bytes


def test_what_a_rank_sends_is_as_in_zeros_paper() -> None:
    """Catches a factor of 2: arXiv 1910.02054, section 7, with Ψ parameters on many ranks."""
    ranks, parameters = 1000, [1000 * 1000]

    def sent(stage: int, **zero: Any) -> float:
        config = {"zero_optimization": {"stage": stage, **zero}}
        explanation = explain(config, parameters=parameters, world_size=ranks)
        return sum(message.sent for message in explanation.communication) / (4 * parameters[0])

    assert sent(0) == pytest.approx(2, rel=0.01)
    assert sent(1, use_multi_rank_bucket_allreduce=False) == pytest.approx(2, rel=0.01)
    assert sent(2, use_multi_rank_bucket_allreduce=False) == pytest.approx(2, rel=0.01)
    assert sent(2) == pytest.approx(3, rel=0.01)
    explanation = explain({"zero_optimization": {"stage": 3}}, parameters=parameters, world_size=ranks)
    most = sum(message.sent * message.most_times / message.times for message in explanation.communication)
    assert most / (4 * parameters[0]) == pytest.approx(3, rel=0.01)


def _arsg(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "ARSG", "params": params}, "gradient_clipping": 0.0}


@pytest.mark.parametrize(
    ("settings", "moments"),
    [
        ({}, {"m": 400, "v": 400, "v̂": 400}),
        ({"preconditioner": "adam"}, {"m": 400, "v": 400}),
        ({"preconditioner": "none"}, {"m": 400}),
        ({"state_dtype": "bfloat16"}, {"m": 200, "v": 200, "v̂": 200}),
        (
            {"lookahead_k": 5, "betas": [0.9, 0.99]},
            {"m": 400, "v": 400, "v̂": 400, "slow weights (lookahead)": 400},
        ),
    ],
)
def test_state_follows_the_settings(settings: dict[str, Any], moments: dict[str, int]) -> None:
    """Catches state that a setting saves or adds."""
    explanation = explain(_arsg(**settings), parameters=[100], world_size=1)
    said = {entry.what: entry.bytes for entry in explanation.memory}
    assert {what: size for what, size in said.items() if what in moments} == moments
    assert set(said) == {*moments, "parameters", "gradients"}
    assert explanation.communication == ()


def _memory(zero: dict[str, Any], parameters: list[int], **config: Any) -> dict[tuple[str, str], int]:
    """What and where → bytes, on one of two ranks."""
    said = explain(
        _arsg() | {"zero_optimization": zero, **config}, parameters=parameters, world_size=2
    ).memory
    found = {(entry.what, entry.where): entry.bytes for entry in said}
    assert len(found) == len(said)
    return found


def test_offload_moves_masters_and_moments() -> None:
    """Catches offloaded state that is still counted on the device."""
    for zero, device in (
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "cpu"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "cpu"),
        ({"stage": 3, "cpu_offload": True}, "cpu"),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 5}},
            "nvme",
        ),
    ):
        where = _memory(zero, [10**6, 10**6])
        assert {(what, device) for what in ("fp32 masters", "m", "v", "v̂")} <= where.keys()
        assert ("parameters", "device") in where


def test_on_nvme_small_sub_groups_stay_in_memory_and_buffers_take_some() -> None:
    """Catches buffers forgotten or counted per tensor, sub-groups cut elsewhere than DeepSpeed does, and its limit of
    1 MiB, or `aio.block_size`, left out."""
    nvme = {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 7}
    zero = {"stage": 3, "sub_group_size": 300_000, "offload_optimizer": nvme}
    # On each of two ranks: 200,000 + 100,001 elements in one sub-group, 400,000 in the next, 5 in the last.
    parameters = [400_000, 200_002, 800_000, 10]
    said = _memory(zero, parameters)
    assert said["m", "nvme"] == 4 * 700_001
    assert said["m", "cpu"] == 4 * 5
    assert said["swap buffers", "cpu"] == 7 * 4 * 400_128  # a multiple of 1024 bytes
    assert (
        said["gradients, fp32", "nvme"] == 4 * 400_000
    )  # of the tensors that are large enough by themselves
    assert said["gradients, fp32", "cpu"] == 4 * 300_006
    wider = _memory(zero, parameters, aio={"block_size": 1_400_000, "intra_op_parallelism": 4})
    assert wider["m", "cpu"] == 4 * 300_006
    assert wider["swap buffers", "cpu"] == 7 * 4 * 400_384


def test_parameters_on_nvme_keep_a_part_and_buffers_in_memory() -> None:
    """Catches parameters all counted on NVMe, where DeepSpeed keeps the first `max_in_cpu` of a rank in memory."""
    offload = {
        "device": "nvme",
        "nvme_path": "/nvme",
        "max_in_cpu": 1000,
        "buffer_count": 3,
        "buffer_size": 700,
    }
    said = _memory({"stage": 3, "offload_param": offload}, [4000, 2000], bf16={"enabled": True})
    assert said["parameters", "cpu"] == 2 * 1000
    assert said["parameters", "nvme"] == 2 * 2000
    assert said["parameter buffers", "cpu"] == 3 * 2 * 1024


def test_remote_observation_keeps_a_movement_beside_what_its_inner_optimizer_keeps() -> None:
    """Catches memory that is counted as ARSG's, or without the movement."""
    movement = "d (average movement)"
    adamw = {"inner": "AdamW", "lr": "auto", "betas": [0.0, 0.9]}, ["exp_avg", "exp_avg_sq", movement]
    sgd = {"inner": "SGD", "lr": "auto"}, [movement]
    for params, kept in (adamw, sgd):
        section = {"type": "RemoteObservation", "params": {**params, "remote_mu": 0.2, "remote_beta1": 0.9}}
        config = _arsg() | {"optimizer": section, "zero_optimization": {"stage": 1}}
        said = {entry.what: entry.bytes for entry in explain(config, parameters=[100], world_size=2).memory}
        assert {name: said[name] for name in kept} == dict.fromkeys(kept, 4 * 50)
        assert not {"m", "v", "v̂"} & said.keys()


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 4}, 6),
        ({"train_batch_size": 48}, 1),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 5}, 5),
        ({"gradient_accumulation_steps": 5}, 5),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": 3}, 3),
        (
            {
                "train_batch_size": 48,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": "auto",
            },
            6,
        ),
        ({}, 1),
    ],
)
def test_micro_batches_follow_from_the_batch_sizes(sizes: dict[str, Any], steps: int) -> None:
    """Catches an accumulation that only its own key tells of: DeepSpeed works out the one that is left out of three."""
    config = _arsg() | {"zero_optimization": {"stage": 2}, **sizes}
    gradients, _ = explain(config, parameters=[100], world_size=2).communication
    assert gradients.times == steps


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"optimizer": {"type": "ARSG"}}, "clips the gradient at norm 1.0"),
        (_arsg(betas="auto"), "Trainer then writes Adam's"),
        (_arsg(betas=[0.9, 0.999]), "betas are Adam's"),
        ({"optimizer": {"type": "AdamW"}}, "the optimizer is AdamW, not ARSG"),
        ({}, "no optimizer section"),
        (
            _arsg() | {"scheduler": {"type": "ObservationBoost", "params": {"milestones": [4]}}},
            "schedule: ObservationBoost",
        ),
        (_arsg() | {"train_batch_size": "auto"}, "fill in: train_batch_size"),
        (_arsg() | {"zero_optimization": {"stage": 1}}, "larger than the model"),
        (_arsg() | {"zero_optimization": {"stage": 1}}, "at least these"),
        (_arsg() | {"bf16": {"enabled": "auto"}}, "fill in: bf16.enabled"),
        (_arsg() | {"bf16": {"enabled": "auto"}}, "left to the program, and counted as fp32"),
        (
            _arsg()
            | {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"pin_memory": "auto"}},
                "scheduler": {"type": "StepLR", "params": {"step_size": "auto"}},
            },
            "fill in: scheduler.params.step_size, zero_optimization.offload_optimizer.pin_memory",
        ),
    ],
)
def test_what_is_easily_overlooked_is_noted(config: dict[str, Any], said: str) -> None:
    """Catches a setting that silently does something else."""
    explanation = explain(config, parameters=[100], world_size=2)
    assert explanation.refused is None
    assert any(said in note for note in explanation.notes), explanation.notes


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"optimizer": {"type": "arsg"}}, "write 'ARSG'"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization: stage"),
        ({"zero_optimization": {"stagee": 1}}, "stagee"),
        (_arsg(state_dtype="int8"), "int8"),
        (_arsg() | {"scheduler": {"type": "Cosine"}}, "'Cosine' is not known"),
        (
            {"train_batch_size": 25, "train_micro_batch_size_per_gpu": 4},
            "the batch sizes do not fit a world size of 2",
        ),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 0}, "do not fit a world size of 2"),
        (
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            "8 != 4 * 2 * 2",
        ),
        (
            {"zero_optimization": {"stage": 1, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "Cannot provide deprecated parameter",
        ),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "DeepSpeed knows fp32, bf16 and fp16"),
    ],
)
def test_what_is_refused_is_said(config: dict[str, Any], reason: str) -> None:
    """Catches an explanation of a config that will not start."""
    assert reason in str(explain(config, parameters=[100], world_size=2).refused)


def test_impossible_sizes_are_refused() -> None:
    """Catches figures for a model of nothing."""
    for parameters, world_size in (([], 1), ([0], 1), ([1], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            explain({}, parameters=parameters, world_size=world_size)
