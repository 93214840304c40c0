"""Random input to everything that reads files of others: a clear error or success, no traceback, no hang, no write.

The input is the same in every run, so that nothing turns red by chance. To hunt with new input, 4,000 examples a test:

    pytest tests/faults/test_fuzz.py --hypothesis-profile hunt --timeout 0
"""

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arsg_dist.deepspeed.config.resolve import resolve_config
from arsg_dist.imagenet import cli
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.data.shard_writer import shard_command
from arsg_dist.imagenet.data.tar_shards import TarShards

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=max(500, settings.default.max_examples))

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["auto", "1e-3", "nan", "../..", "${x}", "!!python/object/apply:os.system ['true']"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def sections(known: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Dictionaries with known keys, most of them with values of the wrong kind, and unknown ones."""
    items = {
        key: VALUES | sections(inner) if isinstance(inner, dict) and inner else VALUES
        for key, inner in known.items()
    }
    return st.fixed_dictionaries({}, optional={**items, "no such key": VALUES}) | VALUES


RECIPES = sections(
    {
        **dict.fromkeys(TrainConfig.__dataclass_fields__),
        "data": dict.fromkeys(TrainConfig().data.__dataclass_fields__),
        "optimizer": {"type": None, "params": {"lr": None, "mu": None, "betas": None}},
        "schedule": dict.fromkeys(TrainConfig().schedule.__dataclass_fields__),
        "boost": dict.fromkeys(TrainConfig().boost.__dataclass_fields__),
    }
)
DEEPSPEED = sections(
    {
        "optimizer": {"type": None, "params": {"lr": None, "mu": None}, "legacy_fusion": None},
        "scheduler": {"type": None, "params": None},
        "zero_optimization": {"stage": None, "offload_optimizer": {"device": None}, "overlap_comm": None},
        "fp16": {"enabled": None},
        "bf16": {"enabled": None},
        "train_batch_size": None,
        "gradient_clipping": None,
    }
)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(code: int) -> None:
        raise AssertionError(f"a rank ended with {code}, as after a bug")

    monkeypatch.setattr(cli, "train", lambda *arguments: 0)
    monkeypatch.setattr(cli, "end_process", unexpected)


def check_recipe(recipe: object, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    before = sorted(directory.rglob("*"))
    capsys.readouterr()  # of an example that failed
    code = cli.train_command(["--config", str(path), "--output", str(directory / "run")])
    shown = capsys.readouterr()
    assert code in (0, 2), shown.err
    assert (code == 0) == (not shown.err), shown.err
    assert "Traceback" not in shown.err
    assert sorted(directory.rglob("*")) == before


@FEW
@given(recipe=RECIPES | st.text(max_size=60))
def test_recipes(
    recipe: object, tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a recipe that ends in a traceback, or whose YAML makes Python objects."""
    check_recipe(recipe, tmp_path, capsys)


def test_null_is_no_value(tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a setting left empty in YAML that ends in a traceback (found by the tests below)."""
    for recipe in (
        {"batch_size": None},
        {"schedule": {"warmup_epochs": None}},
        {"optimizer": None},
        {"data": None},
    ):
        check_recipe(recipe, tmp_path, capsys)


@pytest.mark.parametrize("section", ["data", "data.progressive", "optimizer", "schedule", "boost"])
@pytest.mark.parametrize("value", [[], [1], [{}], 3, 1.5, True, "text", "", {1: 2}], ids=repr)
def test_a_section_is_a_mapping(
    section: str, value: object, tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a section of another shape that ends in a traceback (found by the tests below)."""
    outer, _, inner = section.partition(".")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({outer: {inner: value} if inner else value}))
    assert cli.train_command(["--config", str(path), "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.turn(0)
@MANY
@given(recipe=RECIPES | st.text(max_size=200))
def test_many_recipes(
    recipe: object, tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the same in thousands of other recipes: a traceback, or Python objects from YAML."""
    check_recipe(recipe, tmp_path, capsys)


def check_deepspeed_config(config: object, directory: Path) -> None:
    path = directory / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with suppress(ValueError):  # anything else is a traceback for the user
        resolve_config(
            str(path),
            world_size=2,
            batch_size=8,
            accumulation_steps=1,
            clip_grad_norm=0.0,
            optimizer={"type": "ARSG", "params": {"lr": 0.1}},
        )


@FEW
@given(config=DEEPSPEED | st.text(max_size=60) | st.just("[" * 100_000))
def test_deepspeed_configs(config: object, tmp_path: Path) -> None:
    """Catches a DeepSpeed config that ends in a traceback."""
    check_deepspeed_config(config, tmp_path)


@pytest.mark.turn(1)
@MANY
@given(config=DEEPSPEED | st.text(max_size=200))
def test_many_deepspeed_configs(config: object, tmp_path: Path) -> None:
    """Catches the same in thousands of other configs: a traceback."""
    check_deepspeed_config(config, tmp_path)


@pytest.fixture
def shards(small_tree: Path, tmp_path: Path) -> Path:
    assert shard_command([str(small_tree), str(tmp_path / "shards"), "--workers", "1"]) == 0
    return tmp_path / "shards" / "train"


def damage(path: Path, chance: random.Random) -> None:
    """One of the things that happen to files: cut off, bytes changed, bytes put in, emptied, replaced."""
    content = bytearray(path.read_bytes())
    kind = chance.randrange(5)
    if kind == 0:
        del content[chance.randrange(len(content)) :]
    elif kind == 1:
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        place = chance.randrange(len(content))
        content[place:place] = chance.randbytes(chance.randint(1, 40))
    elif kind == 3:
        content.clear()
    else:
        content = bytearray(chance.randbytes(chance.randint(1, 400)))
    path.write_bytes(content)


def read_damaged_shards(shards: Path, directory: Path, rounds: int) -> None:
    start = 0 if settings.default.derandomize else random.randrange(10**9)
    for number in range(start, start + rounds):
        chance = random.Random(number)
        copy = directory / f"copy-{number}"
        shutil.copytree(shards, copy)
        damaged = chance.choice(sorted(copy.iterdir()))
        damage(damaged, chance)
        try:
            source = TarShards(copy)
        except ValueError:
            pass
        else:
            # What remains is what a checksum of every image would find, or has no meaning for the images.
            assert damaged.name != "index.npy", number
            for index in range(len(source)):
                source.read(index)
        shutil.rmtree(copy)


def test_damaged_shards(shards: Path, tmp_path: Path) -> None:
    """Catches an index or description that is believed though it is damaged."""
    read_damaged_shards(shards, tmp_path, 60)


@pytest.mark.turn(2)
def test_many_damaged_shards(shards: Path, tmp_path: Path) -> None:
    """Catches the same in a thousand other damages: an index or description that is believed."""
    read_damaged_shards(shards, tmp_path, 1000)
