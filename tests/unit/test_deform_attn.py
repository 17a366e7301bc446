"""Multi-scale deformable attention: every form against reference outputs, a float64 loop and numeric gradients."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.ops import deform_attn
from common.ops.deform_attn import choose_form, ms_deform_attn, triton_missing
from tests.interpreter import run_interpreted

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "op_ms_deform_attn.npz"
TORCH_FORMS = ("grid_sample", "embedding_bag")
SHAPES = [(3, 4), (2, 3)]
# (shapes, heads, channels, points): one level, several, odd channels, one point
LAYOUTS = [(SHAPES, 2, 5, 3), ([(4, 3)], 1, 30, 1), ([(2, 2), (1, 5), (3, 1), (4, 4)], 3, 71, 2)]


def inputs(shapes=SHAPES, heads=2, channels=5, points=3, batch=2, queries=4, dtype=torch.float64):
    """Value, locations (some outside the map) and weights."""
    generator = torch.Generator().manual_seed(1)
    size = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels, generator=generator, dtype=dtype)
    locations = torch.rand(*size, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(size, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def loop(value, shapes, locations, weights):
    """The sum, sample by sample and corner by corner."""
    value, locations, weights = (t.detach().double().numpy() for t in (value, locations, weights))
    batch, queries, heads, levels, points = weights.shape
    out = np.zeros((batch, queries, heads, value.shape[3]))
    starts = np.cumsum([0, *(h * w for h, w in shapes)])
    for b, q, m, level, p in itertools.product(*map(range, (batch, queries, heads, levels, points))):
        height, width = shapes[level]
        u = locations[b, q, m, level, p, 0] * width - 0.5
        v = locations[b, q, m, level, p, 1] * height - 0.5
        for row, column in itertools.product((math.floor(v), math.floor(v) + 1), (math.floor(u), math.floor(u) + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(v - row)) * (1 - abs(u - column)) * weights[b, q, m, level, p]
                out[b, q, m] += share * value[b, starts[level] + row * width + column, m]
    return torch.from_numpy(out).flatten(2)


def gradients(form, shapes, tensors, grad):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    value, locations, weights = tensors
    out = ms_deform_attn(value, shapes, locations, weights, form)
    return out.detach(), torch.autograd.grad(out, tensors, grad)


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_reference_outputs_and_gradients(form):
    with np.load(GOLDEN) as file:
        expected = {key: file[key] for key in file.files}
    names = ("value", "sampling_locations", "attention_weights")
    tensors = [torch.tensor(expected[name], dtype=torch.float32) for name in names]
    shapes = [tuple(shape) for shape in expected["spatial_shapes"].tolist()]
    out, grads = gradients(form, shapes, tensors, torch.tensor(expected["grad_output"]))
    assert relative(out, expected["output"]) < 1e-4
    for name, grad in zip(names, grads, strict=True):
        assert relative(grad, expected[f"grad_{name}"]) < 1e-4


def relative(ours, expected):
    return float(np.linalg.norm(ours.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("form", TORCH_FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop(form, layout):
    value, locations, weights = inputs(*layout)
    torch.testing.assert_close(
        ms_deform_attn(value, layout[0], locations, weights, form), loop(value, layout[0], locations, weights)
    )


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_samples_on_and_beyond_the_border(form):
    """u and v exactly on −1, 0, size − 1 and size, and far outside."""
    height, width = 3, 4
    value = torch.randn(1, height * width, 1, 2, dtype=torch.float64)
    u, v = torch.meshgrid(
        torch.tensor([-1e9, -1.0, 0.0, width - 1.0, width, 1e9], dtype=torch.float64),
        torch.tensor([-7.0, -1.0, 0.0, height - 1.0, height, 1e9], dtype=torch.float64),
        indexing="ij",
    )
    locations = torch.stack([(u + 0.5) / width, (v + 0.5) / height], -1).view(1, 36, 1, 1, 1, 2)
    weights = torch.ones(1, 36, 1, 1, 1, dtype=torch.float64)
    ours = ms_deform_attn(value, [(height, width)], locations, weights, form)
    torch.testing.assert_close(ours, loop(value, [(height, width)], locations, weights))


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_numeric_gradients(form):
    tensors = inputs(channels=2, points=2, queries=3)
    assert torch.autograd.gradcheck(lambda *t: ms_deform_attn(t[0], SHAPES, t[1], t[2], form), tensors)


@pytest.mark.parametrize("form", TORCH_FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype, form):
    value, locations, weights = (t.detach() for t in inputs(heads=1, channels=4))
    value, weights = value.to(dtype), weights.to(dtype)
    locations = locations.float()
    out, grads = gradients(form, SHAPES, (value, locations, weights), torch.ones(2, 4, 4, dtype=dtype))
    exact, exact_grads = gradients(form, SHAPES, (value.float(), locations, weights.float()), torch.ones(2, 4, 4))
    assert out.dtype == dtype and [g.dtype for g in grads] == [dtype, torch.float32, dtype]
    torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=0)  # rounded once
    torch.testing.assert_close(grads[0], exact_grads[0].to(dtype), rtol=0, atol=0)


def test_locations_that_are_not_numbers_do_not_crash():
    value, locations, weights = (t.detach() for t in inputs(dtype=torch.float32))
    locations[0, 0] = float("nan")
    out = ms_deform_attn(value, SHAPES, locations, weights, "embedding_bag")
    assert out[0, 0].isnan().any() and out[1].isfinite().all()


def test_operator_is_sound():
    """Schema, fake tensors and autograd registration, which torch.compile relies on."""
    value, locations, weights = inputs(dtype=torch.float32)
    sizes = [side for shape in SHAPES for side in shape]
    torch.library.opcheck(
        deform_attn._fused,
        (value, sizes, locations, weights, "embedding_bag"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("form", [None, "grid_sample"])
def test_compiles_in_one_graph(form):
    """With the trace's own backward; no code is generated, so it needs no compiler."""
    tensors = inputs(dtype=torch.float32)

    def function(value, locations, weights):
        return ms_deform_attn(2 * value, SHAPES, locations, weights, form).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*tensors), tensors)
    for ours, theirs in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_meta_device():
    value, locations, weights = (t.detach().to("meta") for t in inputs())
    for form in (None, *TORCH_FORMS):
        assert ms_deform_attn(value, SHAPES, locations, weights, form).shape == (2, 4, 10)


def test_shapes_that_do_not_fit_are_refused():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="18 positions"):
        ms_deform_attn(value, [(3, 4)], locations, weights)
    with pytest.raises(ValueError, match="do not fit"):
        ms_deform_attn(value, SHAPES, locations, weights[:, :, :1])
    with pytest.raises(ValueError, match="no form 'cuda'"):
        ms_deform_attn(value, SHAPES, locations, weights, "cuda")


def test_dispatch_says_once_what_runs(monkeypatch, caplog):
    deform_attn._choose.cache_clear()
    with caplog.at_level("INFO"):
        assert choose_form("cpu") == choose_form("cpu") == "embedding_bag"
    assert len(caplog.records) == 1
    assert choose_form("cuda", deterministic=True) == "embedding_bag"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="on cuda: grid_sample, slow and large .Triton") as warned:
        assert choose_form("cuda") == choose_form("cuda") == "grid_sample"
    assert len(warned) == 1 and triton_missing() is not None
    deform_attn._choose.cache_clear()


def test_triton_needs_pythons_headers(tmp_path, monkeypatch):
    """Its first launch compiles a module of Python; Debian's own scheme is that of the system to it."""
    asked = []
    monkeypatch.setattr(deform_attn, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(deform_attn.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(
        deform_attn.sysconfig, "get_paths", lambda scheme: asked.append(scheme) or {"include": str(tmp_path)}
    )
    assert triton_missing() == f"Triton finds no Python.h in {tmp_path} (Debian: python3-dev)"
    (tmp_path / "Python.h").touch()
    assert triton_missing() is None and set(asked) == {"posix_prefix"}


needs_triton = pytest.mark.skipif(deform_attn.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_triton_kernels_under_the_interpreter():
    run_interpreted(__name__, "check_triton")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernels_on_the_gpu():
    check_triton("cuda")


def check_triton(device):
    """Forward and gradients against the definition in float64."""
    precisions = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)]
    cases = [(layout, precisions[1]) for layout in LAYOUTS[1:]] + [(LAYOUTS[0], precision) for precision in precisions]
    for layout, (dtype, tolerance) in cases:
        tensors = [t.detach().to(device) for t in inputs(*layout, queries=3)]
        grad = torch.randn(2, 3, layout[1] * layout[2], dtype=torch.float64, device=device)
        exact, exact_grads = gradients("grid_sample", layout[0], tensors, grad)
        wide = torch.promote_types(dtype, torch.float32)
        value, locations, weights = tensors[0].to(dtype), tensors[1].to(wide), tensors[2].to(dtype)
        out, grads = gradients("triton", layout[0], (value, locations, weights), grad.to(dtype))
        assert out.dtype == dtype
        for ours, theirs in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm(), (layout, dtype)
    check_dispatch(device)


def check_dispatch(device):
    """Compiled or not the same kernels run, with gradients of the first order alone."""
    value, locations, weights = (t.to(device) for t in inputs(dtype=torch.float32))
    sizes = [side for shape in SHAPES for side in shape]
    out = ms_deform_attn(value, SHAPES, locations, weights, "triton")
    assert torch.equal(out, deform_attn._fused(value, sizes, locations, weights, "triton"))

    strided = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(out, ms_deform_attn(strided, SHAPES, locations, weights, "triton"))

    first = torch.autograd.grad(out.square().sum(), value, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
