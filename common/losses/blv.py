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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from common.config import ConfigError, pick, shown, typed
from common.config.bounds import NotNegative, Positive
from common.losses.counts import Counts
from common.losses.cross_entropy import Average
from common.ops.counter_noise import Noise
from common.ops.upsampled_loss import Change

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
    # GCL (Li et al., CVPR 2022) on a cosine classifier of scale s = 30: s · a · |ε| with a = ½, ε ~ N(0, ⅓) in ±1.
    # Of another scale the amplitude is s / 2 as well (`BLV.from_section`).
    "gcl": {
        "coefficient": "max", "limit": "folded", "sigma": 1 / 3, "sign": -1, "amplitude": 15.0, "scale": 30.0,
    },
}  # fmt: skip


def variation_weights(
    counts: Sequence[float] | Tensor, coefficient: str = "paper", absent: str = "ignore"
) -> Tensor:
    """w_k in [0, 1], float32 (K,), computed in float64; no host sync.

    absent: what a class without a pixel is (see `BLV`). Its own weight is 1 either way, unless no class is rarer
    than another: then all present ones have 0.
    """
    q = torch.as_tensor(counts, dtype=torch.float64)
    if coefficient == "none":
        return torch.ones_like(q, dtype=torch.float32)

    if absent == "floor":
        q = q.clamp(min=1)

    present = q > 0
    reference = q.sum() if coefficient == "paper" else q.max()
    # 0 where absent, which is no maximum
    c = torch.log(reference / torch.where(present, q, reference))
    largest = c.max()
    weight = torch.where(largest > 0, c / largest.clamp(min=1e-300), torch.zeros_like(c))

    return torch.where(present, weight, torch.ones_like(weight)).float()


@dataclass(frozen=True)
class BLV:
    """The slot `logits` of a loss (a row of LOSSES in build.py): z to z'. Defaults are the paper's (preset `paper`)."""

    # of whom, or one number per class
    counts: Literal["dataset", "released"] | tuple[NotNegative, ...] = "dataset"
    # log(Σq/q_k), log(max q/q_k), or w_k = 1
    coefficient: Literal["paper", "max", "none"] = "paper"
    # A class without a pixel gets w_k = 1, the rarest class's. ignore: it has no part in the others' weights; release:
    # floor, its count is 1, so that log(Σq) becomes the largest coefficient, and every other weight smaller.
    absent: Literal["ignore", "floor"] = "ignore"
    noise: Literal["gaussian", "uniform", "beta", "exponential", "constant"] = "gaussian"
    sigma: Positive = 6.0  # of the Gaussian
    # clamp(0,1), |clamp(−1,1)|, clamp(−1,1), raw
    limit: Literal["positive", "folded", "signed", "none"] = "positive"
    sign: Literal[1, -1] = 1
    # of w·e; max_k c_k, noise constant and sign −1 is logit adjustment with τ = 1
    amplitude: NotNegative = 1.0
    # s of the cosine classifier that it is for; None: any classifier
    scale: Positive | None = None
    centre: bool = False  # subtract the mean of the limited draw
    average: Average | None = None  # None: as the method averages
    # σ rises linearly to mid-training, then falls to 0
    schedule: Literal["constant", "rise_fall"] = "constant"

    def __post_init__(self):
        if not isinstance(self.counts, str) and not any(self.counts):
            raise ValueError(f"counts: {shown(self.counts)} has no class with pixels")

    @classmethod
    def from_section(cls, mapping: Mapping[str, Any], where: str) -> "BLV":
        """Options from a config section: `preset` and what differs from it. Raises ConfigError.

        A preset for a scale states its amplitude in that scale's logits: another scale has another one, unless it is
        given.
        """
        chosen = dict(mapping)
        preset = pick(PRESETS, chosen.pop("preset", "paper"), f"{where}.preset")
        made = typed(cls, preset | chosen, where)
        if "scale" in preset and "amplitude" not in chosen and made.scale is not None:
            made = replace(made, amplitude=preset["amplitude"] * made.scale / preset["scale"])

        usual = typed(cls, preset, where)
        for name, says in made.idle().items():
            if name in chosen and getattr(made, name) != getattr(usual, name):
                text = f"{where}.{name}: has no effect with {says}; leave one of them out"
                warnings.warn(text, stacklevel=2)

        return made

    def idle(self) -> dict[str, str]:
        """The options that change nothing, and which other one makes them so; a preset may hold them all the same."""
        found = {}
        if self.noise != "gaussian":
            found["sigma"] = f"noise: {self.noise}"
        if self.noise in ("uniform", "beta", "constant"):  # whose draws are in [0, 1]
            found["limit"] = f"noise: {self.noise}"
        if self.coefficient == "none":
            found |= dict.fromkeys(("counts", "absent"), "coefficient: none")

        return found

    def counted(self, counts: Counts) -> Counts:
        """The training labels' counts, and beside them those that the options give for this remedy alone."""
        if self.counts == "dataset":
            return counts

        given = RELEASED_COUNTS if self.counts == "released" else self.counts
        if len(given) != len(counts.pixels):
            raise ConfigError(
                f"BLV counts: {len(given)} given for {len(counts.pixels)} classes"
            )

        return counts._replace(given=torch.tensor(given, dtype=torch.float64, device="cpu"))

    def vector(self, counts: Counts) -> Tensor:
        """w_k (K,)."""
        pixels = counts.pixels if counts.given is None else counts.given
        return variation_weights(pixels, self.coefficient, self.absent)

    def __call__(
        self, logits: Tensor, label: Tensor, vector: Tensor, progress: float = 0.0
    ) -> Tensor:
        """z' in float32 of logits (B, K, …); the label plays no part. progress: share of the training that is over."""
        weight = vector.view(1, -1, *[1] * (logits.dim() - 2))
        variation = self.draw(logits, progress).mul_(weight)
        return torch.add(logits.float(), variation, alpha=self.sign * self.amplitude)

    def change(self, vector: Tensor, progress: float) -> Change:
        """z' − z, for the fused loss, which draws noise of the same law itself."""
        scale = self.strength(progress)
        shift = draw_mean(self, scale) if self.centre else 0.0
        factor = self.sign * self.amplitude
        if self.noise == "constant":
            return Change(vector * (factor * (scale - shift)))

        spread = self.sigma * scale if self.noise == "gaussian" else scale
        return Change(vector * factor, Noise(self.noise, self.limit, spread, shift))

    def strength(self, progress: float) -> float:
        """What the draws are multiplied by, in [0, 1]."""
        return 1.0 if self.schedule == "constant" else 1.0 - abs(2.0 * progress - 1.0)

    @torch.no_grad()
    def draw(self, like: Tensor, progress: float = 0.0) -> Tensor:
        """Limited draws e of the shape and device of `like`, float32."""
        scale = self.strength(progress)
        e = self._unlimited(torch.empty_like(like, dtype=torch.float32), scale)

        if self.limit == "positive":
            e.clamp_(0, 1)
        elif self.limit in ("folded", "signed"):
            e.clamp_(-1, 1)
            e = e.abs_() if self.limit == "folded" else e

        return e.sub_(draw_mean(self, scale)) if self.centre else e

    def _unlimited(self, e: Tensor, scale: float) -> Tensor:
        """Draws of the chosen law, of the shape of `e`."""
        if self.noise == "gaussian":
            return torch.randn_like(e).mul_(self.sigma * scale)
        if self.noise == "uniform":
            return torch.rand_like(e).mul_(scale)
        if self.noise == "beta":  # Beta(½, ½) is the arcsine law
            return torch.rand_like(e).mul_(math.pi / 2).sin_().square_().mul_(scale)
        if self.noise == "exponential":
            return torch.rand_like(e).neg_().log1p_().mul_(-scale)

        return torch.full_like(e, scale)


def draw_mean(options: BLV, scale: float = 1.0) -> float:
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
