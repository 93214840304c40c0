"""What every script of a defect has below its settings; the settings here are examples."""

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

# --- the settings of a case take the place of these lines
CONFIG = {"train_batch_size": 1, "zero_optimization": {"stage": 1}}
ADAMW = {"lr": 0.1}
UPDATES = [[(1.0,)]]
# --- up to here


class Model(torch.nn.Module):
    """Has a parameter for each number it is called with, which will be its gradient; None leaves a parameter out."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.ones(4) for _ in UPDATES[0][0])

    def forward(self, gradients):
        return sum(g * w.sum() for g, w in zip(gradients, self.weights, strict=True) if g is not None)


def with_deepspeed():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    # Every rank has gradients of its own, whose mean is what UPDATES says.
    own = 2 * (deepspeed.comm.get_rank() + 1) / (deepspeed.comm.get_world_size() + 1)
    for update in UPDATES:
        for gradients in update:
            engine.backward(engine(gradients) * own)
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.weights)):
        return [round(weight.flatten()[0].item(), 3) for weight in model.weights]


def alone():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for update in UPDATES:
        for weight in model.weights:
            weight.grad = torch.zeros_like(weight)  # DeepSpeed takes a missing gradient for zero
        for gradients in update:
            (model(gradients) / len(update)).backward()
        if all(weight.grad.isfinite().all() for weight in model.weights):
            optimizer.step()
    return [round(weight.flatten()[0].item(), 3) for weight in model.weights]


# DeepSpeed refuses fp16 on CPUs without instructions for it; torch computes it on any. Not needed on a GPU.
type(get_accelerator()).is_fp16_supported = lambda _: True
if __name__ == "__main__":
    print("DeepSpeed:", with_deepspeed(), "one process:", alone())
