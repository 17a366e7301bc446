"""The sections of a config as frozen dataclasses: what each key means, and what it allows.

Sections that only one package understands (`method`, `model.options`, a stream's `augment` and `sampler`) stay
mappings here; their owner types them with `typed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from common.config.bounds import (
    AtLeast,
    AtMost,
    Classes,
    Count,
    Length,
    Momentum,
    NotNegative,
    Pattern,
    Positive,
    Processes,
    Rate,
    Scale,
    Share,
    Side,
    Size,
    Whole,
)


@dataclass(frozen=True)
class SourceConfig:
    """Where samples come from. Empty fields of a stream are inherited from `data`."""

    dataset: str = ""  # a row of common.data.DATASETS, or "folder"
    # else $LTS_DATA/<folder of the row>, else ./datasets/<folder of the row>
    root: str | None = None
    split: str = "train"
    list: str | None = None  # file with one image name per line; restricts the split
    labels: bool = True  # False: no label file is opened or needed
    # sample key -> folder with an earlier step's files
    maps: Mapping[str, str] = field(default_factory=dict)
    # the whole description when dataset is "folder"; a stream's lies over that of `data`
    folder: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StreamConfig(SourceConfig):
    """One named stream of training samples."""

    # images an optimiser step, over all ranks and accumulated micro-batches
    batch_size: Count = 2
    augment: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationConfig(SourceConfig):
    """What is validated on, which is no training image unless the config says so."""

    split: str = "val"


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The training streams, and the validation source."""

    streams: Mapping[str, StreamConfig] = field(default_factory=dict)
    val: ValidationConfig = field(default_factory=ValidationConfig)
    workers: Processes = 2  # loader processes per stream
    cache: str | None = None  # folder of statistics and decoded images; None: <output>/.cache
    # GiB of decoded images of the streams kept there; None: none
    cache_size: Positive | None = None
    # rare, common, frequent: thresholds or lists, see common.data.groups
    groups: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """All that a network needs; `options` belongs to the family and is typed by it."""

    name: str
    num_classes: Classes
    backbone: str = ""  # a row of common.models.BACKBONES, or timm:NAME
    # True: timm's ImageNet weights; a file, or an installed package that holds one
    pretrained: bool | str = False
    checkpoint: str | None = None  # weights of the whole model, loaded before training
    reset_classifier: bool = False  # `checkpoint` was trained on other classes
    norm: Literal["bn", "sync_bn"] = "sync_bn"
    # RGB, 0–255; None: the backbone's own, for most ImageNet's
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    align_corners: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    # the classifier that DisAlign's calibration follows; scripts/rebalance.py sets it
    disalign: str | None = None


@dataclass(frozen=True)
class GroupConfig:
    """Parameters whose name matches `match` (regular expression, searched); the first rule that matches wins."""

    match: Annotated[str, Pattern()]
    lr_mult: NotNegative = 1.0
    weight_decay: NotNegative | None = None


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adamw", "adam"] = "sgd"
    lr: NotNegative = 0.01
    momentum: Rate = 0.9
    nesterov: bool = False
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    weight_decay: NotNegative = 5e-4
    groups: tuple[GroupConfig, ...] = ()
    schedule: Literal["poly", "step", "constant"] = "poly"
    power: NotNegative = 0.9
    floor: NotNegative = 0.0  # poly: the same absolute lowest lr for every group
    milestones: tuple[
        Whole, ...
    ] = ()  # step: 0-based steps at which the lr is multiplied by gamma
    gamma: NotNegative = 0.1
    warmup: Whole = 0  # steps
    warmup_ratio: Share = 1e-6
    clip: Positive | None = None  # total L2 norm
    clip_each: Positive | None = None  # L2 norm of each parameter's gradient

    def __post_init__(self):
        if self.nesterov and self.name == "sgd" and self.momentum == 0:
            raise ValueError("nesterov: true needs a momentum above 0")


Interval = Annotated[
    int, AtLeast(1, "for the end of the run alone give the number of train.steps")
]
Devices = Annotated[int, AtLeast(1, "give 1 to leave the batch whole")]


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Count = 1000
    # the batch is stated for this many processes; fewer accumulate the rest
    devices: Devices = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # memory format of convolutions; None: on CUDA, for networks made of them
    channels_last: bool | None = None
    compile: bool | Literal["reduce-overhead"] = False
    tf32: bool = True  # on CUDA, for products of float32; False: of all their digits
    deterministic: bool = False  # on CUDA; the CPU always is
    # CPU threads; None: torch's default
    threads: Annotated[int, AtLeast(1), AtMost(1024)] | None = None
    log_every: Interval = 50
    save_every: Interval = 1000
    keep: Count = 2  # newest checkpoints; the best one stays as well
    # a checkpoint's folder of another run, which this one goes on from
    branch: str | None = None
    # of the average of weights, which then predicts; None: there is none
    ema: Momentum | None = None
    patience: Count | None = None  # evaluations without a new best score that end the run


@dataclass(frozen=True)
class EvalConfig:
    """Validation and test."""

    every: Interval = 1000
    mode: Literal["whole", "slide"] = "whole"
    crop: Size | None = None  # slide: window height, width
    stride: Size | None = None  # of the windows; None: their size
    # slide, what reaches over the border: shifted back to fit, or cut off there (UniMatch V1)
    windows: Literal["shifted", "cut"] = "shifted"
    window_batch: Count = 4
    window_softmax: bool = False  # slide: average the windows' probabilities, not their logits
    # shorter side of the net's input; None: the image's own size
    short_edge: Side | None = None
    # with short_edge: the longer side's limit, which shortens both
    max_edge: Side | None = None
    scales: Annotated[tuple[Scale, ...], Length(1, 100)] = (1.0,)
    # with short_edge: that limit for scaled images; None: max_edge times the scale
    scaled_max_edge: Side | None = None
    flip: bool = False
    # post hoc: this times −ln π of the training pixels is added to the logits. Less than 0 gives a network that was
    # adjusted in training its prior back
    logit_adjustment: float = 0.0
    batch_size: Count = 1
    workers: Processes = 2
    convention: Literal["nan_mean", "absent_zero", "ltss", "detectron2"] = "nan_mean"
    # its highest value marks `best`
    best: Literal["miou", "miou_tail", "macc", "aacc", "fwiou"] = "miou"
    panels: Whole = 4  # images kept for the report
    max_images: Count | None = None
    per_image: bool = False  # keep the confusion matrix of every image: RUN/per_image.npz
    # pixels that tolerant IoU and boundary F forgive; 0: these are not scored
    boundary: Annotated[int, AtLeast(0), AtMost(32)] = 0
    calibration: bool = False  # score the class probabilities, too

    def __post_init__(self):
        if self.mode == "slide" and self.crop is None:
            raise ValueError("mode: slide needs crop: [height, width]")
        if (
            self.mode == "slide"
            and self.crop
            and self.stride
            and _exceeds(self.stride, self.crop)
        ):
            text = "pixels between the windows would have no score"
            raise ValueError(
                f"stride: {list(self.stride)} is more than crop {list(self.crop)}: {text}"
            )

        if self.windows == "cut" and self.mode != "slide":
            raise ValueError(
                f"windows: cut has no effect in mode: {self.mode}; set mode: slide"
            )
        if self.window_softmax and self.mode != "slide":
            raise ValueError(
                f"window_softmax: has no effect in mode: {self.mode}; set mode: slide"
            )

        for name in ("max_edge", "scaled_max_edge"):
            if getattr(self, name) is not None and self.short_edge is None:
                raise ValueError(
                    f"{name}: {getattr(self, name)} has no effect without short_edge; set that too"
                )


@dataclass(frozen=True)
class LogConfig:
    """Where a run is shown, beside the console and its own log."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)

    def __post_init__(self):
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: {', '.join(self.trackers)}: name each once")


def _exceeds(size: tuple[int, int], limit: tuple[int, int]) -> bool:
    return size[0] > limit[0] or size[1] > limit[1]


@dataclass(frozen=True)
class Config:
    """One run, resolved."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    method: Mapping[str, Any] = field(default_factory=dict)
    # of the loss of class logits: common/losses/build.py
    remedies: Mapping[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    name: str = ""  # the run's folder is <output>/<name>; empty: the config file's stem
    output: str = "runs"
    # step -> name of its run, where that is not the step's own
    runs: Mapping[str, str] = field(default_factory=dict)
    seed: Whole = 0

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name
