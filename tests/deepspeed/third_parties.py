"""Training programs of others, around the same small problem, and the single process they have to equal."""

from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from tests.deepspeed.jobs.common import weights_of

SAMPLES = 8  # all of them in every update, so that nobody's shuffling matters
LENGTH, VOCABULARY = 12, 40
UPDATES, SAVE_AT = 6, 3
LR, WEIGHT_DECAY, MU, EPS = 0.01, 0.02, 0.2, 1e-3
CLIP = 0.5
HIDDEN = 11


def build_gpt2() -> nn.Module:
    """A GPT-2 of 14 thousand parameters, without dropout."""
    import transformers

    torch.manual_seed(5)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=24,
        n_head=2,
        n_positions=LENGTH,
        vocab_size=VOCABULARY,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def tokens() -> Tensor:
    """Of all samples, int64 (8, 12)."""
    generator = torch.Generator().manual_seed(6)
    return torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)


class SimpleModel(nn.Module):
    """In the style of DeepSpeed's own unit tests: the model returns its loss, and one layer is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.linears = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])
        self.empty = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x)
        return nn.functional.cross_entropy(x, y)


def samples() -> tuple[Tensor, Tensor]:
    """Inputs (8, 11) and classes (8,)."""
    generator = torch.Generator().manual_seed(8)
    return 3 * torch.randn(SAMPLES, HIDDEN, generator=generator), torch.randint(
        HIDDEN, (SAMPLES,), generator=generator
    )


def optimizer_section(**params: Any) -> dict[str, Any]:
    """For a DeepSpeed config."""
    return {"type": "ARSG", "params": {"mu": MU, **params}}


def linear_decay(optimizer: ARSG) -> Any:
    """Hugging Face's default schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 - update / UPDATES)


def warmup_and_decay(optimizer: ARSG) -> Any:
    """DeepSpeed's, with what Hugging Face fills in for "auto"."""
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    return WarmupDecayLR(optimizer, UPDATES, warmup_min_lr=0, warmup_max_lr=LR, warmup_num_steps=1)


def weights_of_one_process(
    model: nn.Module, loss_of: Any, *, schedule: Any = None, clip: float = 0.0
) -> dict[str, Tensor]:
    """Plain torch; parameters without gradient get gradient zero, as DeepSpeed has it."""
    optimizer = ARSG(
        model.parameters(), lr=LR, eps=EPS, weight_decay=WEIGHT_DECAY, mu=MU, foreach=False, fused=False
    )
    scheduler = schedule(optimizer) if schedule else None
    for _ in range(UPDATES):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss_of(model).backward()
        if clip:
            assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
        if scheduler:
            scheduler.step()
    return weights_of(model)
