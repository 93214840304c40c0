"""ARSG with Adam's preconditioner and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from arsg_dist.optim.arsg import ARSG
from benchmarks.algoperf.shared import Submission


class Defaults(NamedTuple):
    """The one setting under the self-tuning ruleset: not tuned on any workload of the benchmark."""

    learning_rate: float = 2e-3
    one_minus_beta1: float = 0.1
    one_minus_beta2: float = 0.01
    mu: float = 0.3
    weight_decay: float = 0.05


def make(parameters: Iterable[nn.Parameter], given: Any) -> ARSG:
    """Make the optimizer from hyperparameters of the search space."""
    return ARSG(
        parameters,
        lr=given.learning_rate,
        betas=(1 - given.one_minus_beta1, 1 - given.one_minus_beta2),
        mu=given.mu,
        weight_decay=given.weight_decay,
        decoupled_weight_decay=True,
        preconditioner="adam",
    )


_submission = Submission(make, Defaults())
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
get_batch_size = _submission.get_batch_size
