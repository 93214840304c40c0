"""List the optimizers that may update a part of a parameter without the rest of it."""

from typing import Final

import torch

from arsg_dist.optim import ARSG

ELEMENT_WISE: Final = (
    ARSG,
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""Every element of their update depends on that element's parameter, gradient and state, and on numbers, only."""
