"""CIE-LAB colour: the statistics of an image, and one image given the statistics of another (Reinhard et al., 2001).

NumPy, because it runs in loader processes. Conversion as scikit-image does it (sRGB, illuminant D65, 2° observer), in
float32 and a block of pixels at a time, so that temporaries stay in the cache.
"""

import numpy as np

_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.95047, 1.0, 1.08883])
_TO_XYZ = (_XYZ / _WHITE[:, None]).astype(np.float32)  # linear RGB → XYZ relative to white
_FROM_XYZ = (np.linalg.inv(_XYZ) * _WHITE).astype(np.float32)
# Lab = _TO_LAB · compressed XYZ + _OFFSET
_TO_LAB = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
_FROM_LAB = np.linalg.inv(_TO_LAB)
_OFFSET = np.array([[-16.0], [0.0], [0.0]])
_KNEE, _SLOPE, _START = np.float32(0.008856), np.float32(7.787), np.float32(16 / 116)
_KNEE_ROOT = np.float32(0.2068966)
_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS > 0.04045, ((_LEVELS + 0.055) / 1.055) ** 2.4, _LEVELS / 12.92).astype(np.float32)
_BLOCK = 1 << 14  # pixels


def rgb_to_lab(image: np.ndarray) -> np.ndarray:
    """RGB uint8 (3, …) to L in [0, 100], a, b: float32 (3, …)."""
    pixels = image.reshape(3, -1)
    lab = np.empty(pixels.shape, np.float32)
    matrix, offset = _TO_LAB.astype(np.float32), _OFFSET.astype(np.float32)
    for block in _blocks(pixels):
        np.add(matrix @ _compress(pixels[:, block]), offset, out=lab[:, block])
    return lab.reshape(image.shape)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """L, a, b (3, …) to RGB in [0, 1], clipped: float32 (3, …)."""
    points = lab.reshape(3, -1)
    rgb = np.empty(points.shape, np.float32)
    matrix = _FROM_LAB.astype(np.float32)
    for block in _blocks(points):
        rgb[:, block] = _expand(matrix @ (points[:, block] - _OFFSET).astype(np.float32))
    return rgb.reshape(lab.shape)


def lab_statistics(image: np.ndarray) -> np.ndarray:
    """Mean and population standard deviation of L, a and b over an RGB uint8 image (3, H, W): float64 (2, 3).

    A few numbers an image, worth keeping: they cost a pass over all pixels.
    """
    pixels = image.reshape(3, -1)
    total, squares = np.zeros(3), np.zeros(3)
    for block in _blocks(pixels):
        lab = rgb_to_lab(pixels[:, block]).astype(np.float64)
        total += lab.sum(1)
        squares += np.einsum("cn,cn->c", lab, lab)
    mean = total / pixels.shape[1]
    return np.stack((mean, np.sqrt(np.maximum(squares / pixels.shape[1] - mean**2, 0))))


def transfer(image: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`image` with every LAB channel moved from the statistics `source` to `target`: (x − m_s) / σ_s · σ_t + m_t.

    image: RGB uint8 (3, …), of which `source` are the statistics, or a part of it; a channel without spread takes the
    target's mean. Returns uint8, clipped and truncated. LAB is linear in the compressed XYZ values, so the change of
    statistics and both changes of coordinates are one 3×3 matrix and an offset.
    """
    (mean_s, std_s), (mean_t, std_t) = source, target
    scale = np.divide(std_t, std_s, out=np.zeros(3), where=std_s > 1e-6)
    shift = (mean_t - mean_s * scale)[:, None] + scale[:, None] * _OFFSET - _OFFSET
    matrix = (_FROM_LAB @ (scale[:, None] * _TO_LAB)).astype(np.float32)
    shift = (_FROM_LAB @ shift).astype(np.float32)
    pixels, moved = image.reshape(3, -1), np.empty((3, image[0].size), np.uint8)
    for block in _blocks(pixels):
        values = matrix @ _compress(pixels[:, block])
        values += shift
        moved[:, block] = np.multiply(rgb := _expand(values), 255, out=rgb)
    return moved.reshape(image.shape)


def _blocks(pixels: np.ndarray) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, pixels.shape[1], _BLOCK)]


def _compress(pixels: np.ndarray) -> np.ndarray:
    """RGB uint8 (3, n) to XYZ relative to white, cube root taken above the knee: float32 (3, n)."""
    xyz = _TO_XYZ @ np.take(_LINEAR, pixels, mode="clip")
    dark = xyz <= _KNEE
    roots = np.cbrt(xyz)
    return np.where(dark, _SLOPE * xyz + _START, roots) if dark.any() else roots


def _expand(values: np.ndarray) -> np.ndarray:
    """The inverse of `_compress`, to RGB in [0, 1]: float32 (3, n); `values` is overwritten."""
    np.maximum(values[2], 0, out=values[2])
    xyz = np.where(values > _KNEE_ROOT, values**3, (values - _START) / _SLOPE)
    linear = np.clip(_FROM_XYZ @ xyz, 0, 1)
    curve = np.power(linear, np.float32(1 / 2.4))
    curve *= np.float32(1.055)
    curve -= np.float32(0.055)
    return np.where(linear > np.float32(0.0031308), curve, np.float32(12.92) * linear)
