"""Ray Train: python examples/ray_train.py --output weights.safetensors

Two workers; each is a rank of torch's process group, so that the loop is that of `torch_ddp.py`.
"""

from pathlib import Path
from typing import Any

import ray.train.torch
import torch.distributed as dist
from ray.train import ScalingConfig
from task import UPDATES, Network, arsg, options, save, share_of


def train(config: dict[str, Any]) -> None:
    """Train on one worker."""
    network = ray.train.torch.prepare_model(Network())
    optimizer = arsg(network.parameters())  # arsg_dist.ARSG(network.parameters(), lr=...)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        network(*share_of(dist.get_rank(), dist.get_world_size()))["loss"].backward()
        optimizer.step()
    if dist.get_rank() == 0:
        save(network.module.state_dict(), Path(config["output"]))


if __name__ == "__main__":
    chosen = options()
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"output": str(chosen.output.resolve())},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
    )
    trainer.fit()
