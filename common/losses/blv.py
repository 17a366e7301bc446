"""BLV: Balancing Logit Variation for Long-Tailed Semantic Segmentation (CVPR 2023).

During training every logit is perturbed by noise whose size grows with the rarity of its class:

    z'[b,k,h,w] = z[b,k,h,w] + sign · w_k · e[b,k,h,w],   w_k = c_k / max_j c_j,   c_k = log(Σ_j q_j / q_k)

with q_k the pixel count of class k and e an independent draw for every image, class and pixel, limited to [0, 1].
The loss is the cross-entropy of z'. Evaluation uses z: the noise exists only here.

Two facts that the equation hides. With σ = 6 the limited draw is close to a fair coin: 50 % are 0 and 43 % are 1
(`paper`); in the released form |clamp(e, −1, 1)|, σ = 4, 80 % are exactly 1, so its "noise" is mostly a constant
offset. And the offset is *added* for rare classes, opposite to logit adjustment: see `sign` and the README.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import ConfigError, pick, shown, typed
from common.config.bounds import NotNegative, Positive
from common.losses.cross_entropy import Average, pixel_cross_entropy

# The release's class counts: the GTA5 histogram, with the leading digit of `car` (id 13) lost. It gave them to
# Cityscapes models. Kept only to reproduce the release; counts come from the training labels otherwise.
RELEASED_COUNTS = (
    16099193283, 4155428633, 8478285320, 925367586, 317481282, 531401266, 67288808, 40463971, 3810296251, 1074861777,
    6784666433, 181828023, 15321782, 259269812, 564950248, 184638969, 32522117, 15799033, 2718199,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released-head": {"limit": "folded", "sigma": 4.0, "counts": "released", "average": "all", "absent": "floor"},
    "released-first": {
        "coefficient": "max", "limit": "folded", "sigma": 4.0, "counts": "released", "average": "all",
        "absent": "floor",
    },
}  # fmt: skip


@dataclass(frozen=True)
class BLVOptions:
    """Defaults are the paper's (preset `paper`)."""

    counts: Literal["dataset", "released"] | tuple[NotNegative, ...] = "dataset"  # of whom, or one number a class
    coefficient: Literal["paper", "max", "none"] = "paper"  # log(Σq/q_k), log(max q/q_k), or w_k = 1
    # A class without a pixel gets w_k = 1, the rarest class's. ignore: it has no part in the others' weights; release:
    # floor, its count is 1, so that log(Σq) becomes the largest coefficient, and every other weight smaller.
    absent: Literal["ignore", "floor"] = "ignore"
    noise: Literal["gaussian", "uniform", "beta", "exponential", "constant"] = "gaussian"
    sigma: Positive = 6.0  # of the Gaussian
    limit: Literal["positive", "folded", "signed", "none"] = "positive"  # clamp(0,1), |clamp(−1,1)|, clamp(−1,1), raw
    sign: Literal[1, -1] = 1
    centre: bool = False  # subtract the mean of the limited draw
    average: Average | None = None  # None: as the method averages
    schedule: Literal["constant", "rise_fall"] = "constant"  # σ rises linearly to mid-training, then falls to 0

    def __post_init__(self):
        if not isinstance(self.counts, str) and not any(self.counts):
            raise ValueError(f"counts: {shown(self.counts)} has no class with pixels")


def blv_options(mapping: Mapping[str, Any], where: str) -> BLVOptions:
    """Options from a config section: `preset` and what differs from it. Raises ConfigError."""
    chosen = dict(mapping)
    preset = pick(PRESETS, chosen.pop("preset", "paper"), f"{where}.preset")
    return typed(BLVOptions, preset | chosen, where)


def class_weights(counts: Sequence[float] | Tensor, coefficient: str = "paper", absent: str = "ignore") -> Tensor:
    """w_k in [0, 1], float32 (K,), computed in float64; no host sync.

    absent: what a class without a pixel is (see `BLVOptions`). Its own weight is 1 either way, unless no class is rarer
    than another: then all present ones have 0.
    """
    q = torch.as_tensor(counts, dtype=torch.float64)
    if coefficient == "none":
        return torch.ones_like(q, dtype=torch.float32)
    if absent == "floor":
        q = q.clamp(min=1)

    present = q > 0
    reference = q.sum() if coefficient == "paper" else q.max()
    c = torch.log(reference / torch.where(present, q, reference))  # 0 where absent, which is no maximum
    largest = c.max()
    weight = torch.where(largest > 0, c / largest.clamp(min=1e-300), torch.zeros_like(c))
    return torch.where(present, weight, torch.ones_like(weight)).float()


class BLVLoss(nn.Module):
    """Cross-entropy of class-wise perturbed logits; any head's logits at label resolution."""

    def __init__(self, options: BLVOptions, counts: Sequence[int] | Tensor | None, average: Average = "valid"):
        """`counts`: pixels of each class in the training labels; used where the options say "dataset"."""
        super().__init__()
        self.options, self.average = options, options.average or average
        if options.counts != "dataset":
            given = RELEASED_COUNTS if options.counts == "released" else options.counts
            if counts is not None and len(given) != len(counts):
                raise ConfigError(f"BLV counts: {len(given)} given for {len(counts)} classes")
            counts = given
        if counts is None:
            raise ConfigError("BLV counts: the dataset's statistics are needed")
        self.counts = torch.as_tensor(counts, dtype=torch.float64)  # (K,), as chosen by the options
        self.register_buffer("weight", self.weights_of(self.counts), persistent=False)

    def set_counts(self, counts: Tensor) -> None:
        """Use new class counts (K,), e.g. refreshed by pseudo-labels; no host sync."""
        self.weight.copy_(self.weights_of(counts))

    def weights_of(self, counts: Tensor) -> Tensor:
        """w_k (K,) of class counts (K,), as the options have it."""
        return class_weights(counts, self.options.coefficient, self.options.absent)

    def forward(
        self, logits: Tensor, label: Tensor, *, pixel_weight: Tensor | None = None, progress: float = 0.0
    ) -> Tensor:
        """Scalar loss of logits (B, K, H, W), label (B, H, W); `progress` in [0, 1] is the share of training done."""
        perturbed = self.perturb(logits, progress)
        return pixel_cross_entropy(perturbed, label, pixel_weight=pixel_weight, average=self.average)

    def perturb(self, logits: Tensor, progress: float = 0.0) -> Tensor:
        """z' in float32, for any loss of logits (B, K, …)."""
        variation = self.draw(logits, progress).mul_(self.weight.view(1, -1, *[1] * (logits.dim() - 2)))
        return torch.add(logits.float(), variation, alpha=self.options.sign)

    def draw(self, like: Tensor, progress: float = 0.0) -> Tensor:
        """Limited draws e of the shape and device of `like`, float32."""
        o = self.options
        scale = 1.0 if o.schedule == "constant" else 1.0 - abs(2.0 * progress - 1.0)
        e = torch.empty_like(like, dtype=torch.float32, requires_grad=False)
        with torch.no_grad():
            if o.noise == "gaussian":
                e = torch.randn_like(e).mul_(o.sigma * scale)
            elif o.noise == "uniform":
                e = torch.rand_like(e).mul_(scale)
            elif o.noise == "beta":  # Beta(½, ½) is the arcsine law
                e = torch.rand_like(e).mul_(math.pi / 2).sin_().square_().mul_(scale)
            elif o.noise == "exponential":
                e = torch.rand_like(e).neg_().log1p_().mul_(-scale)
            else:
                e = torch.full_like(e, scale)
            if o.limit == "positive":
                e.clamp_(0, 1)
            elif o.limit in ("folded", "signed"):
                e.clamp_(-1, 1)
                e = e.abs_() if o.limit == "folded" else e
            return e.sub_(draw_mean(o, scale)) if o.centre else e


def draw_mean(options: BLVOptions, scale: float = 1.0) -> float:
    """Exact mean of the limited draw."""
    unlimited = options.limit == "none"
    if options.noise == "gaussian":
        if options.limit in ("signed", "none") or scale == 0:
            return 0.0
        s = options.sigma * scale
        above = 0.5 * math.erfc(1 / (s * math.sqrt(2)))  # P(e > 1)
        density = (1 - math.exp(-0.5 / s**2)) / math.sqrt(2 * math.pi)  # φ(0) − φ(1/σ)
        return (above + s * density) * (2 if options.limit == "folded" else 1)
    if options.noise == "exponential":
        return scale if unlimited else scale * (1 - math.exp(-1 / scale)) if scale > 0 else 0.0
    return scale if options.noise == "constant" else scale / 2
