"""What a checkpoint holds besides weights, and how a run begins, saves and goes on."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from common import distributed
from common.config import Config, to_tree
from common.engine import checkpoint
from common.engine.method import Method


class Restorable:
    """A trainer's saved state: the method, its optimisers, the gradient scaler and the best score."""

    cfg: Config
    method: Method
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    best: float | None

    def save(self, step: int, best: bool) -> None:
        if distributed.rank() == 0:
            folder = self.cfg.folder / "checkpoints"
            state = {
                "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "threads": torch.get_num_threads(),
            }
            metadata = {"predict_prefix": self.method.predict_prefix, "config": json.dumps(to_tree(self.cfg))}
            path = checkpoint.save(folder, step, self.method, state, metadata)
            if best:
                checkpoint.link(folder, "best", path)
            checkpoint.prune(folder, self.cfg.train.keep)
        distributed.barrier()

    def begin(self) -> int:
        """Step 0 of a new run. ValueError where the folder holds an earlier one: nothing of it is overwritten."""
        earlier = checkpoint.steps(self.cfg.folder / "checkpoints")
        if earlier:
            raise ValueError(
                f"{self.cfg.folder}: holds an earlier run, up to {earlier[-1].name}; add --resume to go on with it, "
                "give this run another `name`, or remove the folder"
            )
        return 0

    def resume(self) -> int:
        """Restore the newest whole checkpoint of the run; 0 where there is none.

        Rates, decay and momentum are those of this run's config: they may differ from the checkpoint's. A ValueError
        says where its optimisers or their groups are others.
        """
        path = checkpoint.newest(self.cfg.folder / "checkpoints")
        if path is None:
            return 0
        state = checkpoint.restore(path, self.method)
        saved = state["optimizers"]
        theirs, ours = _layout(saved), _layout({name: o.state_dict() for name, o in self.optimizers.items()})
        if theirs != ours:
            raise ValueError(
                f"{path}: its optimisers are {theirs}, this config makes {ours} (group, tensors); resume with the "
                "optim.name and optim.groups of the run, or give this one another `name`"
            )
        for name, optimizer in self.optimizers.items():
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved[name])
            for group, configured in zip(optimizer.param_groups, settings, strict=True):
                group.update(configured)
        self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        return state["step"]


def _layout(optimizers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    """Name and number of tensors of each group, in order, of each optimiser's state dict."""
    return {
        name: [(group["name"], len(group["params"])) for group in state["param_groups"]]
        for name, state in optimizers.items()
    }
