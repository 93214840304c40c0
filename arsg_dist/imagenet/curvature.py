"""Measure the curvature and noise of a recipe's loss, for advice about its learning rate."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine import SingleProcessCommunicator, SingleProcessEngine
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.data.dataset import processes_ended
from arsg_dist.imagenet.data.transforms import BatchMixing, cross_entropy_sum, normalised, train_size
from arsg_dist.imagenet.models import build_model, require_image_sizes, weighted_logits
from arsg_dist.imagenet.trained import located
from arsg_dist.imagenet.training.evaluation import refuse_bad_images
from arsg_dist.imagenet.training.optimization import build_optimizer, parameter_groups
from arsg_dist.imagenet.training.setup import open_data, require_room, samplers, split_loader
from arsg_dist.optim.advice import Advice, advise, alpha_beta1_mu


def advise_recipe(
    config: TrainConfig, *, batches: int = 4, iterations: int = 20, checkpoint: Path | None = None
) -> Advice:
    """Measure the largest curvature and the gradient noise of a recipe, on one process, in fp32.

    Args:
        config: of the run; its learning rate is the one that is judged, at the top of its schedule.
        batches: how many batches of the recipe's size to measure on.
        iterations: of Lanczos' method, a product per batch each.
        checkpoint: measure there, of any engine, or at the newest one of a run; None: at the random start. Curvature
            after preconditioning is not at the start what it is later.

    Raises:
        ValueError: bad input, a checkpoint of another model, or an optimizer that the theory does not know.
        OSError: the checkpoint cannot be read.
        JobError: an image cannot be decoded.
        LoadingError: loader processes deliver no batches.
    """
    if config.accumulation_steps != 1:
        raise ValueError(
            "accumulation_steps is not 1: give --accumulation_steps 1 and a batch_size that fits, of which the noise is"
        )
    if config.data.loader == "dali":
        raise ValueError("data.loader 'dali' cannot be used here: measure with the default loader")
    alpha_beta1_mu(build_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))]))
    config.data.require_root()
    saved = SavedRun(located(checkpoint)) if checkpoint else None
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    train_split, val_split = open_data(config)
    communicator = SingleProcessCommunicator()
    sampler, _ = samplers(config, train_split, val_split, communicator)
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(train_split.classes), zero_init_gamma=config.zero_init_gamma)
    size = train_size(config.data, 0)
    require_image_sizes(model, config.model, train=[size], batch_size=config.batch_size, val=None)
    require_room(config.data, communicator, [""], batch_size=config.batch_size, val_batch_size=0)
    model.to(device).train()
    optimizer = build_optimizer(config.optimizer, parameter_groups(model, config.optimizer))
    if saved:
        wanted = [group["lr"] for group in optimizer.param_groups]
        SingleProcessEngine(model, optimizer).load_state(saved)
        for group, lr in zip(optimizer.param_groups, wanted, strict=True):
            group["lr"] = lr
    mixing = BatchMixing(
        config.data,
        num_classes=len(train_split.classes),
        label_smoothing=config.label_smoothing,
        seed=config.seed,
    )

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return torch.stack(
            [
                share * cross_entropy_sum(logits, targets) / len(inputs)
                for share, logits in weighted_logits(model(inputs))
            ]
        ).sum()

    loaded = split_loader(
        train_split,
        sampler,
        data=config.data,
        train=True,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
    )
    measured = []
    with processes_ended(loaded):
        for number, batch in enumerate(islice(loaded, batches)):
            refuse_bad_images(batch.bad, config.data)
            measured.append(mixing(normalised(batch.images.to(device)), batch.labels.to(device), number))
    return advise(optimizer, loss, measured, iterations=iterations)
