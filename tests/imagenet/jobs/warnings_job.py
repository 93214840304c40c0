"""`arsg-imagenet train` with libraries that warn of what they will change: while engines are imported and connected, in
each update, and in loader processes."""

import sys
import warnings
from typing import Any

from torch import Tensor

from arsg_dist.engine import end_process
from arsg_dist.imagenet import cli, models
from arsg_dist.imagenet.training import setup
from tests.imagenet.jobs.small_network import SmallResNet
from tests.imagenet.jobs.warning_split import WarningSplit, warn


class WarningNetwork(SmallResNet):
    def forward(self, images: Tensor) -> Tensor:
        warn("in each update")
        return super().forward(images)


def connect(engine: str) -> Any:
    warn("while it connects")
    return load_builder(engine)


def open_data(config: Any) -> Any:
    return tuple(WarningSplit(split) for split in open_splits(config))


if __name__ == "__main__":
    warnings.simplefilter("default")
    load_builder, cli.load_builder = cli.load_builder, connect
    open_splits, setup.open_data = setup.open_data, open_data
    models.ResNet20 = WarningNetwork  # type: ignore[misc]
    end_process(cli.train_command(sys.argv[1:]))
