"""Networks by name: torchvision's, and the paper's ResNet-20 for 32×32 images."""

import torch
from torch import nn
from torch.nn import functional

from arsg_dist.imagenet.torchvision_compat import torchvision


def build_model(name: str, num_classes: int) -> nn.Module:
    """An untrained network.

    Args:
        name: "resnet20" or a classification model of `torchvision.models`.
        num_classes: size of its output, shape (batch, num_classes).

    Raises:
        ValueError: no such model.
    """
    if name == "resnet20":
        return ResNet20(num_classes)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(
            f"model {name!r} is not known; use resnet20 or one of torchvision's: {', '.join(known)}"
        )
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return model


class ResNet20(nn.Module):
    """The 20-layer residual network for CIFAR-10 (He et al. 2016, section 4.2; shortcuts without parameters).

    Takes images of shape (batch, 3, height, width) of any size from 4×4 on; 272,474 parameters for 10 classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks = []
        for width_in, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            blocks += [_Block(width_in, width, stride), _Block(width, width, 1), _Block(width, width, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, num_classes)."""
        features = self.blocks(self.stem(images)).mean(dim=(2, 3))
        logits: torch.Tensor = self.classifier(features)
        return logits


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.stride, self.padding = stride, (width - width_in) // 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shortcut = features
        if self.padding:
            shortcut = functional.pad(
                features[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
            )
        return functional.relu(self.residual(features) + shortcut)
