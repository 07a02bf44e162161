"""ResNets (He et al., 2015, arXiv 1512.03385) for small images: a 3x3 stem of stride 1 and no max-pooling.

The layers and their names are those of github.com/kuangliu/pytorch-cifar, on which the field builds, and so is the
initialization, PyTorch's own.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalization import input_normalization

NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
PLANES = (64, 128, 256, 512)


def make_stages(block: type[nn.Module], depth: int) -> list[nn.Sequential]:
    """Four stages of `block(in_planes, planes, stride)`; the first block of each but the first has stride 2."""
    stages = []
    in_planes = PLANES[0]
    for planes, num_blocks in zip(PLANES, NUM_BLOCKS[depth], strict=True):
        blocks = []
        for i in range(num_blocks):
            blocks.append(block(in_planes, planes, 2 if i == 0 and stages else 1))
            in_planes = planes * block.expansion
        stages.append(nn.Sequential(*blocks))
    return stages


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, self.expansion * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * planes)
        self.shortcut = _shortcut(in_planes, self.expansion * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def _shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_planes == out_planes:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), nn.BatchNorm2d(out_planes))


class ResNet(nn.Module):
    """ResNet-{18,34,50,101}: images (n, 3, h, w) with pixels in [0, 1] to logits (n, num_classes).

    Normalizes its input by `mean` and `std` where they are given. ResNet-18 for 10 classes has 11,173,962 parameters.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        block = _BasicBlock if depth < 50 else _Bottleneck
        self.normalize = input_normalization(mean, std)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(block, depth)
        self.linear = nn.Linear(PLANES[-1] * block.expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
