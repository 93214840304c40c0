"""RemoteObservation around AdamW, whose own momentum is left out: it belongs in one place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from arsg_dist.optim.remote_observation import RemoteObservation
from benchmarks.algoperf.shared import Submission


class Defaults(NamedTuple):
    """The one setting under the self-tuning ruleset: not tuned on any workload of the benchmark."""

    learning_rate: float = 2e-3
    one_minus_beta1: float = 0.1
    one_minus_beta2: float = 0.01
    mu: float = 0.2
    weight_decay: float = 0.05


def make(parameters: Iterable[nn.Parameter], given: Any) -> RemoteObservation:
    """Make the optimizer from hyperparameters of the search space; the learning rate is that of AdamW alone.

    Around it the parameters move 1/μ times as far, so that the inner one is μ times as large.
    """
    inner = torch.optim.AdamW(
        parameters,
        lr=given.learning_rate * given.mu,
        betas=(0.0, 1 - given.one_minus_beta2),
        weight_decay=given.weight_decay,
    )
    return RemoteObservation(inner, mu=given.mu, beta1=1 - given.one_minus_beta1)


_submission = Submission(make, Defaults())
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection
get_batch_size = _submission.get_batch_size
