"""Offload that does not fit in the matrix: what is refused, and optimizers that the program builds itself."""

from typing import Any

import pytest
import torch

from arsg_dist.deepspeed import check_config
from tests.deepspeed.nvme import needs_nvme
from tests.deepspeed.results import results_of


def _config(offload: dict[str, Any], stage: int = 3, **params: Any) -> dict[str, Any]:
    return {
        "optimizer": {"type": "ARSG", "params": params},
        "zero_optimization": {"stage": stage, "offload_optimizer": offload},
    }


def _nvme(buffers: int | None = None, *, read: bool = False, write: bool = False) -> dict[str, Any]:
    count = {} if buffers is None else {"buffer_count": buffers}
    return {"device": "nvme", "nvme_path": "/nvme", "pipeline_read": read, "pipeline_write": write, **count}


PIPELINED = {"read": True, "write": True}


@pytest.mark.parametrize(
    ("needed", "pipeline", "params"),
    [
        (5, {}, {}),
        (4, {}, {"preconditioner": "adam"}),
        (3, {}, {"preconditioner": "none"}),
        (6, {}, {"lookahead_k": 5}),
        (10, {"read": True}, {}),
        (10, {"write": True}, {}),
        (15, PIPELINED, {}),
        (12, PIPELINED, {"preconditioner": "adam"}),
    ],
)
def test_too_few_buffers_for_nvme_are_refused_with_the_number(
    needed: int, pipeline: dict[str, bool], params: dict[str, Any]
) -> None:
    """Catches a bare assertion of DeepSpeed in the first or second update, on the ranks that get there."""
    check_config(_config(_nvme(needed, **pipeline), **params))
    with pytest.raises(ValueError, match=f"buffer_count of at least {needed} for NVMe"):
        check_config(_config(_nvme(needed - 1, **pipeline), **params))


def test_deepspeeds_default_is_too_few_buffers() -> None:
    """Catches a default taken for enough."""
    with pytest.raises(ValueError, match=r"at least 5 for NVMe \(DeepSpeed's default is 4\)"):
        check_config(_config(_nvme()))
    check_config(_config(_nvme(), preconditioner="adam"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config(_nvme(9), stage=1), "'nvme'.*stages 1 and 2 DeepSpeed keeps the state in CPU memory"),
        (_config(_nvme(9), stage=2), "'nvme'.*stages 1 and 2 DeepSpeed keeps the state in CPU memory"),
        (_config({"device": "cpu"}, stage=0), "at stage 0 DeepSpeed offloads nothing"),
        (_config(_nvme(9), state_dtype="bfloat16"), "'bfloat16'.*buffers are fp32"),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, "at stage 0 DeepSpeed offloads nothing"),
        ({"zero_optimization": {"cpu_offload": True}}, "at stage 0 DeepSpeed offloads nothing"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "below stage 3"),
        ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, "below stage 3"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype.*at stage 0"),
        ({"data_types": {"grad_accum_dtype": "torch.float32"}, "bf16": {"enabled": True}}, "at stage 0"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "state_dtype"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}, "zero_optimization": {"stage": 1}},
            "never falls",
        ),
    ],
)
def test_what_would_be_ignored_or_go_wrong_is_refused(config: dict[str, Any], message: str) -> None:
    """Catches settings that DeepSpeed takes without a word and does not follow, or under which nothing trains."""
    with pytest.raises(ValueError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3, "offload_optimizer": _nvme()}},
        _config({"device": "cpu", "pin_memory": False}, stage=1, state_dtype="bfloat16"),
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 0, "cpu_offload": False, "cpu_offload_param": "auto"}},
        {"zero_optimization": {"stage": 1, "cpu_offload": True}},
        {"data_types": {"grad_accum_dtype": "float"}},
        {"data_types": {"grad_accum_dtype": "bfloat16"}, "bf16": {"enabled": True}},
        {"data_types": {"grad_accum_dtype": "bf16"}, "bf16": {"enabled": "auto"}},
        {
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
        },
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 3}},
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}, "zero_optimization": {"stage": 3}},
    ],
)
def test_what_works_is_not_refused(config: dict[str, Any]) -> None:
    """Catches a check that minds more than it should."""
    check_config(config)


def outcomes() -> list[dict[str, Any]]:
    """Of both ranks."""
    found: list[dict[str, Any]] = results_of("warm deepspeed", 2, "offload")["ranks"]
    return found


@pytest.mark.ranks
def test_an_arsg_of_the_programs_own_is_offloaded() -> None:
    """Catches DeepSpeed's refusal of optimizers not its own, a refusal the user asked for that is overruled, other
    optimizers let through, and groups that are not checked where no JSON section shows them."""
    first, second = outcomes()
    for stage in (1, 3):
        expected = first[f"{stage} json"]
        for way in ("object", "callable"):
            weights = first[f"{stage} {way}"]
            assert not isinstance(weights, str), weights
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for name, message in [
        ("forced", "ZeRORuntimeException: You are using ZeRO-Offload with a client provided optimizer"),
        ("adam", "ZeRORuntimeException: You are using ZeRO-Offload with a client provided optimizer"),
        ("nvme with lookahead", "buffer_count of at least 6"),
        ("nvme with bfloat16", "state_dtype 'bfloat16'"),
    ]:
        assert first[name] == second[name]
        assert message in first[name]


@needs_nvme
@pytest.mark.ranks
@pytest.mark.parametrize("call", ["save_checkpoint", "load_checkpoint", "export", "base_iterate", "state"])
def test_what_cannot_reach_state_on_nvme_says_so_on_every_rank(call: str) -> None:
    """Catches a checkpoint without the optimizer's state, and a guard that asks for a name the engine has not."""
    first, second = (rank["on nvme"][call] for rank in outcomes())
    assert first == second
    assert str(first).startswith("ValueError: ")
    assert "NVMe" in first
    assert "offload to the CPU" in first
