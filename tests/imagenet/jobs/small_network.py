"""A network of the same parts as ResNet-20, for tests that ask whether two runs are equal and not what they learn."""

from torch import nn

from arsg_dist.imagenet.models import ResNet20


class SmallResNet(ResNet20):
    """One residual block, that strides and widens: each of the other eight costs a compiler seconds."""

    def __init__(self, num_classes: int, *, zero_init_gamma: bool = False) -> None:
        super().__init__(num_classes, zero_init_gamma=zero_init_gamma)
        self.blocks = nn.Sequential(self.blocks[3])
        self.classifier = nn.Linear(32, num_classes)
