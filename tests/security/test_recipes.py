"""Recipes and flags of strangers are plain data, or refused: nothing they name is imported, started or written.

The input is the same in every run. To hunt with new input, 4,000 examples a test:

    pytest tests/security --hypothesis-profile hunt --timeout 0
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arsg_dist.imagenet import cli
from arsg_dist.imagenet.config import OptimizerConfig, TrainConfig
from arsg_dist.imagenet.recipe import read_arguments, resolved
from arsg_dist.imagenet.training.optimization import build_optimizer
from arsg_dist.safe_io.documents import parse_yaml
from tests.security.watch import nothing_happens
from tests.support.launchers import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
NAMED = "hostile_module.Thing"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module that must not be imported, on the path; it is the current directory too."""
    (tmp_path / "hostile_module.py").write_text("class Thing:\n    def __init__(self, **options): pass\n")
    (tmp_path / "other.yaml").write_text("epochs: 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    resolved(["--epochs", "3"])  # imports what the first call imports
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of the command, which does nothing else, in whichever way it is called."""
    with nothing_happens(), pytest.raises(ValueError):
        read_arguments(arguments)
    with nothing_happens():
        assert cli.train_command([*arguments, "--print-config"]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert "hostile_module" not in sys.modules
    return line


HOSTILE = {
    "a parameter": f"optimizer: {{params: {{lr: 0.1, x: {{class_path: {NAMED}, init_args: {{a: 1}}}}}}}}",
    "a parameter in a list": f"optimizer: {{params: {{betas: [{{class_path: {NAMED}}}]}}}}",
    "a parameter in text": f"optimizer: {{params: '{{x: {{class_path: {NAMED}}}}}'}}",
    "the parameters": f"optimizer: {{params: {{class_path: {{class_path: {NAMED}}}}}}}",
    "a section": f"data: {{class_path: {NAMED}}}",
    "a section with arguments": f"optimizer: {{class_path: {NAMED}, init_args: {{type: SGD}}}}",
    "a section by name": f"data: {NAMED}",
    "an inner section": f"data: {{progressive: {{class_path: {NAMED}}}}}",
    "a dotted key": f"optimizer.params.x.class_path: {NAMED}",
    "a dotted section": f"data.class_path: {NAMED}",
    "text": f"model: {{class_path: {NAMED}}}",
    "a number": f"epochs: {{class_path: {NAMED}}}",
    "a choice": f"precision: {{class_path: {NAMED}}}",
    "a list": f"schedule: {{name: step, milestones: {{class_path: {NAMED}}}}}",
    "the recipe": f"class_path: {NAMED}\ninit_args: {{}}",
    "an object": f"model: !!python/object/apply:{NAMED} []",
    "a name": f"model: !!python/name:{NAMED}",
    "a module": "model: !!python/module:hostile_module",
    "an own tag": "model: !include other.yaml",
    "a tag of YAML": "model: !!binary aGVsbG8=",
    "another recipe": "config: other.yaml",
    "a file for a section": "data: other.yaml",
    "a file of others": "data: /etc/passwd",
    "a path of the parser": "__path__: other.yaml",
    "the engine": "engine: horovod",
    "a resume": "output: run\nresume: true",
    "control characters": 'model: "\\e]0;owned\\a"',
    "control characters in a key": '"\\e[2J": 1',
    "control characters in a parameter": 'optimizer: {params: {x: ["\\e[2J"]}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_recipe_names_no_class_module_or_file(
    case: str, hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a value that is resolved, imported, instantiated or read from elsewhere, also by --print-config."""
    (hostile / "r.yaml").write_text(HOSTILE[case])
    message = refused(["--config", "r.yaml"], capsys)
    assert "r.yaml" in message or "optimizer.params" in message
    refused(["--config", "other.yaml", "--config", "r.yaml", "--epochs", "2"], capsys)
    refused(["--config", "r.yaml", "--config", "other.yaml"], capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer.params.x.class_path", NAMED],
        ["--optimizer.params.x.class_path=" + NAMED, "--optimizer.params.x.init_args.a", "1"],
        ["--optimizer.params.x", f"{{class_path: {NAMED}}}"],
        ["--optimizer.params", f"{{x: {{class_path: {NAMED}}}}}"],
        ["--optimizer", json.dumps({"class_path": NAMED, "init_args": {}})],
        ["--optimizer", NAMED],
        ["--optimizer.class_path", NAMED],
        ["--data", f"{{progressive: {{class_path: {NAMED}}}}}"],
        ["--data.progressive", NAMED],
        ["--data.class_path", NAMED],
        ["--model.class_path", NAMED],
        ["--class_path", NAMED],
        ["--config", f"{{model: {{class_path: {NAMED}}}}}"],
        ["--config", "https://example.org/r.yaml"],
        ["--config", "file:///etc/passwd"],
        ["--schedule.milestones+", f"{{class_path: {NAMED}}}"],
        ["--print_completion", "bash"],
    ],
    ids=" ".join,
)
def test_flags_name_no_class_or_module(
    flags: list[str], hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the same by a flag, where a command line is pasted from elsewhere."""
    refused(flags, capsys)


def test_variables_and_references_mean_nothing(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches settings that the environment sneaks in, and text that is replaced by a secret."""
    for name in ("JSONARGPARSE_DEFAULT_ENV", "JSONARGPARSE_DEBUG"):
        monkeypatch.setenv(name, "true")
    for prefix in ("", "ARSG_IMAGENET_TRAIN_", "TRAIN_"):
        monkeypatch.setenv(f"{prefix}EPOCHS", "7")
    references = ["${oc.env:HOME}", "$HOME", "${epochs}", "{{HOME}}", "~"]
    for text in references:
        (hostile / "r.yaml").write_text(yaml.safe_dump({"data": {"root": text}}))
        with nothing_happens():
            found = read_arguments(["--config", "r.yaml"])
        assert (found.data.root, found.epochs) == (text, 90)


@pytest.mark.parametrize("kind", [NAMED, "lr_scheduler", "__class__", "Optimizer", "os.system", "sys"])
def test_the_optimizers_name_is_looked_up_among_optimizers_only(kind: str, hostile: Path) -> None:
    """Catches a type that is imported, or any attribute of torch.optim that can be called."""
    with nothing_happens(), pytest.raises(ValueError, match=r"optimizer\.type .* is not known"):
        build_optimizer(OptimizerConfig(type=kind), [torch.nn.Parameter(torch.zeros(1))])


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


BOUNDS = {
    "aliases": (bomb(9), "more than 100,000 values"),
    "aliases in text": (
        f"schedule: {{milestones: {json.dumps('[' + '&a [' * 60 + ']' * 60 + ', *a' * 9 + ']')}}}",
        "",
    ),
    "itself": ("optimizer: &a {params: *a}", "nested deeper"),
    "depth": ("optimizer: {params: {x: " + "[\n" * 5000 + "]" * 5000 + "}}", "nested deeper"),
    "depth in text": ("epochs: '" + "[" * 70 + "]" * 70 + "'", "nested deeper"),
    "size": ("# " + "x" * 2**16, "more than the 65536 bytes"),
    "the same key": ("epochs: 3\nepochs: 4", "the key 'epochs' is there twice"),
    "base sixty": ("epochs: !!int '" + "1:" * 1000 + "1'", "no plain value"),
    "a huge number": ("seed: 0x" + "f" * 5000, "seed is too large a number"),
    "a huge parameter": ("optimizer: {params: {lr: 0x" + "f" * 5000 + "}}", "lr is too large a number"),
    "many digits": ("seed: " + "9" * 5000, "digits"),
    "nothing": ("# nothing", "it must be a mapping of settings, not null"),
    "a list": ("[1, 2]", "it must be a mapping of settings, not a list"),
    "two documents": ("epochs: 3\n---\nepochs: 4", "expected a single document"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", BOUNDS)
def test_a_recipe_is_bounded(case: str, hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a recipe of a kilobyte that takes minutes or gigabytes, or ends in a traceback."""
    text, message = BOUNDS[case]
    (hostile / "r.yaml").write_text(text)
    assert message in refused(["--config", "r.yaml"], capsys)


@pytest.mark.parametrize(
    "text", ["!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!timestamp 2026-01-31", "!a b", "="]
)
def test_yaml_holds_plain_values_only(text: str) -> None:
    """Catches bytes, sets and dates, which nothing that reads a document expects."""
    with pytest.raises(ValueError, match="no plain value"):
        parse_yaml(text, "r.yaml")
    assert parse_yaml("[2026-01-31, 1:30, 1e-3, .5, -1_0, 0x1F, on, ~]", "r.yaml") == [
        *("2026-01-31", "1:30", 0.001, 0.5, -10, 31, True, None)
    ]


@pytest.mark.timeout(60)
def test_a_recipe_is_a_file_a_link_or_a_pipe(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a device read for ever, a pipe waited for, and a link or ``<(...)`` of the user's that is refused."""
    os.mkfifo("pipe")
    for name, message in (
        ("pipe", "must be a mapping"),  # which nobody writes to
        ("/dev/zero", "not a regular file"),
        (".", "not a regular file"),
        ("none.yaml", "cannot read none.yaml: No such file"),
    ):
        assert message in refused(["--config", name], capsys)
    (hostile / "latin.yaml").write_bytes(b"model: caf\xe9")
    assert "latin.yaml is not UTF-8" in refused(["--config", "latin.yaml"], capsys)
    (hostile / "link.yaml").symlink_to("other.yaml")
    assert read_arguments(["--config", "link.yaml"]).epochs == 3
    end, start = os.pipe()
    os.write(start, b"epochs: 4\n")
    os.close(start)
    assert read_arguments(["--config", f"/dev/fd/{end}"]).epochs == 4
    os.close(end)


def test_flags_groups_and_shown_settings_mean_what_they_meant(hostile: Path) -> None:
    """Catches a usual recipe or command line that the strict reading refuses or takes otherwise."""
    (hostile / "r.yaml").write_text(
        "optimizer: {type: SGD, params: {lr: 1e-3, betas: [0.9, 1], nesterov: yes, name: '3', x: null}}\n"
        "data.root: 'null'\nschedule: {name: step, milestones: ['3']}\nepochs: '30'\nema_decay: 0\noutput: o\n"
    )
    found = read_arguments(["--config", "r.yaml"])
    expected = {"lr": 0.001, "betas": [0.9, 1], "nesterov": True, "name": "3", "x": None}
    assert found.optimizer == OptimizerConfig(type="SGD", params=expected)
    assert (found.data.root, found.schedule.milestones, found.epochs) == (None, [3], 30)
    assert (found.ema_decay, type(found.ema_decay), found.output) == (0.0, float, "o")
    one = [
        "--config",
        "r.yaml",
        "--optimizer.params.lr",
        "1e-2",
        "--schedule.milestones+=9",
        "--compile",
        "true",
    ]
    changed = read_arguments([*one, "--data", "{workers: 1}", "--data.root=5", "--resume", "--local_rank=1"])
    assert changed.optimizer.params == {**expected, "lr": 0.01}
    assert (changed.schedule.milestones, changed.compile, changed.resume) == ([3, 9], True, True)
    assert (changed.data.workers, changed.data.root) == (1, "5")
    (hostile / "o.yaml").write_text("params: {lr: 9}")
    for whole in (["--optimizer.params", "{lr: 9}"], ["--optimizer", "o.yaml"]):
        assert read_arguments(["--config", "r.yaml", *whole]).optimizer.params == {"lr": 9}
    for arguments in (["--config", "r.yaml"], [*one, "--data.workers", "1"]):
        (hostile / "shown.yaml").write_text(resolved([*arguments, "--print-config"]))
        assert read_arguments(["--config", "shown.yaml"]) == read_arguments(arguments)
        short = resolved([*arguments, "--print_config=skip_default"])
        (hostile / "shown.yaml").write_text(short)
        assert read_arguments(["--config", "shown.yaml"]) == read_arguments(arguments)
    assert yaml.safe_load(resolved(["--epochs", "3", "--print-config=skip_default"])) == {"epochs": 3}


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a setting that cannot be found or given by a flag."""
    assert cli.train_command(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name}" in shown
    assert "--optimizer.params" in shown
    assert "passes over the training split. (default: 90)" in " ".join(shown.split())


BAD = st.sampled_from(
    [
        *({"class_path": name} for name in (NAMED, "subprocess.Popen", "this.X")),
        {"class_path": "os.system", "init_args": {"command": "touch owned"}},
        *(
            NAMED,
            "/etc/passwd",
            "../..",
            "${x}",
            "\x1b[2J",
            "a\nb",
            "\ud800",
            "!!python/name:os.system",
            "other.yaml",
        ),
        *(None, True, "", [], {}, [[]], {"": 1}, {1: 2}, [{}], 10**400, -1, 0, 1e308, float("nan"), 2**63),
    ]
)
PLAIN = st.recursive(
    BAD | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
BASES = [yaml.safe_load(path.read_text()) for path in CONFIGS]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A recipe of the project in which a few values and keys are others."""
    recipe = json.loads(json.dumps(draw(st.sampled_from(BASES))))
    for _ in range(draw(st.integers(1, 3))):
        place, value = recipe, draw(BAD | PLAIN)
        while draw(st.booleans()):
            inner = [item for item in place.values() if isinstance(item, dict) and item]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        key = draw(
            st.sampled_from(
                [*place, "class_path", "init_args", "data", "optimizer.params.x", "__path__", "config"]
            )
        )
        place[key] = value
    return recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=mutated() | PLAIN | st.text(max_size=40),
    as_flag=st.booleans(),
    chance=st.randoms(use_true_random=False),
)
def test_mutated_recipes(content: Any, as_flag: bool, chance: Any, hostile: Path) -> None:
    """Catches a recipe that does anything but give settings or a message."""
    try:
        text = content if isinstance(content, str) else yaml.dump(content, allow_unicode=True)
        if chance.random() < 0.2:
            place = chance.randrange(len(text) + 1)
            text = (
                text[:place]
                + chance.choice(["!!python/name:os.system", "&a ", "*a", "{", "[", "\t", ": "])
                + text[place:]
            )
        (hostile / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        arguments = ["--config", "r.yaml"]
        if as_flag and isinstance(content, dict):
            arguments = [f"--{key}={json.dumps(value)}" for key, value in content.items()]
        with nothing_happens():
            found = read_arguments(arguments)
    except ValueError:
        pass
    else:
        assert found.training() is not None
        json.dumps(found.optimizer.params)
    assert "hostile_module" not in sys.modules
    assert not (hostile / "owned").exists()
