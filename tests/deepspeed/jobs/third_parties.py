"""Job for one rank: Hugging Face's Trainer, accelerate, and a model as in DeepSpeed's own tests, all with ARSG.

usage: third_parties.py OUTPUT_DIRECTORY [--local_rank=N]
"""

import copy
import sys
from pathlib import Path
from typing import Any

import accelerate
import deepspeed
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from torch import Tensor

# transformers imports torchvision, once something of it is used
import arsg_dist.imagenet.torchvision_compat  # noqa: F401
from arsg_dist import ARSG
from arsg_dist.engine import end_process
from tests.deepspeed import third_parties as problem
from tests.deepspeed.jobs.common import job, weights_of

AUTO_BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def main() -> None:
    output = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    with job(output / "results.pt") as results:
        for stage in (2, 3):
            results[f"Trainer, zero{stage}"] = hugging_face_trainer(stage, output / f"trainer{stage}")
        for stage in (1, 3):
            results[f"accelerate, zero{stage}"] = with_accelerate(stage, client=False)
        results["accelerate, own optimizer"] = with_accelerate(2, client=True)
        for stage in range(4):
            results[f"SimpleModel, zero{stage}"] = simple_model(stage)


def hugging_face_trainer(stage: int, directory: Path) -> dict[str, Any]:
    """Trains with checkpoints, and once more from the middle one."""
    config: dict[str, Any] = {
        **AUTO_BATCH,
        "gradient_clipping": "auto",
        "optimizer": problem.optimizer_section(lr="auto", eps="auto", weight_decay="auto"),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"},
        "steps_per_print": 10**6,
    }
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = "auto"
        config["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        }
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": problem.UPDATES,
        "learning_rate": problem.LR,
        "adam_epsilon": problem.EPS,
        "weight_decay": problem.WEIGHT_DECAY,
        "max_grad_norm": problem.CLIP,
        "save_steps": problem.SAVE_AT,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data = [{"input_ids": row, "labels": row} for row in problem.tokens()]
    result: dict[str, Any] = {}
    for resumed in (None, str(directory / f"checkpoint-{problem.SAVE_AT}")):
        training = transformers.TrainingArguments(deepspeed=copy.deepcopy(config), **arguments)
        trainer = transformers.Trainer(model=problem.build_gpt2(), args=training, train_dataset=data)
        trainer.train(resume_from_checkpoint=resumed)
        engine = trainer.model_wrapped
        assert type(engine.basic_optimizer) is ARSG
        group = engine.basic_optimizer.param_groups[0]
        when = "" if resumed is None else ", resumed"
        result["weights" + when] = weights_of(trainer.model)
        result["losses" + when] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result["settings" + when] = {key: group[key] for key in ("mu", "betas", "eps", "weight_decay")}
        engine.destroy()
        start_afresh()
    return result


def with_accelerate(stage: int, *, client: bool) -> dict[str, Tensor]:
    """A loop around accelerate, with its dummy optimizer or an ARSG of our own."""
    config: dict[str, Any] = {**AUTO_BATCH, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    if not client:
        config["optimizer"] = problem.optimizer_section(lr="auto", weight_decay="auto", eps=problem.EPS)
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
        model = problem.build_gpt2()
        if client:
            optimizer: Any = ARSG(
                model.parameters(),
                lr=problem.LR,
                weight_decay=problem.WEIGHT_DECAY,
                eps=problem.EPS,
                mu=problem.MU,
            )
        else:
            optimizer = DummyOptim(model.parameters(), lr=problem.LR, weight_decay=problem.WEIGHT_DECAY)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(problem.tokens()), batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for _ in range(problem.UPDATES):
            for (rows,) in loader:
                accelerator.backward(model(input_ids=rows, labels=rows).loss)
                optimizer.step()
                optimizer.zero_grad()
        weights = weights_of(accelerator.unwrap_model(model))
        model.destroy()
        return weights
    finally:
        start_afresh()


def start_afresh() -> None:
    """Hugging Face keeps the last config for the whole process."""
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    AcceleratorState._reset_state()


def simple_model(stage: int) -> dict[str, Tensor]:
    """As DeepSpeed's unit tests do: the engine makes the data loader, the model returns its loss."""
    config = {
        "train_batch_size": problem.SAMPLES,
        "gradient_clipping": 0.0,
        "optimizer": problem.optimizer_section(
            lr=problem.LR, eps=problem.EPS, weight_decay=problem.WEIGHT_DECAY
        ),
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**6,
    }
    model = problem.SimpleModel()
    data = list(zip(*problem.samples(), strict=True))
    engine, _, loader, _ = deepspeed.initialize(
        config=config, model=model, model_parameters=model.parameters(), training_data=data
    )
    for _ in range(problem.UPDATES):
        for inputs, classes in loader:
            loss = engine(inputs, classes)
            engine.backward(loss)
            engine.step()
    weights = weights_of(model)
    engine.destroy()
    return weights


if __name__ == "__main__":
    main()
    end_process(0)
