"""`compile: true`: the network is the same one, on every engine, through training, validation, checkpoints and resume.

In fp32 a compiled run drifts away from the other within some updates: the compiler rounds elsewhere, and v̂ ≈ g² in the
first updates makes much of the sign of small gradients. Weights that start off by a last bit drift as far. So the
compiled code is compared in fp64, and what surrounds it with a backend that does not change a bit.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from arsg_dist.engine import SingleProcessCommunicator, discover_ranks
from arsg_dist.imagenet.config import OptimizerConfig, TrainConfig
from arsg_dist.imagenet.training.engines import build_engine, prepare
from tests.imagenet.jobs.small_network import SmallResNet
from tests.imagenet.test_training import epochs_of
from tests.support import engines
from tests.support.compare import assert_same_weights
from tests.support.launchers import launch

ENGINES = {
    "single": engines.ENGINES["single"],
    "zero2": engines.STAGES["deepspeed-2"],
    "horovod-sharded": engines.ENGINES["horovod-sharded"],
}
JOB = "tests/imagenet/jobs/imagenet_job.py"
SMALL = {"ARSG_TEST_SMALL_NETWORK": "1"}


def trained(*, compile_network: bool) -> tuple[nn.Module, Tensor]:
    """A network after ten updates in fp64, and its logits in validation."""
    torch.manual_seed(0)
    config = TrainConfig(
        compile=compile_network,
        channels_last=True,
        optimizer=OptimizerConfig(params={"lr": 0.002, "mu": 0.05, "weight_decay": 1e-3}),
    )
    engine = build_engine(
        prepare("single", config, None, 1),
        SmallResNet(10).double(),
        config,
        SingleProcessCommunicator(),
        discover_ranks(),
    )
    generator = torch.Generator().manual_seed(1)
    for size in [16] * 8 + [20] * 2:
        images = torch.randn(12, 3, size, size, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (12,), generator=generator)
        logits = engine.module(images.to(memory_format=torch.channels_last))
        engine.backward(functional.cross_entropy(logits, labels))
        engine.step()
    engine.module.eval()
    with torch.no_grad():
        return engine.module, engine.module(images)


@pytest.mark.turn(0)
def test_the_compiled_network_is_the_network() -> None:
    """Catches batch norm's momentum, its mode in validation, a size that is taken for another, or a gradient that
    compilation changes."""
    torch._dynamo.reset()
    compiled, compiled_logits = trained(compile_network=True)
    plain, plain_logits = trained(compile_network=False)
    torch.manual_seed(0)
    start = SmallResNet(10).double()
    assert_same_weights(
        {name: tensor.detach() for name, tensor in compiled.named_parameters()},
        {name: tensor.detach() for name, tensor in plain.named_parameters()},
        started_from={name: tensor.detach() for name, tensor in start.named_parameters()},
        relative=1e-9,
    )
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(compiled.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(compiled_logits, plain_logits, rtol=1e-9, atol=1e-9)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=pytest.mark.turn(turn)) for turn, engine in enumerate(ENGINES)]
)
def test_a_compiled_run_is_the_run(engine: str, recipe: list[str], tmp_path: Path) -> None:
    """Catches keys with _orig_mod, a graph of the training mode used in validation, and hooks of an engine that
    compilation loses; the compiled run is interrupted in its second epoch and resumed."""
    started = ENGINES[engine]
    settings = [*recipe, *started.options, "--checkpoint_every", "6"]
    exact = {**SMALL, "ARSG_TEST_COMPILE_BACKEND": "aot_eager"}
    for more in (["--max_updates", "7"], ["--resume"]):
        job = launch(started.warm, started.ranks, JOB, *settings, "--compile", "true", *more, variables=exact)
        assert job.code == 0, job.output[-5000:]
    plainly = [*settings, "--output", tmp_path / "plain"]
    job = launch(started.warm, started.ranks, JOB, *plainly, variables=SMALL)
    assert job.code == 0, job.output[-5000:]
    compiled, plain = (load_file(tmp_path / name / "weights/last.safetensors") for name in ("run", "plain"))
    assert compiled.keys() == plain.keys() == SmallResNet(3).state_dict().keys()
    for name, weight in plain.items():
        assert torch.equal(compiled[name], weight), name
    for key in ("train_loss", "val_loss"):
        assert [r[key] for r in epochs_of(tmp_path / "run")] == [
            r[key] for r in epochs_of(tmp_path / "plain")
        ]


@pytest.mark.turn(1)
@pytest.mark.ranks
def test_ranks_compile(recipe: list[str], tmp_path: Path) -> None:
    """Catches ranks that are in each other's way in the compiler's cache, and losses that have nothing in common."""
    started = ENGINES["horovod-sharded"]
    cache = {**SMALL, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    settings = [*recipe, *started.options, "--epochs", "1"]
    for output, value in (("run", "true"), ("plain", "false")):
        arguments = [*settings, "--compile", value, "--output", str(tmp_path / output)]
        job = launch(started.warm, started.ranks, JOB, *arguments, timeout=500, variables=cache)
        assert job.code == 0, job.output[-5000:]
    (here,), (there,) = epochs_of(tmp_path / "run"), epochs_of(tmp_path / "plain")
    assert here["train_loss"] == pytest.approx(there["train_loss"], rel=0.01)
