"""Labels of a query network: the definition against a loop over pixels, the kernel against the definition."""

import math

import pytest
import torch

from common.models.mask2former import model as mask2former
from common.models.mask2former.model import Mask2Former
from common.ops import query_labels as module
from common.ops.deform_attn import triton_missing
from common.ops.query_labels import query_labels
from tests.interpreter import run_interpreted

# images, classes, queries, masks, padded input, its part without padding, image: enlarged, resized again, made smaller,
# more classes and queries than a block holds, a mask of one cell
LAYOUTS = [
    (2, 3, 5, (3, 4), (6, 8), (5, 7), (5, 7)),
    (1, 19, 7, (2, 3), (8, 12), (7, 10), (9, 13)),
    (1, 4, 6, (4, 5), (8, 10), (8, 9), (3, 4)),
    (1, 70, 40, (2, 2), (4, 4), (4, 3), (4, 3)),
    (1, 2, 3, (1, 1), (2, 34), (2, 33), (2, 33)),
]


def example(batch, classes, queries, small, dtype=torch.float64):
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(batch, classes + 1, queries, generator=generator, dtype=torch.float64)
    masks = 4 * torch.randn(batch, queries, *small, generator=generator, dtype=torch.float64)
    return logits.softmax(1)[:, :-1].to(dtype), masks.to(dtype)


def bilinear(m, large, y, x):
    """A map's value at a pixel of its enlargement, without aligned corners."""
    taps = []
    for place, cells, pixels in ((y, len(m), large[0]), (x, len(m[0]), large[1])):
        source = min(max((place + 0.5) * cells / pixels - 0.5, 0.0), cells - 1.0)
        low = int(source)
        taps.append((low, min(low + 1, cells - 1), source - low))
    (top, bottom, down), (left, right, across) = taps
    upper = (1 - across) * m[top][left] + across * m[top][right]
    return (1 - down) * upper + down * ((1 - across) * m[bottom][left] + across * m[bottom][right])


@pytest.mark.parametrize("batch, classes, queries, small, padded, inner, size", LAYOUTS[:3])
def test_definition(batch, classes, queries, small, padded, inner, size):
    probability, masks = example(batch, classes, queries, small)
    label, confidence = query_labels(probability, masks, padded, inner, size)
    for b in range(batch):
        shown = []
        for m in masks[b].tolist():
            rows = [[bilinear(m, padded, y, x) for x in range(inner[1])] for y in range(inner[0])]
            shown.append([[1 / (1 + math.exp(-z)) for z in row] for row in rows])
        for y in range(size[0]):
            for x in range(size[1]):
                present = torch.tensor([bilinear(m, size, y, x) for m in shown], dtype=torch.float64)
                scores = probability[b] @ present
                assert label[b, y, x] == scores.argmax()
                assert confidence[b, y, x] == pytest.approx((scores.max() / scores.sum()).item())


def test_shapes_that_do_not_fit():
    probability, masks = example(1, 3, 4, (2, 2))
    with pytest.raises(ValueError, match=r"probability \(1, 3, 3\) and masks \(1, 4, 2, 2\): \(B, K, Q\)"):
        query_labels(probability[..., :3], masks, (4, 4), (4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"inner \(5, 4\) is larger than padded \(4, 4\)"):
        query_labels(probability, masks, (4, 4), (5, 4), (5, 4))


# The kernel ---------------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(triton_missing() is not None, reason="Triton cannot run")


@needs_triton
def test_kernel_under_the_interpreter():
    run_interpreted(__name__, "check_kernel")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_on_the_gpu():
    check_kernel("cuda")


def check_kernel(device):
    check_values(device)
    check_care(device)
    check_model(device)


def check_values(device):
    """Against the definition in float64; these examples hold no ties."""
    for batch, classes, queries, small, *sizes in LAYOUTS:
        probability, masks = (t.to(device) for t in example(batch, classes, queries, small))
        label, confidence = query_labels(probability.float(), masks.float(), *sizes, form="triton")
        best, expected = query_labels(probability, masks, *sizes, form="torch")
        assert torch.equal(label, best)
        torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-6)


def check_care(device):
    """Half precision is summed in float32; any strides; the operator is registered as torch.compile needs it."""
    sizes = ((6, 8), (5, 7), (9, 4))
    probability, masks = (t.to(device) for t in example(2, 3, 5, (3, 4), torch.float32))
    half = query_labels(probability, masks.bfloat16(), *sizes, form="triton")
    wide = query_labels(probability, masks.bfloat16().float(), *sizes, form="triton")
    assert all(map(torch.equal, half, wide))

    strided = probability.transpose(1, 2).contiguous().transpose(1, 2)
    last = masks.contiguous(memory_format=torch.channels_last)
    plain = query_labels(probability, masks, *sizes, form="triton")
    assert all(map(torch.equal, plain, query_labels(strided, last, *sizes, form="triton")))

    arguments = (probability, masks, *map(list, sizes))
    torch.library.opcheck(module._fused, arguments, test_utils=("test_schema", "test_faketensor"))


class Given(Mask2Former):
    """A network whose queries are given."""

    def __init__(self, out, classes):
        torch.nn.Module.__init__(self)
        self.out, self.num_classes, self.align_corners, self.divisor = out, classes, False, 8

    def infer(self, images):
        return self.out


def check_model(device):
    """A network's labels and confidence are those of its bands of scores, at its own size and at another one."""
    probability, masks = (t.to(device) for t in example(2, 4, 6, (2, 4), torch.float32))
    model = Given({"probability": probability, "pred_masks": masks}, 4)
    images, offsets = torch.zeros(2, 3, 7, 14, device=device), torch.tensor([0.0, 1.0, 0.0, -1.0])
    choose = mask2former.choose_form
    for size in (None, (9, 11)):
        found = []
        for form in ("torch", "triton"):
            mask2former.choose_form = module.choose_form = lambda masks, form=form: form
            found.append(model.labels(images, size, offsets))
        mask2former.choose_form = module.choose_form = choose
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1])
