import json
from pathlib import Path
from typing import Any

import pytest

from arsg_dist.deepspeed import resolve_config
from tests.support.launchers import REPOSITORY

PROGRAM: dict[str, Any] = {
    "world_size": 2,
    "batch_size": 24,
    "accumulation_steps": 3,
    "clip_grad_norm": 0.0,
    "optimizer": {"type": "ARSG", "params": {"lr": 0.02, "betas": (0.9, 0.99)}},
}


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs/deepspeed").glob("*.json")), ids=lambda path: path.name
)
def test_shipped_configs_take_everything_from_the_program(path: Path) -> None:
    """Catches a config in the repository that contradicts every recipe, or leaves DeepSpeed's clipping on."""
    resolved = resolve_config(path, **PROGRAM)
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 3
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["optimizer"] == {"type": "ARSG", "params": {"lr": 0.02, "betas": [0.9, 0.99]}}
    assert str(resolved["zero_optimization"]["stage"]) in path.name
    json.dumps(resolved)


def test_auto_means_the_programs_value_or_the_optimizers_default() -> None:
    """Catches "auto" handed to the optimizer as a value."""
    config = {"optimizer": {"type": "auto", "params": {"lr": "auto", "mu": "auto", "betas": [0.9, 0.99]}}}
    assert resolve_config(config, **PROGRAM)["optimizer"]["params"] == {"lr": 0.02, "betas": [0.9, 0.99]}
    assert config["optimizer"]["params"]["mu"] == "auto"  # type: ignore[index]  # the caller's object is untouched


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 25}, "train_batch_size = 25 but this run uses 24"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type = 'AdamW'"),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas"),
        ({"optimizer": {"params": {"mu": 0.3}}}, r"sets optimizer.params \['mu'\]"),
        ({"optimizer": {"parameters": {}}}, r"unknown optimizer keys \['parameters'\]"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler'"),
        ("missing.json", "does not exist"),
    ],
)
def test_contradictions_are_refused(config: Any, message: str) -> None:
    """Catches one side silently overruling the other."""
    with pytest.raises(ValueError, match=message):
        resolve_config(config, **PROGRAM)


@pytest.mark.parametrize("text", ["{not json", "[1, 2]"])
def test_files_that_are_no_json_object_are_refused(text: str, tmp_path: Path) -> None:
    """Catches a traceback of the JSON parser."""
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=r"ds\.json"):
        resolve_config(tmp_path / "ds.json", **PROGRAM)
