"""The training engine: one loop over the method contract."""

from common.engine.method import Method, MethodContext
from common.engine.runtime import prepare, rehearse
from common.engine.train import fit

__all__ = ["Method", "MethodContext", "fit", "prepare", "rehearse"]
