"""U2PL's self-training (CVPR 2022) without its contrastive loss: a base for comparisons of remedies.

A moving average of the network labels every pixel of an unlabelled crop. The student learns labelled crops, with an
auxiliary head, and the unlabelled ones in one batch:

    L = L_x + 0.4·L_aux + L_u,      L_u = mean CE over the kept pixels · (all pixels / kept pixels)

Pixels are kept where the entropy H of the teacher's answer in training mode, on the same batch, is below the percentile
100 − 20·(1 − t/T) of it; that pass also moves the teacher's batch-norm statistics. `cutmix` pastes the next crop of the
batch into each, by a box of half the area, in one batch of two. In the first `copied_steps` the teacher is the student;
in `supervised_steps` before them, too, there with the student's batch-norm statistics.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.config import Config, ConfigError
from common.config.bounds import NotNegative, Share, Whole
from common.data import IGNORE
from common.distributed import to_device
from common.engine.method import (
    IN_PARTS,
    Batch,
    Losses,
    Method,
    MethodContext,
    move_average,
    pixel_loss,
)
from common.losses.build import Taken
from common.models import EncoderDecoder, build_network
from common.ops.resize import resize, size_of
from semi_sup.consistency import in_boxes, native_area, paste
from semi_sup.losses import area, share


@dataclass(frozen=True)
class U2PLConfig:
    """The `method:` section."""

    supervised: NotNegative = 1.0  # weight of L_x and of the auxiliary head's loss
    auxiliary: NotNegative = 0.4  # of the latter beside L_x
    unsupervised: NotNegative = 1.0  # weight of L_u
    # of the pixels, those of highest entropy, at the start; none in the end
    dropped: Share = 0.2
    cutmix: bool = False
    mask_padding: bool = True  # release: False, padding of unlabelled crops takes part
    supervised_steps: Whole = 0  # at the start, with labelled crops alone
    # after these, with the student as its own teacher; release: an epoch
    copied_steps: Whole = 0
    momentum: Share = 0.99  # of the moving average, in the end; 1 − 1/t before
    predicts: Literal["student", "teacher"] = "teacher"


class U2PL(Method):
    """The paper without L_c. Batches: `labeled` (image, label), `unlabeled` (image, shown)."""

    Options = U2PLConfig
    options: U2PLConfig
    uncompiled = IN_PARTS

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        fitting = "deeplabv3plus_u2pl"
        # An abstract class will do: it is only asked whether the network is one.
        self.model = build_network(cfg.model, EncoderDecoder, fitting, cfg.name)  # type: ignore[type-abstract]
        if self.model.heads != ("decode", "aux"):
            raise ConfigError(
                f"{cfg.name}: model.name: {cfg.model.name!r} has no auxiliary head; set it to {fitting}"
            )

        self.teacher = deepcopy(self.model).requires_grad_(False)
        self.predict_prefix = f"{'teacher' if self.options.predicts == 'teacher' else 'model'}."
        self.loss = pixel_loss(
            cfg.remedies,
            cfg,
            context,
            average="valid",
            pseudo_labels="pixels",
            labels_itself=True,
        )
        mining = {key: value for key, value in cfg.remedies.items() if key == "focus"}
        self.auxiliary_loss = pixel_loss(mining, cfg, context, average="valid")

    @classmethod
    def takes(cls, cfg: Config) -> Taken:
        """No features: the loss is given logits alone."""
        return Taken(features=False)

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        progress = step / self.steps
        labeled = streams["labeled"]
        if step < self.options.supervised_steps:
            out = self.model(labeled["image"])
            return self.labelled_terms(out["logits"], out["aux"][0], labeled, progress)

        images, label, shown, counted = self.mixed(streams["unlabeled"])
        count = len(labeled["image"])
        if labeled["image"].shape[1:] != images.shape[1:]:
            raise ValueError(
                "data.streams: U2PL runs labelled and unlabelled crops as one batch; give one `crop`"
            )

        both = torch.cat((labeled["image"], images))
        out = self.model(both)
        certain = self.certainty(both)[count:]
        terms = self.labelled_terms(
            out["logits"][:count], out["aux"][0][:count], labeled, progress
        )
        kept = drop_uncertain(label, certain, counted, self.options.dropped * (1 - progress))
        if self.loss.counts.every:
            # one number for all: CutMix has moved pixels between the images
            unlabeled = streams["unlabeled"]
            of_images = torch.where(shown, kept, IGNORE)
            self.loss.count(of_images, native_area(unlabeled, unlabeled["shown"]).mean())
        unlabelled = self.unlabelled_loss(out["logits"][count:], kept, counted, progress)
        loss = terms["loss"] + self.options.unsupervised * unlabelled
        logged = {"Lu": unlabelled, "kept": share(kept, area(kept, counted))}

        return {**terms, "loss": loss, **logged}

    def labelled_terms(
        self, logits: Tensor, auxiliary: Tensor, batch: Batch, progress: float
    ) -> Losses:
        """L_x and L_aux of logits at the network's strides."""
        label = self.model.pad_label(batch["label"])
        main = self.loss.upsampled(logits, label, align_corners=True, progress=progress)
        side = self.auxiliary_loss.upsampled(auxiliary, label, align_corners=True)
        loss = self.options.supervised * (main + self.options.auxiliary * side)

        return {"loss": loss, "Lx": main, "Laux": side}

    @torch.no_grad()
    def mixed(self, batch: Batch) -> "Mixed":
        """Unlabelled crops with the teacher's labels of them; by CutMix where it is drawn."""
        images = batch["image"]
        size = size_of(images)
        answer = self.answer(self.teacher.eval(), images)
        label = resize(answer.float(), size, True).argmax(1)
        every = torch.ones_like(label).bool()
        shown = batch.get("shown", every)

        # torch's generator on the host: the step is not held up by reading a GPU's
        if not self.options.cutmix or torch.rand(()) >= 0.5:
            return Mixed(images, label, shown, shown if self.options.mask_padding else every)

        boxes = to_device(torch.stack([half_box(size) for _ in images]), images.device)
        inside = in_boxes(boxes, size)
        images = paste(images, images.roll(-1, 0), inside)
        label = torch.where(inside, label.roll(-1, 0), label)
        shown = torch.where(inside, shown.roll(-1, 0), shown)

        return Mixed(images, label, shown, shown if self.options.mask_padding else every)

    @torch.no_grad()
    def certainty(self, images: Tensor) -> Tensor:
        """Entropy (B, H, W) of the teacher's answers, normalised by this batch."""
        logits = self.answer(self.teacher.train(), images)
        large = resize(logits.float(), size_of(images), True)
        return torch.special.entr(large.softmax(1)).sum(1)

    def answer(self, net, images: Tensor) -> Tensor:
        """The teacher's logits, without the auxiliary head's."""
        return self.loss.with_prior(net.decode(net.encode(net.normalise(images))))

    def unlabelled_loss(
        self, logits: Tensor, label: Tensor, shown: Tensor, progress: float
    ) -> Tensor:
        """L_u of logits at the network's stride against labels (B, H, W), −1 where dropped."""
        loss = self.loss.upsampled_total(logits, label, align_corners=True, progress=progress)
        return weighted_mean(loss, label, shown)

    def after_step(self, step: int) -> None:
        self.loss.after_step(step)
        learnt = step - self.options.supervised_steps
        if learnt < self.options.copied_steps:
            momentum = 0.0
        else:
            momentum = min(1 - 1 / (learnt + 1), self.options.momentum)

        # in the supervised stage the teacher runs on no batch that could give it statistics
        statistics: Literal["copied", "own"] = "copied" if learnt < 0 else "own"
        move_average(self.teacher, self.model, momentum, statistics)


class Mixed(NamedTuple):
    """Unlabelled crops (B, 3, H, W), labels (B, H, W), which pixels are of an image, and which take part."""

    images: Tensor
    label: Tensor
    shown: Tensor
    counted: Tensor


def drop_uncertain(label: Tensor, entropy: Tensor, shown: Tensor, part: float) -> Tensor:
    """Labels (B, H, W), −1 where not `shown` and where the entropy reaches the percentile 100·(1 − part) of the pixels
    that are shown, interpolated between two of them as NumPy does; nothing is read on the host."""
    counted = entropy.masked_fill(~shown, torch.inf).flatten().sort().values
    rank = (1 - part) * (shown.sum() - 1).clamp(min=0).double()
    low = counted.take(rank.floor().long())
    high = counted.take(rank.ceil().long())
    limit = torch.lerp(low, high, rank.frac().to(low.dtype))

    return torch.where(shown & (entropy < limit), label, IGNORE)


def weighted_mean(total: Tensor, label: Tensor, shown: Tensor) -> Tensor:
    """A sum over the pixels with a label, as their mean times all pixels that are shown over them; 0 without any."""
    kept = (label != IGNORE).sum().clamp(min=1)
    return total / kept * (shown.sum() / kept)


def half_box(size: tuple[int, int]) -> Tensor:
    """A box of half the area, top, left, bottom, right (4,): its width is drawn between half and all of the side."""
    height, width = size
    wide = int(torch.randint(width // 2 + 1, width, ()))
    tall = min(round(height * width / 2 / wide), height)
    top = int(torch.randint(height - tall + 1, ()))
    left = int(torch.randint(width - wide + 1, ()))

    return torch.tensor([top, left, top + tall, left + wide])
