"""The noise of counter_noise.py inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def _uniform(word):
    """[0, 1) of 24 bits, which are exact."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _sine(x):
    """sin x for |x| ≤ π/2, by its series; that of any x takes registers and a branch for huge ones."""
    square = x * x
    series = 1 / 362880 - square * (1 / 39916800)
    series = -1 / 5040 + square * series
    series = 1 / 120 + square * series
    series = -1 / 6 + square * series
    return x + x * square * series


@triton.jit
def _cosine(x):
    """cos x for |x| ≤ π/2."""
    square = x * x
    series = -1 / 3628800 + square * (1 / 479001600)
    series = 1 / 40320 + square * series
    series = -1 / 720 + square * series
    series = 1 / 24 + square * series
    series = -1 / 2 + square * series
    return 1 + square * series


@triton.jit
def _pair(u, v, LAW: tl.constexpr, PI: tl.constexpr):
    """Two draws from two uniform numbers."""
    if LAW == "gaussian":
        radius = tl.sqrt(-2.0 * tl.log(1.0 - u))
        x = PI * (v - 0.5)  # half of the angle 2πv − π
        sine = _sine(x)
        first = radius * (2 * sine * sine - 1)
        second = -2 * radius * sine * _cosine(x)
    elif LAW == "uniform":
        first = u
        second = v
    elif LAW == "beta":
        first = _sine(PI / 2 * u)
        second = _sine(PI / 2 * v)
        first = first * first
        second = second * second
    else:
        first = -tl.log(1.0 - u)
        second = -tl.log(1.0 - v)
    return first, second


@triton.jit
def draws(
    seed, image, row, quad, klass, scale, shift,
    LAW: tl.constexpr, LIMIT: tl.constexpr, ROUNDS: tl.constexpr, PI: tl.constexpr,
):  # fmt: skip
    """e (BLOCK, 4 · quads) of the columns from 4 · quad[0] on."""
    zero = klass[:, None] * 0 + quad[None, :] * 0
    count = zero + quad[None, :], zero + row, zero + klass[:, None], zero + image
    w0, w1, w2, w3 = tl.philox(tl.load(seed), count[0], count[1], count[2], count[3], ROUNDS)
    e0, e1 = _pair(_uniform(w0), _uniform(w1), LAW, PI)
    e2, e3 = _pair(_uniform(w2), _uniform(w3), LAW, PI)

    e = tl.join(tl.join(e0, e2), tl.join(e1, e3))  # (…, 2, 2): e0, e1, e2, e3
    e = tl.reshape(e, [klass.shape[0], 4 * quad.shape[0]]) * scale

    if LIMIT == "positive":
        e = tl.minimum(tl.maximum(e, 0.0), 1.0)
    elif LIMIT == "folded":
        e = tl.minimum(tl.abs(e), 1.0)
    elif LIMIT == "signed":
        e = tl.minimum(tl.maximum(e, -1.0), 1.0)
    return e - shift
