"""K-Net (Zhang et al., NeurIPS 2021) for semantic segmentation: class kernels refined by what they segment."""

import torch.nn.functional as F
from torch import Tensor, nn

from common.models.heads.uper import UPerHead

HEADS = 8  # of the attention between kernels


class KernelUpdate(nn.Module):
    """Gated mix of each class's group feature and kernel, both (B, K, C) with C a multiple of `width`.

    The release updates the two halves of a C-vector as if they were kernels of their own: `width` is C / 2 there.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.dynamic_layer = nn.Linear(width, 2 * width)
        self.input_layer = nn.Linear(width, 2 * width)
        self.input_gate = nn.Linear(width, width)
        self.update_gate = nn.Linear(width, width)
        self.norm_in = nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)
        self.input_norm_in = nn.LayerNorm(width)
        self.input_norm_out = nn.LayerNorm(width)
        self.fc_layer = nn.Linear(width, width)
        self.fc_norm = nn.LayerNorm(width)

    def forward(self, group: Tensor, kernels: Tensor) -> Tensor:
        shape = kernels.shape
        group_in, group_out = self.dynamic_layer(group.reshape(-1, self.width)).chunk(2, -1)
        kernel_in, kernel_out = self.input_layer(kernels.reshape(-1, self.width)).chunk(2, -1)
        gate = kernel_in * group_in
        input_gate = self.input_norm_in(self.input_gate(gate)).sigmoid()
        update_gate = self.norm_in(self.update_gate(gate)).sigmoid()
        mixed = update_gate * self.norm_out(group_out) + input_gate * self.input_norm_out(
            kernel_out
        )

        return F.relu(self.fc_norm(self.fc_layer(mixed))).reshape(shape)


class KernelUpdateStage(nn.Module):
    """One refinement: group pixels by the last logits, update the kernels, segment again.

    Layers keep torch's initialisation but for `feat_transform`: the release never calls its own initialiser here.
    """

    def __init__(self, channels: int, heads: int = HEADS):
        super().__init__()
        hidden = 4 * channels
        self.feat_transform = nn.Conv2d(channels, channels, 1)
        self.kernel_update_conv = KernelUpdate(channels // 2)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )
        self.ffn_norm = nn.LayerNorm(channels)
        self.mask_fcs = nn.Sequential(
            nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()
        )
        self.fc_mask = nn.Linear(channels, channels)
        nn.init.kaiming_normal_(self.feat_transform.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.feat_transform.bias)

    def forward(
        self, features: Tensor, kernels: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`features` (B, C, h, w), `kernels` (B, K, C), `logits` (B, K, h, w) to new logits and kernels."""
        x = self.feat_transform(features).flatten(2)
        group = logits.flatten(2).softmax(1) @ x.transpose(1, 2)
        kernels = self.kernel_update_conv(group, kernels)
        attended, _ = self.attention(kernels, kernels, kernels, need_weights=False)
        kernels = self.attention_norm(kernels + attended)
        kernels = self.ffn_norm(kernels + self.ffn(kernels))
        logits = (self.fc_mask(self.mask_fcs(kernels)) @ x).unflatten(2, features.shape[2:])

        return logits, kernels


class KNetHead(nn.Module):
    """UPerNet makes features, first logits and (its classifier's weights) first kernels; `stages` refinements follow.

    Gives `logits` of the last stage and `stages` = [logits of UPerNet, of refinement 1, …]. Gradients run through
    every stage, so the classifier also learns as the source of the kernels.
    """

    family = "knet"  # of its official names

    def __init__(self, generate_head: UPerHead, *, stages: int = 3):
        super().__init__()
        self.kernel_generate_head = generate_head
        channels = generate_head.conv_seg.in_channels
        self.kernel_update_head = nn.ModuleList(
            KernelUpdateStage(channels) for _ in range(stages)
        )

    def forward(self, features: list[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        x = self.kernel_generate_head.fuse(features)
        logits = self.kernel_generate_head.classify(x)  # dropout on this path only
        kernels = self.kernel_generate_head.conv_seg.weight.flatten(1).expand(len(x), -1, -1)
        stages = [logits]

        for update in self.kernel_update_head:
            logits, kernels = update(x, kernels, logits)
            stages.append(logits)

        return {"logits": logits, "stages": stages}
