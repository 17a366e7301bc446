"""HRNet (Sun et al., CVPR 2019; W18 as in OCRNet): four parallel branches at strides 4, 8, 16 and 32.

Layers and names are timm's, which are those of the official checkpoints. The forward pass is ours for one reason:
timm fuses branches by nearest upsampling with a fixed factor, the segmentation networks by bilinear upsampling, and
they accept images of any size. Convs start Kaiming normal (fan-out), BN at 1/0, as timm makes them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from common.lazy import Lazy

timm = Lazy("timm")


def resize_branch(x: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Upsample (B, C, h, w) bilinearly by `factor`, then once more to `size` where the two differ.

    They differ when a side of the image is no multiple of 32; the release resizes twice there, and the second step
    is a blend of its own, so one resize straight to `size` would give other values.
    """
    x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    return (
        x
        if x.shape[2:] == size
        else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    )


def fuse(layers: nn.ModuleList, branches: list[Tensor]) -> list[Tensor]:
    """Exchange between branches: output i is the ReLU of the sum over j of branch j brought to resolution i.

    `layers[i][j]` is conv, BN (and timm's unused upsampler) for j > i, the identity for j = i, strided convs for j < i.
    """
    outputs = []
    for i, row in enumerate(layers):
        size = tuple(branches[i].shape[2:])
        terms = []

        for j, (layer, x) in enumerate(zip(row, branches, strict=True)):
            terms.append(
                resize_branch(layer[1](layer[0](x)), 2 ** (j - i), size) if j > i else layer(x)
            )

        outputs.append(F.relu(sum(terms[1:], start=terms[0])))

    return outputs


class HRNet(nn.Module):
    """Images (B, 3, H, W), normalised → four maps of `channels` at strides 4, 8, 16, 32 (sizes rounded up)."""

    family = "hrnet"

    def __init__(self, name: str = "hrnet_w18"):
        super().__init__()
        net = timm.create_model(
            name, features_only=True, feature_location="", out_indices=(1, 2, 3, 4)
        )
        self.channels = tuple(net.feature_info.channels())
        self.conv1 = net.conv1
        self.bn1 = net.bn1
        self.conv2 = net.conv2
        self.bn2 = net.bn2
        self.layer1 = net.layer1
        self.transition1 = net.transition1
        self.transition2 = net.transition2
        self.transition3 = net.transition3
        self.stage2 = net.stage2
        self.stage3 = net.stage3
        self.stage4 = net.stage4

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(F.relu(self.bn2(self.conv2(x))))
        branches = [layer(x) for layer in self.transition1]
        branches = self._stage(self.stage2, branches)
        branches = self._stage(self.stage3, self._add_branch(self.transition2, branches))

        return self._stage(self.stage4, self._add_branch(self.transition3, branches))

    @staticmethod
    def _add_branch(transition: nn.ModuleList, branches: list[Tensor]) -> list[Tensor]:
        """The branches as they are and one more, made from the last."""
        return [*branches, transition[len(branches)](branches[-1])]

    @staticmethod
    def _stage(stage: nn.Sequential, branches: list[Tensor]) -> list[Tensor]:
        for module in stage:
            branches = [layer(x) for layer, x in zip(module.branches, branches, strict=True)]
            branches = fuse(module.fuse_layers, branches)
        return branches
