"""Mix Transformer of SegFormer (Xie et al., NeurIPS 2021): overlapping patches, attention with reduced keys.

timm's PVTv2 stages with MLP ratio 4 are the same network; every LayerNorm has eps 1e-6, as in the MMSegmentation form.
SegFormer's own release, and DAFormer's after it, have 1e-5 where patches are embedded and keys reduced.
"""

import math

from torch import Tensor, nn

from common.config.bounds import Positive, Rate
from common.lazy import Lazy
from common.models.backbones.swin import drop_path_rates

timm = Lazy("timm")

VARIANTS = {  # channels, blocks a stage
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
REDUCING = ("patch_embed.norm", "downsample.norm", "attn.norm")
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)


class MiT(nn.Module):
    """Images (B, 3, H, W), normalised → four maps of `channels` at strides 4, 8, 16, 32.

    `drop_path` is the rate of the last block; it rises linearly from 0 over all blocks. `reduction_eps` is the eps of
    the LayerNorms that follow patch embeddings and the reduction of keys.
    """

    family = "mit"

    def __init__(
        self, name: str = "mit_b0", *, drop_path: Rate = 0.1, reduction_eps: Positive = 1e-6
    ):
        super().__init__()
        self.channels, depths = VARIANTS[name]
        pvt = timm.models.pvt_v2
        self.patch_embed = pvt.OverlapPatchEmbed(
            patch_size=7, stride=4, in_chans=3, embed_dim=self.channels[0]
        )
        self.stages = nn.ModuleList(
            pvt.PyramidVisionTransformerStage(
                dim=self.channels[max(i - 1, 0)],
                dim_out=self.channels[i],
                depth=depths[i],
                downsample=i > 0,
                num_heads=HEADS[i],
                sr_ratio=REDUCTIONS[i],
                mlp_ratio=4.0,
                drop_path=rates,
            )
            for i, rates in enumerate(drop_path_rates(depths, drop_path))
        )

        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = reduction_eps if name.endswith(REDUCING) else 1e-6

        self._init_weights()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        maps = []

        for stage in self.stages:
            x = stage(x)
            maps.append(x)

        return maps

    def _init_weights(self) -> None:
        """As the release: linears truncated normal 0.02, convs normal √(2·groups / (k²·C_out)), biases 0, LN 1/0.

        Two consequences of how the release builds its layers: the MLP's linears are 1×1 convs there and start as
        convs, and query, key and value are one Xavier-uniform matrix of shape (3C, C).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            elif not isinstance(module, nn.Linear):
                continue
            elif name.endswith((".fc1", ".fc2")):
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / module.out_features))
            elif name.endswith((".attn.q", ".attn.kv")):
                bound = math.sqrt(6.0 / (4 * module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)

            if module.bias is not None:
                nn.init.zeros_(module.bias)
