"""Networks: `build_model(config.model)` makes one, `load_weights(model, path)` fills it from any known file; both in
one, for inference: `load_model(config.model, path)`."""

from common.models.backbones import BACKBONES, build_backbone
from common.models.build import MODELS, build_model, build_network, load_model
from common.models.pretrained import load_weights
from common.models.segmentor import EncoderDecoder, Extents, SegmentationModel, Segmentor

__all__ = [
    "BACKBONES",
    "MODELS",
    "EncoderDecoder",
    "Extents",
    "SegmentationModel",
    "Segmentor",
    "build_backbone",
    "build_model",
    "build_network",
    "load_model",
    "load_weights",
]
