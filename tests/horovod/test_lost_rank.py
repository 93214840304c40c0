"""A rank that dies, as the others see it without a launcher that ends them."""

from types import SimpleNamespace

import pytest
import torch

from arsg_dist.horovod.comm.tensors_in_flight import _HeldTensors
from tests.support.launchers import launch


@pytest.mark.ranks
@pytest.mark.parametrize("tensors", ["whole", "views"])
def test_asking_for_operations_while_another_rank_dies_raises(tensors: str) -> None:
    """Catches a rank that hangs for good, where Horovod's background thread ends while tensors are in flight."""
    job = launch("warm horovodrun", 2, "tests/horovod/jobs/lost_rank_job.py", tensors)
    assert "raised: Horovod has been shut down" in job.output, job.output[-5000:]


def test_every_tensor_of_an_operation_is_held_until_its_end() -> None:
    """Catches a tensor in flight that the background thread alone holds; whether a rank then hangs is chance."""
    handles, ended = iter((3, 4, 5)), list[int]()

    def wait(handle: int) -> None:
        ended.append(handle)
        if handle == 4:
            raise RuntimeError("Horovod has been shut down")

    held = _HeldTensors(
        SimpleNamespace(
            grouped_allreduce_async=lambda *_: next(handles),
            horovod_torch_wait_and_clear=wait,
            horovod_torch_reset=lambda: ended.append(-1),
        )
    )
    tensors = [torch.zeros(2), torch.ones(3)[1:], torch.ones(1)]
    for given in ((tensors[:2], tensors[2], "name"), (tensors[2],)):
        held.grouped_allreduce_async(*given)
    with torch.inference_mode():
        other = torch.ones(1)
        held.grouped_allreduce_async(torch.ones(1), other)
    saved = {handle: holder.grad_fn.saved_tensors for handle, holder in held.holders.items()}  # type: ignore[union-attr]
    assert [[*map(id, saved[handle])] for handle in (3, 4, 5)] == [[*map(id, tensors)], [id(tensors[2])], []]
    held.horovod_torch_wait_and_clear(3)
    with pytest.raises(RuntimeError):
        held.horovod_torch_wait_and_clear(4)
    assert [*held.holders] == [4, 5], "the background thread may still be at its end"
    held.horovod_torch_reset()
    assert held.holders == {}
    assert ended == [3, 4, -1]
