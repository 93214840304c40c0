"""Every training feature at once on two ranks, against one process that accumulates two micro-batches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.models import build_model
from tests.imagenet.test_run_by_hand import records_of
from tests.imagenet.test_training import SCRIPT, epochs_of
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.engines import ENGINES, ON_RANKS, STAGES, Started
from tests.support.launchers import launch

FEATURES = [
    *("--data.mixup", "0.4", "--data.cutmix", "1.0", "--label_smoothing", "0.1", "--clip_grad_norm", "1.0"),
    *("--optimizer.decay_norm_and_bias", "false", "--zero_init_gamma", "true", "--channels_last", "true"),
    *("--optimizer.params", "{lr: 0.002, mu: 0.05, weight_decay: 0.01}", "--boost.milestones", "[1]"),
    *("--data.progressive", "{start_size: 10, end_epoch: 1, multiple: 2}"),
    # 120 images: the last of the five updates has 8 of 28. And the weights compared are θ.
    *("--batch_size", "28", "--evaluate_at", "theta"),
]
STARTED = {
    **{name: ENGINES[name] for name in ON_RANKS},
    "deepspeed-3": STAGES["deepspeed-3"],
    "ddp-sharded": Started("torchrun", 2, ("--engine", "ddp", "--engine_options.shard_update", "true")),
}
WITH = {
    "ddp": ["--engine_options.find_unused_parameters", "true"],
    "fsdp": ["--engine_options", "{reshard_after_forward: false}"],
}
AVERAGED = [name for name in STARTED if name != "deepspeed-3"]  # which refuses a moving average
TURNS = {"ddp": 0, "deepspeed-3": 1, "horovod": 2, "ddp-sharded": 2}
# Equal micro-batches round equally; the scale falls from 65536 by skipped updates.
FP16 = ["--precision", "fp16"]


def parameters(path: Path) -> dict[str, torch.Tensor]:
    """Without batch norm's statistics, which ranks collect from their own images."""
    names = [name for name, _ in build_model("resnet20", 3).named_parameters()]
    weights = load_file(path)
    return {name: weights[name] for name in names}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "extra"),
    [
        *(
            pytest.param(engine, [], marks=pytest.mark.turn(TURNS[engine]) if engine in TURNS else [])
            for engine in STARTED
        ),
        pytest.param("horovod", FP16, marks=pytest.mark.turn(0)),
        pytest.param("ddp", FP16, marks=pytest.mark.turn(2)),
        pytest.param("ddp-sharded", FP16, marks=pytest.mark.turn(0)),
        pytest.param("fsdp", FP16, marks=pytest.mark.turn(1)),
    ],
)
def test_two_ranks_train_as_one_process_does(
    engine: str, extra: list[str], recipe: list[str], tmp_path: Path
) -> None:
    """Catches a feature lost on the way into an engine: parameter groups, μ after the boost, EMA, mixing, clipping, θ;
    and a last batch that is not full with another weight than on one process."""
    started, averaged = STARTED[engine], ["--ema_decay", "0.9"] if engine in AVERAGED else []
    options = [*started.options, *WITH.get(engine, []), *averaged]
    job = launch(started.warm, 2, SCRIPT, *recipe, *FEATURES, *extra, *options)
    assert job.code == 0, job.output[-5000:]
    alone = [*recipe, *FEATURES, *extra, "--accumulation_steps", "2", "--ema_decay", "0.9"]
    assert train_command([*alone, "--output", str(tmp_path / "alone")]) == 0
    torch.manual_seed(0)
    start = {
        name: parameter.detach()
        for name, parameter in build_model("resnet20", 3, zero_init_gamma=True).named_parameters()
    }
    for name in ("last", "ema") if averaged else ("last",):
        assert_same_weights(
            parameters(tmp_path / "run" / "weights" / f"{name}.safetensors"),
            parameters(tmp_path / "alone" / "weights" / f"{name}.safetensors"),
            started_from=start,
            # A last bit of fp32 decides how fp16 rounds. And batch-norm weights near 1 move by 6e-6 only, of which one
            # unit of fp32 is 2 %.
            relative=0.05 if extra else REDUCTION_ORDER,
        )
    here, there = epochs_of(tmp_path / "run"), epochs_of(tmp_path / "alone")
    for key in ("lr", "mu", "image_size", "val_images"):
        assert [record[key] for record in here] == [record[key] for record in there]
    assert [record["mu"] for record in here] == [0.05, 0.1]
    assert [record["train_loss"] for record in here] == pytest.approx(
        [r["train_loss"] for r in there], rel=1e-4
    )


# Side and batch size. Inception v3's further classifier takes no smaller images. With fewer values for a batch norm
# their signs alone are left of them, and a rounding decides.
AUXILIARY = {"googlenet": (64, 8), "inception_v3": (299, 4)}
EVERY_TURN = {name: number % 3 for number, name in enumerate(STARTED)}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "model"),
    [
        pytest.param(engine, model, marks=pytest.mark.turn(turn))
        for model in AUXILIARY
        for engine, turn in EVERY_TURN.items()
    ],
)
def test_further_classifiers_train_on_ranks_as_on_one(
    engine: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Catches an engine that takes a network's named tuple apart, leaves a further classifier without gradients, or
    gives it another share in the loss than one process does: the second and third losses follow from all weights."""
    if model == "inception_v3" and not request.config.getoption("--full"):
        pytest.skip("of a large network on large images; --full has it")
    size, batch_size = AUXILIARY[model]
    settings = {
        **{"data.source": "synthetic", "data.synthetic_images": 32, "data.synthetic_classes": 3},
        **{"data.image_size": size, "data.workers": 0, "model": model, "batch_size": batch_size},
        **{"epochs": 1, "max_updates": 3, "log_every": 1, "optimizer.params": "{lr: 0.001, mu: 0.1}"},
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    job_file = "tests/imagenet/jobs/auxiliary_job.py"
    started = STARTED[engine]
    job = launch(started.warm, 2, job_file, *flags, *started.options, "--output", tmp_path / "run")
    assert job.code == 0, job.output[-5000:]
    alone = launch(
        "warm alone", 1, job_file, *flags, "--accumulation_steps", "2", "--output", tmp_path / "alone"
    )
    assert alone.code == 0, alone.output[-5000:]
    here, there = ([record["loss"] for record in records_of(tmp_path / name)] for name in ("run", "alone"))
    assert len(there) == 3
    assert abs(there[2] - there[0]) > 0.01 * there[0]
    assert here == pytest.approx(there, rel=1e-4)
