"""detectron2's keys that have no counterpart: those of which one value is what is done here, and those refused."""

from collections.abc import Sequence

# the value that changes nothing, and why no other is taken
DONE_ANYWAY: dict[str, tuple[Sequence[str], str]] = {
    "DATALOADER.ANN_TYPE": (["seg"], "repeat factors come from the label maps; see data.streams.labeled.sampler"),
    "DATALOADER.ASPECT_RATIO_GROUPING": (["false"], "crops have one size, so nothing is grouped"),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": (["false"], "set data.streams.labeled.list to the images to train on"),
    "DATALOADER.RANDOM_SUBSET_RATIO": (["1", "1.0"], "set data.streams.labeled.list to the images to train on"),
    "DATALOADER.REPEAT_FACTOR_FILE": (
        [""], "repeat factors are made from class counts, which are kept below data.cache",
    ),
    "DATALOADER.REPEAT_SQRT": (["true"], "repeat factors are square roots"),
    "INPUT.COPY_PASTE.RARE_FILE": ([""], "set data.streams.labeled.augment.rare_classes"),
    "INPUT.CROP.ENABLED": (["true"], "every image is cropped; set INPUT.CROP.SIZE"),
    "INPUT.CROP.TYPE": (["absolute"], "INPUT.CROP.SIZE is in pixels"),
    "INPUT.FORMAT": (["rgb"], "images are RGB"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": (["choice"], "INPUT.MIN_SIZE_TRAIN lists the sizes"),
    "MODEL.BACKBONE.FREEZE_AT": (["0"], "every stage is trained; rates of a part are set by optim.groups"),
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": (["true"], "every prediction is trained"),
    "MODEL.MASK_FORMER.DROPOUT": (["0", "0.0"], "the decoder has none"),
    "MODEL.MASK_FORMER.ENC_LAYERS": (["0"], "set MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": (["false"], "the decoder takes the pixel decoder's channels as they are"),
    "MODEL.MASK_FORMER.PRE_NORM": (["false"], "norms follow their layers"),
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": (["32"], "inputs are padded to what the network needs"),
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": (["false"], "segmentation is semantic"),
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": (["false"], "segmentation is semantic"),
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": (["true"], "segmentation is semantic"),
    "SOLVER.BIAS_LR_FACTOR": (["1", "1.0"], "set optim.groups"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (
        ["full_model"], "all gradients are clipped together by optim.clip, each by optim.clip_each",
    ),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (["2", "2.0"], "optim.clip is an L2 norm"),
    "SOLVER.POLY_LR_CONSTANT_ENDING": (
        ["0", "0.0"], "it is a share of each group's rate, optim.floor one lowest rate of all groups; set that",
    ),
    "SOLVER.RESCALE_INTERVAL": (["false"], "give the numbers of steps themselves"),
    "SOLVER.WARMUP_METHOD": (["linear"], "warm-up is linear; set optim.warmup and optim.warmup_ratio"),
    "SOLVER.WEIGHT_DECAY_BIAS": (["none", "null"], "set optim.groups"),
    "TEST.PRECISE_BN.ENABLED": (["false"], "batch norm keeps the statistics of training"),
    "VIS_PERIOD": (["0"], "set eval.panels"),
    "WANDB.ENABLED": (["false"], "log.jsonl and TensorBoard files are always written"),
}  # fmt: skip

PANOPTIC = "it belongs to panoptic and instance segmentation; leave it out"
RUN = "OUTPUT_DIR names the run; log.jsonl and TensorBoard files are always written"
REFUSED: dict[str, str] = {
    "MODEL.DEVICE": "give --device",
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": PANOPTIC,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": PANOPTIC,
    "SOLVER.GAMMA": "set optim.gamma with optim.schedule=step",
    "SOLVER.NUM_DECAYS": "set optim.milestones with optim.schedule=step",
    "SOLVER.STEPS": "set optim.milestones with optim.schedule=step",
    **{f"WANDB.{name}": RUN for name in ("ENTITY", "NAME", "PROJECT")},
}
