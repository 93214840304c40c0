"""`arsg-dist lr-find` on a linear network, whose Hessian is small enough to write out."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from arsg_dist import theory
from arsg_dist.checkpoint import CheckpointStore, save_run
from arsg_dist.cli import main as cli
from arsg_dist.engine import SingleProcessCommunicator, SingleProcessEngine
from arsg_dist.imagenet import curvature
from arsg_dist.imagenet.config import OptimizerConfig
from arsg_dist.imagenet.data import delivery
from arsg_dist.imagenet.training.optimization import build_optimizer
from arsg_dist.optim.advice import advise
from tests.imagenet.test_run_by_hand import BATCH, build_model, recipe


def dense_largest_eigenvalue(model: torch.nn.Module, loss_of_logits, batches) -> float:
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return sum(
            loss_of_logits(functional_call(model, values, inputs), targets) for inputs, targets in batches
        ) / len(batches)

    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return torch.linalg.eigvalsh(torch.func.hessian(loss)(flat).double())[-1].item()


def test_it_measures_the_recipes_loss_on_its_own_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a sum taken for a mean, raw images, and a checkpoint whose lr is judged or whose weights are not used."""
    monkeypatch.setattr(curvature, "build_model", build_model)
    seen = {}

    def spy(optimizer, loss, batches, *, iterations):
        seen.update(optimizer=optimizer, batches=batches)
        return advise(optimizer, loss, batches, iterations=iterations)

    monkeypatch.setattr(curvature, "advise", spy)
    config = recipe(
        accumulation_steps=1,
        optimizer=OptimizerConfig(
            params={"lr": 0.05, "mu": 0.2, "betas": [0.9, 0.99], "preconditioner": "none"}
        ),
    )
    trained = build_model()
    engine = SingleProcessEngine(trained, build_optimizer(config.optimizer, list(trained.parameters())))
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.optimizer.step()
    engine.optimizer.param_groups[0]["lr"] = 0.001  # as a schedule leaves it
    store = CheckpointStore(tmp_path, SingleProcessCommunicator())
    saved = save_run(store, 1, engine.state(), {}, engine.communicator)
    found = curvature.advise_recipe(config, batches=2, iterations=40, checkpoint=saved)
    assert len(seen["batches"]) == 2
    assert all(len(images) == BATCH for images, _ in seen["batches"])
    (group,) = seen["optimizer"].param_groups
    assert all(torch.equal(x, y) for x, y in zip(group["params"], trained.parameters(), strict=True))
    assert found.lr == 0.05
    model = build_model()
    model.load_state_dict(
        dict(
            zip(
                model.state_dict(),
                (p.detach() for group in seen["optimizer"].param_groups for p in group["params"]),
                strict=True,
            )
        )
    )
    expected = dense_largest_eigenvalue(
        model, lambda logits, targets: torch.nn.functional.cross_entropy(logits, targets), seen["batches"]
    )
    assert found.lambda_max == pytest.approx(expected, rel=1e-4)
    assert found.safe_lr == pytest.approx(theory.largest_safe_step(0.9, 0.2, expected), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batches", "0", "--"], "at least 1"),
        (["--checkpoint", "nowhere", "--", "--data.root", "null"], "there is no nowhere"),
        (["--", "--optimizer.type", "AdamW"], "ARSG and RemoteObservation"),
        (["--", "--accumulation_steps", "2"], "accumulation_steps"),
        (["--", "--nonsense", "2"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(arguments, says, monkeypatch, capsys) -> None:
    """Catches a traceback, or a minute of measuring before it is said."""
    monkeypatch.setattr(curvature, "build_model", build_model)
    with pytest.raises(SystemExit) as ended:
        cli.main(["lr-find", *arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("fate", "code", "says"),
    [
        ("no room", 2, r"error: /dev/shm has 0\.0 MiB free.*\(data\.workers=1, 4 images of 4 × 4 per rank\)"),
        ("images too small", 2, r"error: model vgg11 cannot train on 4 images of 4 × 4"),
        ("processes that die", 1, r"error: loader process 7 has ended"),
    ],
)
def test_what_keeps_it_from_its_batches_is_one_line(fate, code, says, monkeypatch, capsys) -> None:
    """Catches a traceback, or a wait for ever, where a training says what is wrong."""

    def dying(*_, **__):
        raise delivery.LoadingError("loader process 7 has ended: killed by SIGKILL")
        yield

    if fate == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    if fate == "processes that die":
        monkeypatch.setattr(curvature, "split_loader", dying)
    model = "vgg11" if fate == "images too small" else "resnet20"
    settings = {
        **{
            "data.source": "synthetic",
            "data.synthetic_images": 8,
            "data.synthetic_classes": 3,
            "model": model,
        },
        **{"data.image_size": 4, "data.workers": int(fate == "no room"), "batch_size": 4},
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as ended:
        cli.main(["lr-find", "--", *flags])
    captured = capsys.readouterr()
    assert re.search(says, captured.err), captured.err
    assert ended.value.code == code
    assert "Traceback" not in captured.err
