"""The DeepSpeed configs that the repository ships are trained with, and what is said about configs is counted."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from arsg_dist.deepspeed import check_config
from arsg_dist.deepspeed.explain import Explanation, explain
from tests.support import deepspeed_bytes
from tests.support import deepspeed_configs as problem
from tests.support.launchers import Finished, launch

RANKS = 2
NEEDS_ASYNC_IO = [path.name for path in problem.CONFIGS if '"nvme"' in path.read_text()]


@functools.cache
def finished_job() -> tuple[Finished, dict[str, Any]]:
    """All configs and all counts in one job."""
    left_out = [] if _async_io() else NEEDS_ASYNC_IO
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory)
        finished = launch(
            "deepspeed",
            RANKS,
            "tests/support/deepspeed_configs_job.py",
            output,
            ",".join(left_out) or "nothing",
            timeout=550,
        )
        results = output / "results.pt"
        return finished, torch.load(results, weights_only=True) if results.exists() else {}


@functools.cache
def _async_io() -> bool:
    return bool(AsyncIOBuilder().is_compatible())


def result(name: str) -> Any:
    finished, results = finished_job()
    assert finished.code == 0, finished.output[-5000:]
    return results[name]


@pytest.mark.ranks
@pytest.mark.parametrize("path", problem.CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_trains_as_one_process_does(path: Path) -> None:
    """Catches a config that does not start, trains nothing, or trains otherwise than it says."""
    if path.name in NEEDS_ASYNC_IO and not _async_io():
        pytest.skip("DeepSpeed's async_io operator cannot be built here (libaio's headers are missing)")
    config = problem.config_of(path, RANKS, Path("/tmp"))
    check_config(config)
    losses, expected = result(path.name), problem.losses_of_one_process(config)
    fall = expected[0] - expected[-1]
    assert fall > 0.02 * expected[0], "the reference does not learn, so the comparison would show nothing"
    # Half precision rounds each weight and each gradient: 2^-8 of the loss, and of each step a share of its size.
    allowed = 0.1 * fall if "bf16" in config or "fp16" in config else 1e-3 * fall
    for loss, reference in zip(losses, expected, strict=True):
        assert abs(loss - reference) < allowed, (losses, expected)


def explanation_of(name: str) -> Explanation:
    parameters = [parameter.numel() for parameter in deepspeed_bytes.build_model().parameters()]
    return explain(deepspeed_bytes.cases()[name], parameters=parameters, world_size=RANKS)


every_case = pytest.mark.parametrize("name", list(deepspeed_bytes.cases()))


@pytest.mark.ranks
@every_case
def test_bytes_said_are_bytes_held(name: str) -> None:
    """Catches a formula that forgets a copy, the padding, v̂ or a dtype."""
    said = {entry.what: entry.bytes for entry in explanation_of(name).memory}
    for counted in result("bytes")[name]:
        for what in ("parameters", "small parameters", "fp32 masters", "m", "v", "v̂"):
            assert said.get(what, 0) == counted[what], what


@pytest.mark.ranks
@every_case
def test_gradients_are_not_more_than_said(name: str) -> None:
    """Catches a gradient that is kept whole, or in fp32, where a part was promised."""
    explanation = explanation_of(name)
    said = sum(entry.bytes for entry in explanation.memory if entry.what.startswith("gradients"))
    counted = max(rank["gradients"] for rank in result("bytes")[name])
    assert 0 < counted <= said
    if explanation.stage == 2 or explanation.stage == 3:
        assert said <= 1.01 * counted


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


def test_offload_moves_masters_and_moments() -> None:
    """Catches offloaded state that is still counted on the device."""
    for stage, device in ((2, "cpu"), (3, "cpu"), (3, "nvme")):
        offload = {"device": device, "nvme_path": "/local_nvme", "buffer_count": 5}
        zero = {"stage": stage, "offload_optimizer": offload}
        explanation = explain(_arsg() | {"zero_optimization": zero}, parameters=[100], world_size=2)
        where = {entry.what: entry.where for entry in explanation.memory}
        assert {where[what] for what in ("fp32 masters", "m", "v", "v̂")} == {device}
        assert where["parameters"] == "device"


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
