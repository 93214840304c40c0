"""accelerate: accelerate launch --num_processes 2 examples/accelerate_loop.py --output weights.safetensors

(or torchrun --nproc-per-node 2). `accelerate config` chooses what distributes the training; the lines stay.
"""

import torch
from accelerate import Accelerator
from task import OPTIMIZERS, UPDATES, Network, options, samples, save
from torch.utils.data import DataLoader, TensorDataset

chosen = options(optimizer=[*OPTIMIZERS])
accelerator = Accelerator(cpu=not torch.cuda.is_available())
network = Network()
optimizer = OPTIMIZERS[chosen.optimizer](network.parameters())  # arsg_dist.ARSG(network.parameters(), lr=...)
loader = DataLoader(TensorDataset(*samples()), batch_size=12 // accelerator.num_processes)
network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
for _ in range(UPDATES):
    for inputs, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(network(inputs, labels)["loss"])
        optimizer.step()
whole = accelerator.get_state_dict(network)
if accelerator.is_main_process:
    save(whole, chosen.output)
accelerator.end_training()
