"""WideResNet (Zagoruyko & Komodakis, 2016) as written by DeepMind (Gowal et al., 2020, arXiv 2010.03593).

The layers, their names in the state dict and their initialization (PyTorch's own) are those of RobustBench's
`DMWideResNet`, from adversarial_robustness/pytorch/model_zoo.py in github.com/google-deepmind/deepmind-research:
either loads the other's weights. The BatchNorm momentum is that of Xu et al., 2023.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalization import input_normalization

BATCH_NORM_MOMENTUM = 0.01


class _Block(nn.Module):
    """Two 3x3 convolutions; where the widths differ, a 1x1 shortcut branches off after the activation."""

    def __init__(self, in_planes: int, out_planes: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.pad_end = stride == 2
        self.batchnorm_0 = nn.BatchNorm2d(in_planes, momentum=BATCH_NORM_MOMENTUM)
        self.act_0 = activation()
        self.conv_0 = nn.Conv2d(in_planes, out_planes, 3, stride, padding=0 if self.pad_end else 1, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_planes, momentum=BATCH_NORM_MOMENTUM)
        self.act_1 = activation()
        self.conv_1 = nn.Conv2d(out_planes, out_planes, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_planes, out_planes, 1, stride, bias=False) if in_planes != out_planes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.act_0(self.batchnorm_0(x))
        residual = x if self.shortcut is None else self.shortcut(out)
        if self.pad_end:
            # TensorFlow's "SAME" at stride 2, on which DeepMind's weights were trained: nothing on the left and top.
            out = F.pad(out, (0, 1, 0, 1))
        out = self.act_1(self.batchnorm_1(self.conv_0(out)))
        return residual + self.conv_1(out)


class _BlockGroup(nn.Module):
    """Blocks of one width; the first takes the stride. A module of its own only for the names in the state dict."""

    def __init__(self, num_blocks: int, in_planes: int, out_planes: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        first = _Block(in_planes, out_planes, stride, activation)
        self.block = nn.Sequential(
            first, *(_Block(out_planes, out_planes, 1, activation) for _ in range(num_blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class WideResNet(nn.Module):
    """WRN-depth-width, depth = 6k + 4: images (n, 3, h, w) with pixels in [0, 1] to logits (n, num_classes).

    h and w are divisible by 4. Normalizes its input by `mean` and `std` where they are given. WRN-28-10 for 10 classes
    has 36,479,194 parameters.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 10,
        *,
        activation: type[nn.Module] = nn.ReLU,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        planes = (16, 16 * width, 32 * width, 64 * width)
        num_blocks = (depth - 4) // 6
        self.normalize = input_normalization(mean, std)
        self.init_conv = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(
                _BlockGroup(num_blocks, planes[i], planes[i + 1], stride, activation)
                for i, stride in enumerate((1, 2, 2))
            )
        )
        self.batchnorm = nn.BatchNorm2d(planes[3], momentum=BATCH_NORM_MOMENTUM)
        self.act = activation()
        self.logits = nn.Linear(planes[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.init_conv(self.normalize(x)))
        out = self.act(self.batchnorm(out))
        return self.logits(out.mean((2, 3)))
