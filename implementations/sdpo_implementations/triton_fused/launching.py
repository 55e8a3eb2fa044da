"""Launching a kernel again without Triton's own look at its arguments.

At every launch Triton asks of each argument what it specialises kernels on, and makes a key of the answers in Python.
That takes longer than many of these kernels run, and until the first large one has started the GPU waits for it. Here
the key is made of what can differ between two calls, and a form that has been launched before is launched directly.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.runtime import INTERPRETED, TRITON_VERSION

import triton  # isort: skip

INT32 = range(-(2**31), 2**31)


class RepeatedLaunch:
    """A kernel of Triton's whose launches are remembered: ``kernel[grid](*arguments, **constants)`` as before.

    Its constexpr parameters come last, and are given by name. A tensor descriptor has the layout that follows from its
    dtype and block.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._launches: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        constant = [parameter.is_constexpr for parameter in kernel.params]
        if constant != sorted(constant):
            raise TypeError(f"{kernel.__name__}: constexpr parameters must come after the others")
        self._constants = tuple(parameter.name for parameter in kernel.params if parameter.is_constexpr)
        self._specialised = tuple(
            (not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment)
            for parameter in kernel.params
            if not parameter.is_constexpr
        )

    def __getitem__(self, grid: tuple[int, ...]) -> partial[None]:
        return partial(self._launch, grid)

    def _key(self, device: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
        """At least as fine as what Triton specialises on: a tensor's dtype and 16-byte alignment, an integer."""
        key = [device, *constants.values()]
        for argument, (by_value, by_alignment) in zip(arguments, self._specialised, strict=True):
            kind = type(argument)
            if kind is int:
                key.append(argument if by_value else argument in INT32)
            elif isinstance(argument, Tensor):
                key.append(argument.dtype)
                if by_alignment:
                    key.append(argument.data_ptr() % 16 == 0)
            elif kind is float or kind is bool or argument is None:
                key.append(kind)
            else:
                key.append((argument.base.dtype, *argument.block_shape))
        return tuple(key)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = torch.cuda.current_device()
        key = self._key(device, arguments, constants)
        launch = self._launches.get(key)
        if launch is None or triton.knobs.runtime.launch_enter_hook.calls:
            compiled = self.kernel[grid](*arguments, **constants)
            values = tuple(constants[name] for name in self._constants)
            self._launches[key] = (compiled.run, compiled.function, compiled.packed_metadata, values)
        else:
            run, function, metadata, values = launch
            stream = triton.runtime.driver.active.get_current_stream(device)
            first, second, third = (*grid, 1, 1)[:3]
            run(first, second, third, stream, function, metadata, None, None, None, *arguments, *values)


def repeated(kernel: Any) -> Any:
    """The kernel, its launches remembered where Triton compiles: from 3.5 on a compiled kernel is launched with all of
    its arguments, constants among them."""
    return kernel if INTERPRETED or TRITON_VERSION < (3, 5) else RepeatedLaunch(kernel)
