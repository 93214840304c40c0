"""The one comparison of weights for all engines."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Sums over ranks are rounded in another order than a sum over the whole batch. The preconditioner divides by the
# root of squared gradients, so the relative error of an update can be some hundred roundings.
REDUCTION_ORDER = 2e-5


def assert_same_weights(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    started_from: Mapping[str, Tensor],
    relative: float = REDUCTION_ORDER,
) -> None:
    """Compares the weights after a training with those another way of training gave.

    The measure is the difference relative to how far training moved the tensor: comparing with the size of the
    weights would let an optimizer pass that hardly moves them.

    Args:
        actual: name → tensor.
        expected: name → tensor, from the trusted way.
        started_from: name → tensor, weights before training.
        relative: largest allowed difference, as a share of the largest movement in the tensor; 0 for bitwise.
    """
    assert set(actual) == set(expected) == set(started_from)
    failures = []
    for name, reference in expected.items():
        weight, start = actual[name], started_from[name]
        assert weight.shape == reference.shape, (
            f"{name}: shape {tuple(weight.shape)} != {tuple(reference.shape)}"
        )
        assert weight.dtype == reference.dtype, f"{name}: {weight.dtype} != {reference.dtype}"
        assert torch.isfinite(reference).all(), f"{name}: the reference is not finite"
        movement = (reference - start).abs().max().item()
        assert movement > 0, f"{name}: the reference did not move, so the comparison would show nothing"
        difference = (weight - reference).abs().max().item()
        if not difference <= relative * movement:  # "not <=" also catches NaN
            failures.append(
                f"{name}: differs by {difference:.3g}, {difference / movement:.2%} of its movement"
            )
    assert not failures, "weights differ:\n" + "\n".join(failures)


def skip_without_sharding_on_cpu() -> None:
    """Skips a test of FSDP2 where torch's does not work on CPU, as 2.6's."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        import pytest  # not in ranks, which compare weights

        pytest.skip(f"fully_shard of torch {torch.__version__} does not work on CPU")
