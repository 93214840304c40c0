"""torch.compile, CUDA graphs, DTensor parameters."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import arsg_dist
from arsg_dist import ARSG
from tests.optim.optim_paths import FOREACH_CAPTURABLE, MODES, Path, assert_close, gradients, parameters, run

SHAPES = [(5,), (2, 3)]


def counted_backend():
    """An eager backend that counts how many graphs it was given."""
    graphs = []

    def backend(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    return backend, graphs


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "foreach", "settings"),
    [
        ("amsgrad", False, {}),
        ("amsgrad", True, {"state_dtype": "bfloat16"}),
        ("adam", False, {"state_dtype": "bfloat16"}),
        ("adam", True, {}),
        ("none", False, {"lookahead_k": 2}),
    ],
    ids=str,
)
def test_a_traced_step_equals_the_eager_one_and_is_not_retraced(mode: str, foreach: bool, settings) -> None:
    """Catches a graph that bakes in lr or the step count, one compilation per step, and graph breaks."""
    backend, graphs = counted_backend()
    own = {"preconditioner": mode, "betas": (0.9, 0.9), "foreach": foreach, "capturable": True, **settings}
    params, others = parameters(SHAPES), parameters(SHAPES)
    compiled = ARSG(params, lr=torch.tensor(0.1), **own)
    eager = ARSG(others, lr=torch.tensor(0.1), **own)
    step = torch.compile(compiled.step, backend=backend, fullgraph=True)
    after = []
    for t, grads in enumerate(gradients(SHAPES, 6)):
        for optimizer, xs in ((compiled, params), (eager, others)):
            for x, grad in zip(xs, grads, strict=True):
                x.grad = grad.clone()
            optimizer.param_groups[0]["lr"].fill_(0.1 / (t + 1))
        step()
        eager.step()
        after.append(len(graphs))
        for x, y in zip(params, others, strict=True):
            assert_close(x.detach(), y.detach(), 1e-6)
    assert graphs
    assert after[2] == after[-1], f"graphs after each step: {after}"


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_capturable_step_never_reads_a_value(mode: str, foreach: bool) -> None:
    """Catches `.item()` and branches on tensors: fake tensors have no values to synchronise for."""

    def step(capturable: bool) -> None:
        with FakeTensorMode():
            params = [torch.nn.Parameter(torch.empty(shape)) for shape in SHAPES]
            settings = {"lookahead_k": 2, "betas": (0.9, 0.9), "state_dtype": "bfloat16"}
            optimizer = ARSG(params, preconditioner=mode, foreach=foreach, capturable=capturable, **settings)
            # After construction, which validates them by their values.
            optimizer.param_groups[0].update(lr=torch.empty(()), mu=torch.empty(()))
            for x in params:
                x.grad = torch.empty_like(x)
            optimizer.step()
            with optimizer.base_iterate():
                pass

    step(capturable=True)
    with pytest.raises(DataDependentOutputException):
        step(capturable=False)  # the test notices a read


@pytest.mark.turn(2)
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_equals_the_eager_one(mode: str) -> None:
    """Catches code that the compiler's own kernels evaluate differently."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    settings = {"preconditioner": mode, "weight_decay": 0.1, "capturable": True}
    compiled = ARSG(params, lr=torch.tensor(0.1), **settings)
    eager = ARSG(others, lr=0.1, **settings)
    step = torch.compile(compiled.step)
    for grads in gradients(SHAPES, 4):
        for xs in (params, others):
            for x, grad in zip(xs, grads, strict=True):
                x.grad = grad.clone()
        step()
        eager.step()
    for x, y in zip(params, others, strict=True):
        assert_close(x.detach(), y.detach(), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.name)
        for p in (FOREACH_CAPTURABLE, Path("loop", {"foreach": False, "capturable": True}))
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_step_replays_with_new_gradients_and_lr(path: Path, mode: str) -> None:
    """Catches host synchronisation in step(), and lr, μ or the step count frozen into the graph."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = {"preconditioner": mode, "lookahead_k": 3, "betas": (0.9, 0.9), **path.settings}
    params = [torch.nn.Parameter(x.detach().cuda()) for x in parameters(SHAPES)]
    others = parameters(SHAPES)
    captured = ARSG(
        params, lr=torch.tensor(0.1, device="cuda"), mu=torch.tensor(0.1, device="cuda"), **settings
    )
    eager = ARSG(others, lr=0.1, mu=0.1, **{**settings, "capturable": False})
    steps = gradients(SHAPES, 8)
    for x in params:
        x.grad = torch.zeros_like(x)

    def hand_over(grads) -> None:
        for x, grad in zip(params, grads, strict=True):
            x.grad.copy_(grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for grads in steps[:2]:
            hand_over(grads)
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    captured.param_groups[0]["lr"].fill_(0.05)
    captured.param_groups[0]["mu"].fill_(0.3)
    for grads in steps[2:]:
        hand_over(grads)
        graph.replay()
    run(eager, others, steps[:2])
    eager.param_groups[0].update(lr=0.05, mu=0.3)
    run(eager, others, steps[2:])
    for x, y in zip(params, others, strict=True):
        assert_close(x.detach().cpu(), y.detach(), 1e-6)
    with captured.base_iterate(), eager.base_iterate():
        for x, y in zip(params, others, strict=True):
            assert_close(x.detach().cpu(), y.detach(), 1e-6)


def test_a_graph_without_capturable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a captured update that repeats the numbers of its first step for ever."""
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = ARSG([{"params": [x], "capturable": True}, {"params": [torch.nn.Parameter(torch.ones(1))]}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    optimizer.param_groups[1]["capturable"] = True
    optimizer.step()


def test_nothing_private_of_torchs_optimizer_is_used() -> None:
    """Catches what another torch has by another name, or not at all: then every step would fail there."""
    private = {
        name for name in dir(torch.optim.Optimizer) if name.startswith("_") and not name.startswith("__")
    }
    sources = list(pathlib.Path(arsg_dist.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    for source in sources:
        used = private & set(re.findall(r"\.(_[a-z]\w*)", source.read_text()))
        assert not used, f"{source}: {used}"
