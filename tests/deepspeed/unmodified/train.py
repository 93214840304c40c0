"""A training script as DeepSpeed's examples are written; it knows nothing of the optimizer its config names.

usage: train.py --output FILE --deepspeed_config FILE [--local_rank N]
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
from problem import UPDATES, Samples, build_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = deepspeed.add_config_arguments(parser).parse_args()
    data = Samples()
    model = build_model()
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=data
    )
    assert args.local_rank == engine.local_rank
    for _ in range(UPDATES):
        for inputs, targets in loader:
            loss = torch.nn.functional.mse_loss(engine(inputs), targets)
            engine.backward(loss)
            engine.step()
    if engine.global_rank == 0:
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        torch.save({"weights": weights, "argv": sys.argv, "file": __file__, "path": sys.path[0]}, args.output)
    assert Path(sys.modules["__main__"].__file__ or "").name == "train.py"


if __name__ == "__main__":
    main()
