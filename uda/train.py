"""Train one stage: `python train.py configs/gta5_to_cityscapes --stage stage1 [--resume] [key=value …]`.

The stages of a task, and what runs between them, are in `main.sh`.
"""

from pathlib import Path

from common import cli
from common.config import Config, ConfigError, nearest
from common.engine import Method, distributed, fit, prepare
from common.experiment import Experiment, print_result
from uda.base import read_prototypes
from uda.config import STAGES, stage_config, stage_parser
from uda.cpsl import CPSL
from uda.distill import Distill
from uda.proda import ProDA
from uda.warmup import WarmUp

METHODS: dict[str, type[Method]] = {"warm_up": WarmUp, "cpsl": CPSL, "proda": ProDA, "distill": Distill}


def build_method(cfg: Config, counts) -> Method:
    """The method that `method.name` names, with the rest of that section as its options."""
    options = dict(cfg.method)
    name = options.pop("name", None)
    if name not in METHODS:
        raise ConfigError(f"{cfg.name}: method.name: unknown {name!r}; {nearest(str(name), METHODS)}")
    return METHODS[name](cfg, options, counts)


def require_earlier_steps(cfg: Config) -> None:
    """Look for the files of earlier steps before any work; a ValueError names the command that makes one."""
    for path in (cfg.model.checkpoint, cfg.model.pretrained, cfg.method.get("teacher")):
        stage = next((s for s in STAGES if isinstance(path, str) and s in Path(path).as_posix()), None)
        if isinstance(path, str) and not Path(path).exists() and (stage or path is not cfg.model.pretrained):
            raise ValueError(f"{path}: not there; train.py --stage {stage or 'of the step before'} makes it")
    for key, folder in cfg.data.streams["target"].maps.items() if "target" in cfg.data.streams else ():
        if "{name}" not in folder and not Path(folder).is_dir():
            raise ValueError(f"{folder}: no {key} pseudo-labels there; generate_pseudo_label.py makes them")
        if "{name}" in folder and not Path(folder).parent.is_dir():
            raise ValueError(f"{Path(folder).parent}: no pseudo-labels there; generate_pseudo_label.py makes them")
    if "prototypes" in cfg.method:
        read_prototypes(cfg.method["prototypes"], cfg.model.num_classes)


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from the stage's newest checkpoint")
    args = parser.parse_intermixed_args()
    cfg = stage_config(args)
    require_earlier_steps(cfg)
    experiment = Experiment(cfg, counted="source")  # scans labels, so before the ranks join
    device = distributed.start(args.device)
    experiment.begin()
    method = prepare(cfg, lambda: build_method(cfg, experiment.statistics.pixel_count), device)
    fit(cfg, method, experiment.open, experiment.evaluator(method, device), device=device, resume=args.resume)
    print_result(experiment.last_result())
    experiment.finish()
    distributed.stop()


if __name__ == "__main__":
    cli.run(main)
