"""Pre-activation ResNets (He et al., 2016, arXiv 1603.05027) for small images, in the two forms that the field uses.

`PreActResNet` (ReLU) is that of Rice et al., 2020 (arXiv 2002.11569), with a BatchNorm before the pooling.
`DMPreActResNet` (Swish) is DeepMind's (Rebuffi et al., 2021, arXiv 2103.01946), which RobustBench has under that name.
They differ in the shortcuts and in the names in the state dict. Both are initialized as PyTorch's layers are.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalization import input_normalization
from models.resnet import PLANES, make_stages


class _PreActBlock(nn.Module):
    """Two 3x3 convolutions; a 1x1 shortcut branches off after the activation where the shape changes."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return residual + self.conv2(F.relu(self.bn2(out)))


class _PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; a 1x1 shortcut branches off after the activation where the shape changes."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, self.expansion * planes, 1, bias=False)
        self.shortcut = _shortcut(in_planes, self.expansion * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return residual + self.conv3(F.relu(self.bn3(out)))


def _shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_planes == out_planes:
        return None
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False))


class PreActResNet(nn.Module):
    """PreActResNet-{18,34,50,101} with ReLU: images (n, 3, h, w) with pixels in [0, 1] to logits (n, num_classes).

    Normalizes its input by `mean` and `std` where they are given. The 18 for 10 classes has 11,172,170 parameters.
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
        block = _PreActBlock if depth < 50 else _PreActBottleneck
        self.normalize = input_normalization(mean, std)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(block, depth)
        self.bn = nn.BatchNorm2d(PLANES[-1] * block.expansion)
        self.linear = nn.Linear(PLANES[-1] * block.expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.relu(self.bn(out)).mean((2, 3)))


class _DMBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, a 3x3 shortcut branches off before the BatchNorm."""

    expansion = 1

    def __init__(self, in_planes: int, out_planes: int, stride: int):
        super().__init__()
        self.pad_end = stride == 2
        padding = 0 if self.pad_end else 1
        self.batchnorm_0 = nn.BatchNorm2d(in_planes)
        self.conv_2d_1 = nn.Conv2d(in_planes, out_planes, 3, stride, padding, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_planes)
        self.conv_2d_2 = nn.Conv2d(out_planes, out_planes, 3, padding=1, bias=False)
        changes = stride != 1 or in_planes != out_planes
        self.shortcut = nn.Conv2d(in_planes, out_planes, 3, stride, padding, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(self._pad(x))
        out = self.conv_2d_1(self._pad(F.silu(self.batchnorm_0(x))))
        return residual + self.conv_2d_2(F.silu(self.batchnorm_1(out)))

    def _pad(self, x: Tensor) -> Tensor:
        # TensorFlow's "SAME" at stride 2, on which DeepMind's weights were trained: nothing on the left and top.
        return F.pad(x, (0, 1, 0, 1)) if self.pad_end else x


class DMPreActResNet(nn.Module):
    """DeepMind's PreActResNet-{18,34} with Swish: images (n, 3, h, w) with pixels in [0, 1] to logits (n, num_classes).

    h and w are divisible by 8. Normalizes its input by `mean` and `std` where they are given.
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
        self.normalize = input_normalization(mean, std)
        self.conv_2d = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer_0, self.layer_1, self.layer_2, self.layer_3 = make_stages(_DMBlock, depth)
        self.batchnorm = nn.BatchNorm2d(PLANES[-1])
        self.logits = nn.Linear(PLANES[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d(self.normalize(x))
        out = self.layer_3(self.layer_2(self.layer_1(self.layer_0(out))))
        return self.logits(F.silu(self.batchnorm(out)).mean((2, 3)))
