"""Train one stage: `python train.py configs/gta5_to_cityscapes --stage stage1 [--resume] [key=value …]`.

The stages of a task, and what runs between them, are in `main.sh`.
"""

from pathlib import Path

from common import cli, distributed
from common.config import Config
from common.engine import Method, MethodContext, fit, prepare, rehearse
from common.engine.method import make_method
from common.experiment import Experiment, print_result
from common.models.pretrained.containers import find_weights
from uda.base import read_distribution, read_prototypes
from uda.config import command, run_of, stage_config, stage_parser
from uda.cpsl import CPSL
from uda.daformer import DAFormer
from uda.distill import Distill
from uda.hrda import HRDA, MICHRDA
from uda.mic import MIC
from uda.proda import ProDA
from uda.warmup import WarmUp

METHODS: dict[str, type[Method]] = {
    "warm_up": WarmUp,
    "cpsl": CPSL,
    "proda": ProDA,
    "distill": Distill,
    "daformer": DAFormer,
    "hrda": HRDA,
    "mic": MIC,
    "mic_hrda": MICHRDA,
}


def build_method(cfg: Config, context: MethodContext) -> Method:
    """The method that `method.name` names."""
    return make_method(METHODS, cfg, context)


def require_earlier_steps(cfg: Config) -> None:
    """Look for the files of earlier steps before any work; a ValueError names the command that makes one."""
    require_initial_weights(cfg)
    for path in (cfg.model.checkpoint, cfg.model.pretrained, cfg.method.get("teacher")):
        if isinstance(path, str) and not _is_there(path):
            raise ValueError(f"{path}: not there; {command('train.py', path)} makes it")

    for key, path in (
        cfg.data.streams["target"].maps.items() if "target" in cfg.data.streams else ()
    ):
        folder = Path(path).parent if "{name}" in path else Path(path)
        if not folder.is_dir():
            program = command("generate_pseudo_label.py", folder) + (
                " --soft" if key == "soft" else ""
            )
            raise ValueError(f"{folder}: no pseudo-labels there; {program} makes them")

    if "prototypes" in cfg.method:
        read_prototypes(cfg.method["prototypes"], cfg.model.num_classes)

    if "class_distribution" in cfg.method:
        read_distribution(cfg.method["class_distribution"], cfg.model.num_classes)


def require_initial_weights(cfg: Config) -> None:
    """Look for the weights that no step of the task makes: stage 2 of the official tasks starts from SimCLRv2's."""
    path = cfg.model.pretrained
    if isinstance(path, str) and run_of(path)[0] is None and not _is_there(path):
        raise ValueError(
            f"{path}: not there, and {cfg.name} starts from it (model.pretrained); put the weights there "
            "(uda/README.md says which), or start from ImageNet's: model.pretrained=true"
        )


def _is_there(source: str) -> bool:
    try:
        find_weights(source)
    except FileNotFoundError:
        return False

    return True


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--resume", action="store_true", help="resume from the stage's newest checkpoint"
    )
    parser.add_argument(
        "--check", action="store_true", help="only check the weights that no step makes"
    )
    args = cli.parse(parser)
    cfg = stage_config(args)
    if args.check:
        require_initial_weights(cfg)
        return

    require_earlier_steps(cfg)
    rehearse(cfg, build_method)
    experiment = Experiment(cfg, counted="source")  # scans labels, so before the ranks join
    device = distributed.start(args.device)
    experiment.begin(args.resume)
    method = prepare(cfg, build_method, experiment.context, device)
    fit(
        cfg,
        method,
        experiment.open,
        experiment.evaluator(method, device),
        device=device,
        resume=args.resume,
    )
    print_result(experiment.last_result())
    experiment.finish()
    distributed.stop()


if __name__ == "__main__":
    cli.run(main)
