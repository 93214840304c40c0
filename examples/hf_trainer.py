"""Hugging Face's Trainer: torchrun --nproc-per-node 2 examples/hf_trainer.py --output weights.safetensors

Under DeepSpeed (--parallel deepspeed) the optimizer stands in its config, whose "auto" the Trainer fills in. Plain and
under FSDP it is given by `optimizer_cls_and_kwargs`, and the Trainer leaves biases without weight decay. Without GPUs
accelerate has no FSDP.
"""

from typing import Any

import torch
from task import SETTINGS, UPDATES, Network, options, samples, save
from transformers import Trainer, TrainingArguments

from arsg_dist import ARSG

chosen = options(parallel=["plain", "deepspeed", "fsdp"])
settings = {name: value for name, value in SETTINGS.items() if name != "weight_decay"}  # the Trainer's own
distribution: dict[str, dict[str, Any]] = {
    "plain": {},
    "deepspeed": {
        "deepspeed": {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 2},
            # "auto": what the TrainingArguments below say, lr and adam_... included
            "optimizer": {
                "type": "ARSG",
                "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "mu": 0.2},
            },
        }
    },
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}},
}
if chosen.parallel == "deepspeed":
    import arsg_dist.deepspeed  # noqa: F401  ("type": "ARSG")

inputs, labels = samples()
arguments = TrainingArguments(
    output_dir=str(chosen.output.with_suffix(".trainer")),
    per_device_train_batch_size=6,
    max_steps=UPDATES,
    learning_rate=SETTINGS["lr"],
    weight_decay=SETTINGS["weight_decay"],
    adam_beta1=SETTINGS["betas"][0],
    adam_beta2=SETTINGS["betas"][1],
    adam_epsilon=SETTINGS["eps"],
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
    **distribution[chosen.parallel],
)
trainer = Trainer(
    model=Network(),
    args=arguments,
    train_dataset=[{"inputs": row, "labels": label} for row, label in zip(inputs, labels, strict=True)],
    optimizer_cls_and_kwargs=None if chosen.parallel == "deepspeed" else (ARSG, settings),
)
trainer.train()
whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
if trainer.is_world_process_zero():
    save(whole, chosen.output)
