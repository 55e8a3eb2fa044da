"""Where the kernels run: compiled on a GPU, or in Triton's interpreter on a machine without one.

Import this module before Triton: Triton decides at decoration time whether a kernel is interpreted, by the
environment variable ``TRITON_INTERPRET``. On a machine without CUDA it is set here. Set it to 1 yourself to
run CPU tensors through the interpreter on a machine that has a GPU.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

if TRITON_VERSION < (3, 3):
    raise ImportError(f"triton_fused needs Triton 3.3 or later, found {triton.__version__}: PyTorch 2.7 brings it")


def _interpret_standard_library() -> None:
    """Make ``tl.sum`` and its like interpretable where something imported Triton before this module.

    Triton wrote them with its own decorator, which had then already chosen compilation; nothing else on a
    machine without a GPU can have a use for the compiled ones.
    """
    from triton.runtime.interpreter import InterpretedFunction

    for module in (tl.standard, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


if INTERPRETED and isinstance(tl.sum, JITFunction):
    _interpret_standard_library()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's GPU, whichever is current: Triton launches on the current one.

    The interpreter computes with NumPy, which warns where the kernels mean log 0 and inf - inf.
    """
    if INTERPRETED:
        return np.errstate(all="ignore")
    if tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Fork:
    """A point in the current stream. Kernels launched inside the ``with`` wait for that point alone and run
    beside what was launched since; the current stream waits for them where the block ends.

    What they write must have been allocated before the point.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if not INTERPRETED:
            self._point = torch.cuda.current_stream(device).record_event()

    def __enter__(self) -> None:
        if not INTERPRETED:
            side = _side_stream(self._device)
            side.wait_event(self._point)
            self._main = torch.cuda.current_stream(self._device)
            torch.cuda.set_stream(side)

    def __exit__(self, *exception: object) -> None:
        if not INTERPRETED:
            torch.cuda.set_stream(self._main)
            self._main.wait_stream(_side_stream(self._device))


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors: the size of a persistent grid. A few under the interpreter, which is serial."""
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) for Hopper."""
    return torch.cuda.get_device_capability(device)


@cache
def has_tensor_memory_accelerator(device: torch.device) -> bool:
    """Hopper or later, with a Triton that takes descriptors made on the host."""
    if INTERPRETED or device.type != "cuda" or compute_capability(device)[0] < 9:
        return False
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:
        return False
    return True


def describable(tensor: torch.Tensor) -> bool:
    """Whether a bulk tensor copy can address this matrix: unit inner stride, everything else in 16-byte units."""
    return (
        tensor.stride(1) == 1
        and tensor.data_ptr() % 16 == 0
        and (tensor.stride(0) * tensor.element_size()) % 16 == 0
        and tensor.numel() > 0
    )


def some_rows(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """``tensor[rows]``, for which a view of all rows would cost the host as much as an allocation."""
    return tensor if rows.start == 0 and rows.stop == tensor.shape[0] else tensor[rows]


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels write values of ``dtype`` as.

    The interpreter truncates float32 to bfloat16 where hardware rounds to nearest, so there the kernels
    write float32 and torch does the rounding.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
