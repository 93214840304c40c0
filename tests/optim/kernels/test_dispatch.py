"""Which implementation of the update a group gets."""

from pathlib import Path

import pytest
import torch

from arsg_dist import ARSG
from arsg_dist.optim.hyperparameters import Hyperparameters
from arsg_dist.optim.kernels import dispatch, foreach, fused
from arsg_dist.optim.kernels.foreach import foreach_step
from arsg_dist.optim.kernels.fused import fused_step
from arsg_dist.optim.kernels.reference import reference_step
from tests.optim import optim_paths
from tests.optim.optim_paths import FUSED, gradients, parameters, params_of, run

ONE = [(3,)]


class OtherTensor(torch.Tensor):
    """A kind of tensor the kernel knows nothing of."""


def chosen(params=None, tensors=None, **settings):
    """The step function of a group with these settings."""
    params = params or parameters(ONE)
    (group,) = ARSG(params, **settings).param_groups
    return dispatch.step_function(group, Hyperparameters.of_group(group), tensors or params)


def test_default_path_on_cpu_is_the_fused_kernel(monkeypatch) -> None:
    """Catches the slow loop by default, under ZeRO for one: there a user rarely sets a path.

    Also catches the kernel for what it was not asked for, or for tensors of another kind.
    """
    assert chosen() is fused_step
    assert chosen(foreach=True) is foreach_step
    assert chosen(fused=True) is fused_step
    assert chosen(fused=False) is chosen(foreach=False) is reference_step
    assert chosen(tensors=[torch.empty(0).as_subclass(OtherTensor)]) is reference_step
    monkeypatch.setattr(dispatch, "cpu_kernel", lambda: None)
    assert chosen() is reference_step


def test_default_path_on_accelerators_is_foreach_unless_a_tensor_must_be_read(monkeypatch) -> None:
    """Catches the slow path as the default where launches cost, and a tensor lr that foreach cannot take."""
    monkeypatch.setattr(dispatch, "_default_to_fused_or_foreach", lambda *_, **__: (False, True))
    meta = [torch.nn.Parameter(torch.ones(2, device="meta"))]
    assert chosen(meta) is foreach_step
    assert chosen(meta, lr=torch.tensor(0.1)) is chosen(meta, mu=torch.tensor(0.1)) is reference_step
    assert chosen(meta, lr=torch.tensor(0.1), capturable=True) is foreach_step
    assert chosen(meta, foreach=False) is chosen(meta, fused=False) is reference_step


def test_where_the_cpu_kernel_is_not_built_the_gpu_s_is_tested_all_the_same(monkeypatch) -> None:
    """Catches all tests of the fused path left out on a GPU machine without a C++ compiler."""
    monkeypatch.setattr(optim_paths.cpu_library, "PATH", Path("nowhere"))
    assert [len(params_of(FUSED, device=device)[0].marks) for device in ("cpu", "cuda")] == [1, 0]


@pytest.mark.gpu
def test_default_path_on_cuda_is_the_kernel() -> None:
    """Catches foreach or the loop as the default where the kernel can run, and a value read on the host."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.nn.Parameter(torch.ones(2, device="cuda"))
    assert chosen([x]) is fused_step
    assert chosen([x], lr=torch.tensor(0.1)) is reference_step


@pytest.mark.parametrize("path", params_of(FUSED))
def test_a_mode_that_a_fast_path_does_not_know_goes_to_one_that_does(path, monkeypatch) -> None:
    """Catches an update without the mode that was asked for, and groups without it that are made slow."""
    fast = [(path.settings, fused_step), ({"foreach": True}, foreach_step)]
    assert [chosen(**wanted, maximize=True) for wanted, _ in fast] == [step for _, step in fast]
    monkeypatch.setattr(fused, "_CPU_MODES", ())
    assert [chosen(**wanted, maximize=True) for wanted, _ in fast] == [foreach_step, foreach_step]
    monkeypatch.setattr(foreach, "_MODES", ())
    assert [chosen(**wanted, maximize=True) for wanted, _ in fast] == [reference_step, reference_step]
    assert [chosen(**wanted) for wanted, _ in fast] == [step for _, step in fast]
    ends = []
    for settings in (path.settings, {"foreach": False}):
        params = parameters(ONE)
        run(ARSG(params, maximize=True, **settings), params, gradients(ONE, 3))
        ends.append(params[0].detach())
    assert torch.equal(*ends)


def test_a_preconditioner_that_a_fast_path_does_not_know_goes_to_one_that_does(monkeypatch) -> None:
    """Catches a new preconditioner that fast paths take for "none", the last of their branches."""
    wanted = {"preconditioner": "none", "fused": True}
    monkeypatch.setattr(fused, "_CPU_PRECONDITIONERS", ("amsgrad", "adam"))
    assert chosen(**wanted) is foreach_step
    monkeypatch.setattr(foreach, "_PRECONDITIONERS", ("amsgrad", "adam"))
    assert chosen(**wanted) is reference_step
