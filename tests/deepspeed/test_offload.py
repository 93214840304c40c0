"""Offload that does not fit in the matrix: optimizers that the program builds itself, and state on NVMe."""

from typing import Any

import pytest
import torch

from tests.deepspeed.nvme import needs_nvme
from tests.support.results import results_of


def outcomes() -> list[dict[str, Any]]:
    """Of both ranks."""
    found: list[dict[str, Any]] = results_of("warm deepspeed", 2, "deepspeed/jobs/offload")["ranks"]
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
