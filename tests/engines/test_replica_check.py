"""The comparison of what every rank must hold alike."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arsg_dist.engine import JobError, SingleProcessCommunicator, check_replicas
from arsg_dist.engine.consistency import fingerprint, fingerprints


class _Ranks(SingleProcessCommunicator):
    """Rank 0; the others hold what is given."""

    def __init__(self, *others: dict[str, Tensor]) -> None:
        self.world_size = 1 + len(others)
        self._others = others

    def all_gather_object(self, value):  # type: ignore[no-untyped-def]
        return [value, *(fingerprints(other.values()) for other in self._others)]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool],
)
def test_every_bit_and_place_counts(dtype: torch.dtype) -> None:
    """Catches a fingerprint that forgets bits of a dtype, later chunks or the order of elements."""
    tensor = torch.arange(200_000).to(dtype)
    first = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == first
    assert fingerprint(tensor.view(1000, 200).t().contiguous().t()) == first
    for place in (0, 65_535, 65_536, 199_999):
        changed = tensor.clone()
        changed.view(torch.uint8)[place * dtype.itemsize] ^= 1
        assert fingerprint(changed) != first, place
    assert dtype == torch.bool or fingerprint(tensor.flip(0)) != first
    assert fingerprint(tensor[:0]) == 0


def test_the_rank_in_the_minority_is_named() -> None:
    """Catches a message that blames rank 0's peers for what rank 0 has."""
    good = {"w": torch.ones(3), "b": torch.zeros(2)}
    bad = {"w": torch.ones(3), "b": torch.tensor([0.0, 1e-30])}
    check_replicas(_Ranks(good, good), iter(good.items()))
    with pytest.raises(
        JobError, match=r"rank 2 differs from the 2 others, which agree; in 1 of 2 tensors: b\."
    ):
        check_replicas(_Ranks(good, bad), iter(good.items()))
    with pytest.raises(JobError, match=r"rank 0 differs from the 2 others"):
        check_replicas(_Ranks(good, good), iter(bad.items()))
    with pytest.raises(JobError, match="the 2 ranks differ, and no majority"):
        check_replicas(_Ranks(bad), iter(good.items()))


def test_chunks_that_have_changed_places_are_seen() -> None:
    """Catches a sum of the chunks' numbers, in which their order is lost."""
    tensor = torch.arange(3 * 65_536)
    first, second, third = tensor.split(65_536)
    assert fingerprint(torch.cat([second, first, third])) != fingerprint(tensor)
    assert fingerprint(torch.cat([first, third, second])) != fingerprint(tensor)


def test_half_of_the_ranks_is_no_majority_and_every_tensor_is_named() -> None:
    """Catches two of four ranks taken for most, and tensors that only the second of the odd ranks has wrong."""
    good = {"w": torch.ones(3), "b": torch.zeros(2), "c": torch.zeros(1)}
    one, other = {**good, "w": torch.zeros(3)}, {**good, "c": torch.ones(1)}
    with pytest.raises(
        JobError, match="the 4 ranks differ, and no majority tells which is right; in 1 of 3 ten"
    ):
        check_replicas(_Ranks(good, one, one), iter(good.items()))
    with pytest.raises(
        JobError, match=r"rank 1, 3 differs from the 3 others, which agree; in 2 of 3.*: w, c\."
    ):
        check_replicas(_Ranks(one, good, other, good), iter(good.items()))


def test_a_gpu_is_not_asked_for_thousands_of_small_sums() -> None:
    """Catches chunks as small as a cache on a device where each is a few launches; "meta" stands for it."""
    operations = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(func)
            return func(*args, **(kwargs or {}))

    tensor = torch.empty(2**25 + 1, device="meta")
    with Count():
        fingerprint(tensor)
    assert len(operations) < 40
