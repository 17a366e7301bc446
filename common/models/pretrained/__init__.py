"""Weights from files: `load_weights` fills a whole model, `load_backbone` a backbone."""

from common.models.pretrained.load import load_weights
from common.models.pretrained.timm import load_backbone

__all__ = ["load_backbone", "load_weights"]
