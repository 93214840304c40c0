"""Every way in which DeepSpeed's users reach ARSG: JSON, `initialize`, callables, a shim for finished scripts."""

import functools
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

import arsg_dist.deepspeed
from arsg_dist import ARSG
from arsg_dist.deepspeed.run import main
from tests.deepspeed.jobs import interfaces as job
from tests.deepspeed.jobs.common import weights_of
from tests.deepspeed.unmodified import problem
from tests.support import toy
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.launchers import REPOSITORY, launch
from tests.support.results import results_of


def result(name: str) -> Any:
    return results_of("warm deepspeed", 3, "deepspeed/jobs/interfaces")[name]


@functools.cache
def single_process() -> dict[str, Any]:
    """The oracle: what one process has after all updates, and, in a second run, around a doubling in the middle."""
    seen: dict[str, Any] = {}
    for doubling in (False, True):
        model = job.build_model()
        named = dict(model.named_parameters())
        optimizer = ARSG(job.groups_of(named), **toy.HYPERPARAMETERS, foreach=False, fused=False)
        for update in range(toy.UPDATES):
            optimizer.zero_grad()
            inputs, targets = toy.batch(update)
            # Under ZeRO a weight that was set reaches the model with the next update.
            model_is_behind = doubling and update == job.SET_AFTER + 1
            if model_is_behind:
                _multiply(named.values(), 0.5)
            toy.loss_of(model(inputs), targets).backward()
            if model_is_behind:
                _multiply(named.values(), 2)
                _multiply([p.grad for p in named.values()], 2)
            if update == job.SET_AFTER:
                seen["gradients"] = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
            optimizer.step()
            if update == job.SET_AFTER and doubling:
                seen["state"] = _state(named, optimizer)
                _multiply([*named.values(), *_moments(optimizer)], 2)
                seen["state, doubled"] = _state(named, optimizer)
        seen["weights, doubled" if doubling else "weights"] = _state(named, optimizer)
    return seen


@torch.no_grad()
def _multiply(tensors: Iterable[Tensor | None], factor: float) -> None:
    for tensor in tensors:
        assert tensor is not None
        tensor.mul_(factor)


def _moments(optimizer: ARSG) -> list[Tensor]:
    return [state[key] for state in optimizer.state.values() for key in job.MOMENTS]


def _state(named: dict[str, Any], optimizer: ARSG) -> dict[str, dict[str, Tensor]]:
    return {
        "weights": {name: p.detach().clone() for name, p in named.items()},
        **{key: {name: optimizer.state[p][key].clone() for name, p in named.items()} for key in job.MOMENTS},
    }


def assert_same_state(actual: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for key, tensors in expected.items():
        zero = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        # Squared gradients have twice the relative error.
        assert_same_weights(actual[key], tensors, started_from=zero, relative=2 * REDUCTION_ORDER)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("way", "stage"), [(way, stage) for way, stages in job.WAYS.items() for stage in stages]
)
def test_every_way_trains_the_groups_as_one_process_does(way: str, stage: int) -> None:
    """Catches a way that loses the config's settings, or those of a user's own parameter groups."""
    assert_same_weights(
        result(f"{way}, zero{stage}"),
        single_process()["weights"]["weights"],
        started_from=weights_of(job.build_model()),
    )


@pytest.mark.ranks
def test_weights_within_reach_are_whole() -> None:
    """Catches a read of weights that DeepSpeed before 0.19.8 is still gathering."""
    assert result("gathered") == [True] * 3


@pytest.mark.ranks
def test_torch_stays_as_it_is() -> None:
    """Catches a registration that reaches beyond DeepSpeed."""
    assert not hasattr(torch.optim, "ARSG")
    assert result("torch has ARSG") is False


def test_the_helper_has_deepspeeds_signature() -> None:
    """Catches an argument of deepspeed.initialize that is missing, renamed or in another place."""
    ours, theirs = (
        inspect.signature(function).parameters
        for function in (arsg_dist.deepspeed.initialize, deepspeed.initialize)
    )
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no config", "exactly one DeepSpeed config"),
        ("two configs", "exactly one DeepSpeed config"),
        ("no optimizer", "has optimizer None"),
        ("another optimizer", "for other optimizers use deepspeed.initialize"),
        ("two optimizers", "remove one"),
        ("auto", '"auto" for lr, which nothing has filled in'),
        ("auto, plain", '"auto" for eps'),
        ("auto type, plain", 'optimizer.type = "auto", which nothing has filled in'),
        ("zenflow, by a callable", "ZenFlow"),
    ],
)
def test_bad_input_is_refused_on_every_rank(case: str, message: str) -> None:
    """Catches a setting that is silently left out, and ranks that wait for one that raised."""
    text = result("refusals")[case]
    assert text is not None
    assert text.startswith("ValueError: ")
    assert message in text


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "name"),
    [("Adam", "Adam"), ("class Adam", "Adam"), ("maker of Adam", "Adam"), ("no optimizer at all", "int")],
)
def test_the_helper_takes_no_other_optimizer(case: str, name: str) -> None:
    """Catches another optimizer let through, and offloaded to the CPU without DeepSpeed's objection."""
    text = str(result("refusals")[case])
    assert text.startswith("TypeError: ")
    assert f"not {name}: for other optimizers use deepspeed.initialize" in text


everywhere = pytest.mark.parametrize("name", list(job.STATES))


@pytest.mark.ranks
@everywhere
def test_deepspeeds_functions_reach_state_of_every_group(name: str) -> None:
    """Catches state of the second group out of reach, v̂ missing, a gradient or master of a wrong size, and elements of
    another parameter."""
    seen = result(f"state, {name}")
    assert_same_state({"gradients": seen["gradients"]}, {"gradients": single_process()["gradients"]})
    assert_same_state(seen["state"], single_process()["state"])


@pytest.mark.ranks
@everywhere
def test_what_deepspeeds_functions_set_is_trained_on(name: str) -> None:
    """Catches a value that only some ranks take (a parameter that does not divide by the ranks), or only the getter."""
    seen = result(f"state, {name}")
    assert_same_state(seen["state, doubled"], single_process()["state, doubled"])
    assert_same_state(seen["state at the end"], single_process()["weights, doubled"])
    for key in job.MOMENTS:
        for parameter, doubled in seen["state, doubled"][key].items():
            assert torch.equal(doubled, 2 * seen["state"][key][parameter])


@pytest.mark.ranks
@everywhere
def test_state_is_within_reach_after_a_checkpoint_was_loaded(name: str) -> None:
    """Catches links to the state of before."""
    seen = result(f"state, {name}")
    for key, tensors in seen["state at the end"].items():
        for parameter, tensor in tensors.items():
            assert torch.equal(tensor, seen["state, reloaded"][key][parameter]), (key, parameter)


@pytest.mark.ranks
@everywhere
def test_state_that_does_not_exist_is_said_on_every_rank(name: str) -> None:
    """Catches the ranks without a part of the parameter waiting for those that raised, a refusal that does not say what
    there is, and one that comes after something was written."""
    seen = result(f"state, {name}")
    none = "ValueError: there is no optimizer state {!r} of this parameter: {}"
    early, unknown = (
        none.format("exp_avg", "state appears with the first update"),
        none.format("momentum", f"there is {list(job.MOMENTS)}"),
    )
    assert seen["before the first update"] == early
    assert seen["unknown"] == seen["unknown, set"] == unknown
    for key, tensors in seen["state at the end"].items():
        for parameter, tensor in tensors.items():
            assert torch.equal(tensor, seen["state after refusals"][key][parameter]), (key, parameter)


# ---- Finished scripts ----------------------------------------------------------------------------


def _config(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    config = {
        "train_batch_size": problem.SAMPLES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**6,
    }
    path.write_text(json.dumps(config))
    return path


def _weights_of_one_process() -> dict[str, Tensor]:
    model, data = problem.build_model(), problem.Samples()
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    for _ in range(problem.UPDATES):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(data.inputs), data.targets).backward()
        optimizer.step()
    return weights_of(model)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("launcher", "form"),
    [
        ("warm deepspeed", "script"),
        pytest.param("deepspeed --module", "script", marks=pytest.mark.turn(0)),
        pytest.param("deepspeed --module", "module", marks=pytest.mark.turn(2)),
    ],
)
def test_an_unmodified_script_trains_arsg(launcher: str, form: str, tmp_path: Path) -> None:
    """Catches a launcher under which the script is not __main__, misses its arguments or the files beside it."""
    script = REPOSITORY / "tests/deepspeed/unmodified/train.py"
    named = [script] if form == "script" else ["-m", "tests.deepspeed.unmodified.as_module"]
    output = tmp_path / "result.pt"
    arguments = ["--output", output, "--deepspeed_config", _config(tmp_path)]
    if launcher.startswith("warm"):
        given = ["--local_rank={rank}", *named, *arguments]  # as the real one gives it
        finished = launch(launcher, 2, "arsg_dist/deepspeed/run.py", *given)
    else:
        finished = launch(launcher, 2, "arsg_dist.deepspeed.run", *named, *arguments)
    assert finished.code == 0, finished.output[-5000:]
    seen = torch.load(output, weights_only=True)
    start = weights_of(problem.build_model())
    assert_same_weights(seen["weights"], _weights_of_one_process(), started_from=start)
    if form == "script":
        assert seen["argv"] == [str(script), "--local_rank=0", *map(str, arguments)]
        assert seen["file"] == str(script)
        assert seen["path"] == str(script.parent)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arsg_dist.deepspeed.run", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local_rank=0", "nowhere.py"], "nowhere.py does not exist"),
        (["-m", "nowhere.train"], "there is no module nowhere.train"),
        (["--local_rank=1"], "usage: "),
    ],
)
def test_a_script_that_does_not_exist_is_said_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of runpy."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_exit_code_and_main_are_the_scripts_own(tmp_path: Path) -> None:
    """Catches a failed script that ends as if it had worked, and objects of __main__ that cannot be pickled."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, sys\n"
        "class Thing: pass\n"
        "assert __name__ == '__main__' and type(pickle.loads(pickle.dumps(Thing()))) is Thing\n"
        "sys.exit(7)\n"
    )
    finished = run(str(script))
    assert finished.returncode == 7, finished.stderr
