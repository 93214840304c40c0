"""`arsg-imagenet evaluate` over a small network."""

import sys

from arsg_dist.engine import end_process
from arsg_dist.imagenet import models
from arsg_dist.imagenet.cli import evaluate_command
from tests.imagenet.jobs.small_network import SmallResNet

if __name__ == "__main__":
    models.ResNet20 = SmallResNet  # type: ignore[misc]
    end_process(evaluate_command(sys.argv[1:]))
