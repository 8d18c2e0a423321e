"""Residual networks for small images: the digits default, and ResNet-20 of both papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.errors import TaskError, did_you_mean


class PaddedShortcut(nn.Module):
    """Shortcut without weights: every `stride`-th pixel, with zeros for the new channels.

    Option A of [He2016]_, section 3.3.

    .. [He2016] He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016.
    """

    def __init__(self, n_new_channels: int, stride: int) -> None:
        super().__init__()
        self.n_new_channels = n_new_channels
        self.stride = stride

    def forward(self, values: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the shape of the main branch."""
        before = self.n_new_channels // 2
        after = self.n_new_channels - before
        return F.pad(values[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.downsample = nn.Identity()
        elif shortcut == "A":
            self.downsample = PaddedShortcut(out_channels - in_channels, stride)
        else:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, values: Tensor) -> Tensor:
        """Map (batch, in, height, width) to (batch, out, height / stride, width / stride)."""
        main: Tensor = self.relu(self.bn1(self.conv1(values)))
        main = self.bn2(self.conv2(main))
        out: Tensor = self.relu(main + self.downsample(values))
        return out


class ResidualNetwork(nn.Module):
    """A stem, stages of residual blocks that each halve the image, mean pooling, a classifier.

    Args:
        n_classes: Outputs.
        in_channels: Channels of the image.
        channels: Channels of each stage; from the second on, a stage opens with stride 2.
        blocks_per_stage: Residual blocks of each stage.
        shortcut: How a block that changes the shape goes around itself: "A" pads with zeros and
            has no weights, "B" is a 1x1 convolution.
        stem_stride: Stride of the first convolution.

    Raises:
        TaskError: There is no such shortcut.
    """

    def __init__(
        self,
        *,
        n_classes: int,
        in_channels: int,
        channels: tuple[int, ...],
        blocks_per_stage: int,
        shortcut: str,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            msg = f"A shortcut is 'A' or 'B', but is '{shortcut}'. {did_you_mean(shortcut, 'AB')}"
            raise TaskError(msg)
        width = channels[0]
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.n_stages = len(channels)
        for stage, out_channels in enumerate(channels):
            blocks = []
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(width, out_channels, stride=stride, shortcut=shortcut))
                width = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, classes)."""
        out: Tensor = self.relu(self.bn1(self.conv1(images)))
        for stage in range(self.n_stages):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        logits: Tensor = self.fc(torch.flatten(self.pool(out), 1))
        return logits


def small_resnet(
    *,
    n_classes: int = 10,
    in_channels: int = 1,
    channels: tuple[int, ...] = (8, 16, 32),
    stem_stride: int = 1,
) -> ResidualNetwork:
    """Make the network of the digits task: ten layers with weights, two of them 1x1 shortcuts.

    19,464 weights and 193,344 MACs on 8x8 images. For 28x28 images take wider channels, or
    `stem_stride=2`, which makes them cheaper.
    """
    return ResidualNetwork(
        n_classes=n_classes,
        in_channels=in_channels,
        channels=channels,
        blocks_per_stage=1,
        shortcut="B",
        stem_stride=stem_stride,
    )


def resnet20(n_classes: int = 10, shortcut: str = "A") -> ResidualNetwork:
    """Make ResNet-20 for 32x32 colour images ([He2016]_, section 4.2).

    268,336 weights with shortcut A, as in the papers; 270,896 with B.
    """
    return ResidualNetwork(
        n_classes=n_classes,
        in_channels=3,
        channels=(16, 32, 64),
        blocks_per_stage=3,
        shortcut=shortcut,
    )
