"""The training engine: one loop over the method contract."""

from common.engine.method import Method
from common.engine.runtime import prepare, rehearse
from common.engine.train import fit

__all__ = ["Method", "fit", "prepare", "rehearse"]
