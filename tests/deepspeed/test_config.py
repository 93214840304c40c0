import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from arsg_dist.deepspeed import check_config, resolve_config
from tests.support.launchers import REPOSITORY

PROGRAM: dict[str, Any] = {
    "world_size": 2,
    "batch_size": 24,
    "accumulation_steps": 3,
    "clip_grad_norm": 0.0,
    "optimizer": {"type": "ARSG", "params": {"lr": 0.02, "betas": (0.9, 0.99)}},
}


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs/deepspeed").glob("zero*.json")), ids=lambda path: path.name
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


def _offload(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", **settings}}}


def _config(offload: dict[str, Any], stage: int = 3, **params: Any) -> dict[str, Any]:
    return {
        "optimizer": {"type": "ARSG", "params": params},
        "zero_optimization": {"stage": stage, "offload_optimizer": offload},
    }


def _remote(stage: int = 2, **params: Any) -> dict[str, Any]:
    return {
        "optimizer": {"type": "RemoteObservation", "params": params},
        "zero_optimization": {"stage": stage},
    }


def _nvme(buffers: int | None = None, *, read: bool = False, write: bool = False) -> dict[str, Any]:
    count = {} if buffers is None else {"buffer_count": buffers}
    return {"device": "nvme", "nvme_path": "/nvme", "pipeline_read": read, "pipeline_write": write, **count}


PIPELINED = {"read": True, "write": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_offload(ratio=0.5), "ratio.*Twin-Flow"),
        (_offload(super_offload=True), "super_offload.*SuperOffload"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zenflow.*ZenFlow"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "DeepSpeedCPUAdam only"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "DeepSpeedCPUAdam only"),
        ({"optimizer": {"type": "Arsg"}}, "'Arsg': write 'ARSG'"),
        ({"optimizer": {"type": "ARSG", "legacy_fusion": True}}, "legacy_fusion"),
        ({"optimizer": {"type": "ARSG", "params": {"max_grad_norm": 1.0}}}, "'gradient_clipping'"),
        (
            {"optimizer": {"type": "ARSG", "params": {"torch_adam": True}}},
            "torch_adam, which ARSG does not have",
        ),
        (
            {"optimizer": {"type": "ARSG", "params": {"freeze_step": 400}}},
            "freeze_step, which ARSG does not have: .*1-bit optimizers",
        ),
        (
            {"optimizer": {"type": "ARSG", "params": {"nu": 0.1}}},
            "nu, which ARSG does not have; it has .*'mu'",
        ),
        ({"optimizer": {"type": "remoteobservation"}}, "write 'RemoteObservation'"),
        (_remote(inner="Muon"), "around Muon at ZeRO stage 2: Muon needs whole tensors.*use stage 0, or ddp"),
        (_remote(1, inner="Adafactor"), "Adafactor needs whole tensors"),
        (_remote(3, inner="Adagrad"), "Adagrad makes its state before"),
        (_remote(0, inner="NAdam"), "around NAdam: it keeps numbers beside its step count"),
        (_remote(inner="AdamX"), "'AdamX' is not known"),
        (_remote(inner="RemoteObservation"), "around another optimizer, once"),
        (_remote(inner="AdamW", mu=0.1), "around AdamW has no parameter mu .*remote_mu"),
        (
            {**_config(_nvme(9)), "optimizer": {"type": "RemoteObservation", "params": {"inner": "SGD"}}},
            "NVMe, which does not work with RemoteObservation",
        ),
        (_config(_nvme(9), stage=1), "'nvme'.*stages 1 and 2 DeepSpeed keeps the state in CPU memory"),
        (_config(_nvme(9), stage=2), "'nvme'.*stages 1 and 2 DeepSpeed keeps the state in CPU memory"),
        (_config({"device": "cpu"}, stage=0), "at stage 0 DeepSpeed offloads nothing"),
        (_config(_nvme(9), state_dtype="bfloat16"), "'bfloat16'.*buffers are fp32"),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, "at stage 0 DeepSpeed offloads nothing"),
        ({"zero_optimization": {"cpu_offload": True}}, "at stage 0 DeepSpeed offloads nothing"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "below stage 3"),
        ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, "below stage 3"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype.*at stage 0"),
        ({"data_types": {"grad_accum_dtype": "torch.float32"}, "bf16": {"enabled": True}}, "at stage 0"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "state_dtype"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}, "zero_optimization": {"stage": 1}},
            "never falls",
        ),
    ],
)
def test_what_cannot_work_with_arsg_is_refused_with_the_reason(config: dict[str, Any], message: str) -> None:
    """Catches settings under which DeepSpeed would update with another optimizer, stop with a puzzle, or train nothing;
    and those that it takes without a word and does not follow."""
    with pytest.raises(ValueError, match=message):
        check_config(config)
    if "optimizer" not in config:
        with pytest.raises(ValueError, match=message):
            resolve_config(config, **PROGRAM)


@pytest.mark.parametrize(
    "config",
    [
        {},
        _offload(),
        _offload(ratio=1.0, super_offload=False),
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "none", "ratio": 0.5},
                "zenflow": None,
            }
        },
        {
            "optimizer": {
                "type": "ARSG",
                "params": {"lr": 0.1, "preconditioner": "adam"},
                "legacy_fusion": False,
            }
        },
        {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
        {"optimizer": {"type": "auto", "params": "auto"}, "bf16": {"enabled": True}},
        {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3, "offload_optimizer": _nvme()}},
        _config({"device": "cpu", "pin_memory": False}, stage=1, state_dtype="bfloat16"),
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 0, "cpu_offload": False, "cpu_offload_param": "auto"}},
        {"zero_optimization": {"stage": 1, "cpu_offload": True}},
        {"data_types": {"grad_accum_dtype": "float"}},
        {"data_types": {"grad_accum_dtype": "bfloat16"}, "bf16": {"enabled": True}},
        {"data_types": {"grad_accum_dtype": "bf16"}, "bf16": {"enabled": "auto"}},
        {
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
        },
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 3}},
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}, "zero_optimization": {"stage": 3}},
    ],
)
def test_what_works_is_not_refused(config: dict[str, Any]) -> None:
    """Catches a check that minds more than it should."""
    check_config(config)


@pytest.mark.parametrize(
    ("params", "message"), [("auto", 'has "auto" for optimizer.params'), ([0.1], "must be an object")]
)
def test_params_that_are_no_settings_are_refused_by_deepspeed(params: Any, message: str) -> None:
    """Catches a config straight to DeepSpeed that dies of an AttributeError inside it."""
    with pytest.raises(ValueError, match=message):
        DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "ARSG", "params": params}})
    DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "ARSG"}})


@pytest.mark.parametrize(
    ("needed", "pipeline", "params"),
    [
        (5, {}, {}),
        (4, {}, {"preconditioner": "adam"}),
        (3, {}, {"preconditioner": "none"}),
        (6, {}, {"lookahead_k": 5}),
        (10, {"read": True}, {}),
        (10, {"write": True}, {}),
        (15, PIPELINED, {}),
        (12, PIPELINED, {"preconditioner": "adam"}),
    ],
)
def test_too_few_buffers_for_nvme_are_refused_with_the_number(
    needed: int, pipeline: dict[str, bool], params: dict[str, Any]
) -> None:
    """Catches a bare assertion of DeepSpeed in the first or second update, on the ranks that get there."""
    check_config(_config(_nvme(needed, **pipeline), **params))
    with pytest.raises(ValueError, match=f"buffer_count of at least {needed} for NVMe"):
        check_config(_config(_nvme(needed - 1, **pipeline), **params))


def test_deepspeeds_default_is_too_few_buffers() -> None:
    """Catches a default taken for enough."""
    with pytest.raises(ValueError, match=r"at least 5 for NVMe \(DeepSpeed's default is 4\)"):
        check_config(_config(_nvme()))
    check_config(_config(_nvme(), preconditioner="adam"))
