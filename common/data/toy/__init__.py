"""Procedural long-tailed street scenes, written to disk in the real layout of each data set."""

from common.data.toy.write import LAYOUTS, MARKER, encode_png16, make, shares

__all__ = ["LAYOUTS", "MARKER", "encode_png16", "make", "shares"]
