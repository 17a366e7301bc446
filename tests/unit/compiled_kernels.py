"""Compile the Triton kernels for a GPU that need not be there, and tell what each takes of it: `python -m … NAME …`.

What starts the kernels is called with tensors of the meta device; the driver only names a target, and nothing is
launched. So signatures, constants and options are those of training.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from common.ops import deform_attn_triton as attention
from common.ops import query_labels_triton as queries
from common.ops import upsampled_loss_triton as loss
from common.ops.counter_noise import Law, Limit, Noise

H200 = GPUTarget("cuda", 90, 32)
PLAIN = Noise("", "", 0.0)  # type: ignore[arg-type]
GAUSSIAN = Noise("gaussian", "positive", 6.0, 0.467)
LEVELS = ((16, 16), (32, 32), (64, 64))


class Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return H200

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def start_loss(
    classes: int = 19,
    small: tuple[int, int] = (128, 256),
    large: tuple[int, int] = (512, 1024),
    dtype: torch.dtype = torch.bfloat16,
    noise: Noise = PLAIN,
    weights: bool = False,
    label: torch.dtype = torch.int64,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    logits = meta(8, classes, *small, dtype=dtype).contiguous(memory_format=layout)
    pixels = loss.Pixels(
        meta(8, *large, dtype=label),
        meta(classes) if noise.law or weights else None,
        meta(classes) if weights else None,
        meta(8, *large) if weights else None,
        meta(1, dtype=torch.int64) if noise.law else None,
    )
    _, log_sums = loss.forward(logits, pixels, noise, align_corners=False)
    loss.backward(meta(), log_sums, logits, pixels, noise, align_corners=False)
    loss.labels(logits, large, large, align_corners=False)


def start_attention(dtype: torch.dtype, locations: torch.dtype) -> None:
    rows = sum(h * w for h, w in LEVELS)
    value = meta(16, rows, 8, 32, dtype=dtype)
    places = meta(16, rows, 8, 3, 4, 2, dtype=locations)
    weights = meta(16, rows, 8, 3, 4, dtype=dtype)

    out = attention.forward(value, LEVELS, places, weights)
    attention.backward(out, value, LEVELS, places, weights)


def start_queries(
    number: int = 100, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (512, 683), classes: int = 847
) -> None:
    probability, masks = meta(1, classes, number), meta(1, number, 128, 176, dtype=dtype)
    queries.labels(probability, masks, (512, 704), (512, 683), size)


NOISES: tuple[tuple[Law, Limit], ...] = (
    ("gaussian", "folded"), ("uniform", "none"), ("beta", "signed"), ("exponential", "positive")
)  # fmt: skip
CASES: dict[str, Callable[[], None]] = {
    "BLV": partial(start_loss, noise=GAUSSIAN),
    "all weights": partial(
        start_loss, 847, (64, 64), (512, 512), torch.float16, weights=True,
        label=torch.int16, layout=torch.channels_last,
    ),
    "stride 32": partial(start_loss, 150, (16, 16), (512, 512), torch.float32, GAUSSIAN),
    "stride 64": partial(start_loss, 150, (8, 8), (512, 512), torch.float32, GAUSSIAN),
    "stride 1": partial(start_loss, 21, (321, 321), (321, 321), torch.float32),
    "attention": partial(start_attention, torch.bfloat16, torch.bfloat16),
    "attention, exact places": partial(start_attention, torch.bfloat16, torch.float32),
    "attention, float32": partial(start_attention, torch.float32, torch.float32),
    "attention, float64": partial(start_attention, torch.float64, torch.float64),
    "queries": start_queries,
    "queries, another size": partial(start_queries, dtype=torch.bfloat16, size=(480, 640)),
    "queries, many": partial(start_queries, 300, size=(480, 640), classes=19),
    **{law: partial(start_loss, noise=Noise(law, limit, 1.0)) for law, limit in NOISES},
}  # fmt: skip


def compiled(names: list[str]) -> Iterator[dict]:
    """Of each kernel of each case: what a program takes of a multiprocessor."""
    started = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments, grid, warmup: bool, **options) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        started.append((self.__name__, kernel))

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    for name in names:
        CASES[name]()
        for kernel_name, kernel in started:
            yield {"case": name, "kernel": kernel_name, **resources(kernel)}
        started.clear()


def resources(kernel) -> dict[str, int]:
    """Threads of a program; registers and bytes of stack (where registers do not suffice) of a thread; shared bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    registers, stack, shared = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", said).groups())
    shared += kernel.metadata.shared
    return {"threads": 32 * kernel.metadata.num_warps, "registers": registers, "stack": stack, "shared": shared}


if __name__ == "__main__":
    for row in compiled(sys.argv[1:]):
        print(json.dumps(row), flush=True)
