"""Lightning: torchrun --nproc-per-node 2 examples/lightning_trainer.py --output weights.safetensors

`--strategy ddp`, `fsdp2` (its ModelParallelStrategy), or on GPUs `fsdp` and `deepspeed`. Under DeepSpeed import
arsg_dist.deepspeed, which has ZeRO take ARSG, and give the module's own optimizer as here.
"""

from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from task import UPDATES, Network, arsg, options, samples, save
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "fsdp2": partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1),
    "fsdp": FSDPStrategy,
    "deepspeed": DeepSpeedStrategy,
}


class Training(lightning.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def configure_model(self) -> None:
        """Shard the network, under ModelParallelStrategy."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss."""
        loss: Tensor = self.network(*batch)["loss"]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer: arsg_dist.ARSG(self.parameters(), lr=...)."""
        return arsg(self.parameters())


def main() -> None:
    """Train."""
    chosen = options(strategy=[*STRATEGIES])
    if chosen.strategy == "deepspeed":
        import arsg_dist.deepspeed  # noqa: F401
    trainer = lightning.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=2,
        strategy=STRATEGIES[chosen.strategy](),
        max_epochs=UPDATES,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    training = Training()
    trainer.fit(training, DataLoader(TensorDataset(*samples()), batch_size=6))
    everything = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(trainer.model, options=everything)
    if trainer.is_global_zero:
        save({name.rpartition("network.")[2]: tensor for name, tensor in whole.items()}, chosen.output)


if __name__ == "__main__":
    main()
