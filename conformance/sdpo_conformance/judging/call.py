"""Calling an implementation on a case and taking down what it did: results, gradients, touched inputs.

Whatever the implementation raises becomes ``ImplementationError``: a verdict, never a crash of the harness.
"""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
from torch import Tensor

from sdpo_conformance.cases.case import Case, divergence_incoming
from sdpo_conformance.judging.places import innermost_of_user
from sdpo_conformance.judging.settings import settings_restored
from sdpo_conformance.protocol import Capability


class ImplementationError(Exception):
    """The implementation did not deliver: it raised, or what it returned cannot be read.

    ``summary`` is one line; ``details`` the innermost frames of its traceback, or empty;
    ``where``: file and line of the implementation's innermost frame;
    ``device_lost``: no further call can succeed in this process. ``case``: the input it happened on.
    ``probe``: what shows it again, of the probes of a reproduction. ``extra``: as a disagreement's.
    ``kind``: the type of what it raised, or None.
    """

    probe = "raises"

    def __init__(self, summary: str, details: str = "", device_lost: bool = False, where: str = "") -> None:
        super().__init__(summary)
        self.case: Case | None = None
        self.extra: dict[str, Any] = {}
        self.summary = summary
        self.details = details
        self.device_lost = device_lost
        self.where = where
        self.kind: type[BaseException] | None = None


class NotReported(ImplementationError):
    """The result lacks a key."""


@dataclass
class Watchdog:
    """Ends the process when one call lasts longer than ``seconds``, leaving a traceback in ``log``.

    Setting the timer starts a thread and stopping it waits for one, which takes longer than most calls. So a timer of a
    quarter more than the limit stays set from one short call to the next, and is set anew once the quarter is over.
    """

    seconds: float = 0.0
    log: IO[str] | None = None
    _set_at: float | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self.seconds or self.log is None:
            yield
            return
        begin = time.monotonic()
        if self._set_at is None or begin - self._set_at > self.seconds / 4:
            faulthandler.dump_traceback_later(1.25 * self.seconds, exit=True, file=self.log)
            self._set_at = begin
        try:
            yield
        finally:
            if self.seconds < LONG_LIMIT or time.monotonic() - begin > SHORT_CALL:
                self.rest()

    def rest(self) -> None:
        """Stop the timer: what follows is no call of the implementation's."""
        if self._set_at is not None:
            faulthandler.cancel_dump_traceback_later()
            self._set_at = None


SHORT_CALL = 0.01
"""Seconds of a call after which stopping the timer costs nothing beside it."""

LONG_LIMIT = 20.0
"""Seconds of a limit below which the timer is stopped after every call: between two of them the suite itself may take
as long."""


WATCHDOG = Watchdog()
"""The process's watchdog; off unless the plugin arms it."""


@contextmanager
def implementation_errors(doing: str) -> Iterator[None]:
    """Turn whatever user code raises, sys.exit included, into ``ImplementationError``; the current folder is as before,
    for the suite writes by relative paths."""
    folder = os.getcwd()
    try:
        with WATCHDOG.watching():
            yield
    except ImplementationError:
        raise
    except BaseException as error:
        from_terminal = isinstance(error, KeyboardInterrupt) and WATCHDOG.log is None  # a run's own process has none
        if from_terminal or type(error).__module__.startswith("hypothesis"):
            raise
        text = " ".join(str(error).split()) or "no message"
        kind = "called sys.exit" if isinstance(error, SystemExit) else f"raised {type(error).__name__}"
        frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[-3:])
        lost = "CUDA error" in text or type(error).__name__ == "AcceleratorError"
        where = innermost_of_user(error.__traceback__)
        raised = ImplementationError(f"{doing} {kind}: {text[:300]}", "".join(frames), lost, where)
        raised.kind = type(error)
        raise raised from None
    finally:
        os.chdir(folder)


@contextmanager
def settings_kept(doing: str) -> Iterator[None]:
    """Torch's settings, such as the grad mode, are restored; raises ImplementationError where that was needed."""
    changed: list[str] = []
    with settings_restored(changed):
        yield
    if changed:
        raise ImplementationError(f"{doing} changed torch's settings: {', '.join(changed)} after the call")


@dataclass(frozen=True)
class Outcome:
    """What one call did. ``result``: the mapping returned (or the (B, T) divergence under "divergence").
    ``gradients`` by field, float64 on the CPU; None where none arrived. ``touched``: inputs it modified."""

    result: Mapping[str, Any]
    gradients: Mapping[str, Tensor | None]
    touched: tuple[str, ...] = ()

    def number(self, key: str) -> Tensor:
        """A result as a float64 CPU tensor; raises NotReported where it is missing, ImplementationError where it
        is no number."""
        if key not in self.result:
            raise NotReported(f"the result has no {key!r}; it has {sorted(map(str, self.result))}")
        value = self.result[key]
        if isinstance(value, Tensor):
            if value.is_complex():
                raise ImplementationError(f"{key} is complex")
            return value.detach().to(device="cpu", dtype=torch.float64)
        try:
            return torch.tensor(float(value), dtype=torch.float64)
        except (TypeError, ValueError):
            raise ImplementationError(f"{key} is no number but a {type(value).__name__}") from None


def lay_out(tensor: Tensor, layout: str, key: str) -> Tensor:
    """The same values in another memory layout: a view that is not contiguous, or does not start at 0."""
    if layout.startswith("odd:"):
        layout = "transposed" if layout == f"odd:{key}" else "contiguous"
    if tensor.dim() < 2:
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "offset":
        taller = torch.cat([tensor[:1], tensor], dim=0).contiguous() if tensor.shape[0] else tensor
        return taller[1:] if tensor.shape[0] else tensor
    if layout == "sliced" and tensor.shape[1]:
        return torch.cat([tensor[:, :1], tensor, tensor[:, -1:]], dim=1)[:, 1:-1]
    if layout == "expanded" and tensor.shape[0] > 1 and all(tensor[0].equal(row) for row in tensor[1:]):
        return tensor[:1].contiguous().expand_as(tensor)
    return tensor


def materialise(case: Case, device: str, requires_grad: bool = True) -> Any:
    """The case's input on ``device`` in its layout, fresh tensors, the differentiable fields asking for
    gradients."""
    fields: dict[str, Any] = {}
    for key, tensor in case.tensors().items():
        fresh = lay_out(tensor.detach().clone().to(device), case.layout, key)
        if requires_grad and key in case.differentiable:
            fresh = fresh.detach().requires_grad_()
        fields[key] = fresh
    return replace(case.loss_input, **fields)


def as_mapping(returned: Any) -> Mapping[str, Any]:
    """The result mapping of a loss entry."""
    if not isinstance(returned, Mapping):
        raise ImplementationError(
            f"returned a {type(returned).__name__}, expected a mapping with loss, distill_loss, kl_reg, "
            "mean_is_ratio and clip_fraction"
        )
    return returned


def call_entry(function: Callable[..., Any], entry: Capability, loss_input: Any) -> Mapping[str, Any]:
    """Call a loss or divergence entry; the divergence comes back under "divergence". Raises ImplementationError
    where torch's settings are not as before."""
    with implementation_errors(f"{entry.value}"), settings_kept(f"{entry.value}"):
        if entry is Capability.DIVERGENCE:
            returned = function(
                loss_input.student_hidden,
                loss_input.lm_head_weight,
                loss_input.teacher_logprobs,
                loss_input.teacher_indices,
                loss_input.training.alpha,
            )
        else:
            returned = function(loss_input)
    if entry is not Capability.DIVERGENCE:
        return as_mapping(returned)
    if not isinstance(returned, Tensor):
        raise ImplementationError(f"returned a {type(returned).__name__}, expected a (B, T) tensor")
    expected = tuple(loss_input.student_hidden.shape[:2])
    if tuple(returned.shape) != expected:
        raise ImplementationError(f"returned shape {tuple(returned.shape)}, expected (B, T) = {expected}")
    return {"divergence": returned}


def differentiable_output(result: Mapping[str, Any], entry: Capability) -> Tensor:
    """The tensor whose gradient is asked for; raises ImplementationError where it carries no graph."""
    key = "divergence" if entry is Capability.DIVERGENCE else "loss"
    output = result.get(key)
    if not isinstance(output, Tensor):
        raise ImplementationError(f"{key} is a {type(output).__name__}, expected a tensor to differentiate")
    if entry is not Capability.DIVERGENCE and output.dim() != 0:
        raise ImplementationError(f"loss has shape {tuple(output.shape)}, expected 0-dim")
    if not output.requires_grad:
        raise ImplementationError(f"{key} carries no graph although the student asks for a gradient")
    return output


def incoming_gradient(case: Case, entry: Capability, output: Tensor) -> Tensor:
    """The gradient that the harness sends into ``output``."""
    if entry is Capability.DIVERGENCE:
        return divergence_incoming(case).to(output)
    return torch.full_like(output, case.incoming)


def gradients_of(loss_input: Any, case: Case, entry: Capability, output: Tensor) -> dict[str, Tensor | None]:
    """Backward through one output; gradients by field as float64 on the CPU."""
    leaves = [getattr(loss_input, key) for key in case.differentiable]
    with implementation_errors("backward"), settings_kept("backward"):
        found = torch.autograd.grad(output, leaves, incoming_gradient(case, entry, output), allow_unused=True)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
    gradients: dict[str, Tensor | None] = {}
    for key, leaf, gradient in zip(case.differentiable, leaves, found, strict=True):
        if gradient is not None and gradient.shape != leaf.shape:
            raise ImplementationError(
                f"the gradient to {key} has shape {tuple(gradient.shape)}, not {tuple(leaf.shape)}"
            )
        gradients[key] = None if gradient is None else gradient.detach().to("cpu", torch.float64)
    return gradients


def identical(one: Tensor, other: Tensor) -> bool:
    """The same values everywhere, infinities among them, NaN equal to NaN; shapes must agree."""
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def touched_inputs(case: Case, loss_input: Any, asked: bool = True) -> tuple[str, ...]:
    """The inputs whose values differ from the case's (NaN equal to NaN), or that ask for a gradient as they did not
    before, or no longer. ``asked``: whether the differentiable ones were handed over asking for one."""
    touched = []
    for key, before in case.tensors().items():
        after = getattr(loss_input, key)
        same = (
            isinstance(after, Tensor)
            and after.shape == before.shape
            and after.dtype == before.dtype
            and after.requires_grad == (asked and key in case.differentiable)
            and identical(after.detach().cpu(), before)
        )
        if not same:
            touched.append(key)
    return tuple(touched)


def evaluate(
    function: Callable[..., Any],
    entry: Capability,
    case: Case,
    device: str = "cpu",
    gradient: bool = True,
) -> Outcome:
    """One forward and, unless ``gradient`` is off, one backward on fresh tensors."""
    loss_input = materialise(case, device, requires_grad=gradient)
    result = call_entry(function, entry, loss_input)
    gradients: dict[str, Tensor | None] = {}
    if gradient:
        gradients = gradients_of(loss_input, case, entry, differentiable_output(result, entry))
    with implementation_errors(entry.value):
        frozen = {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in result.items()}
        touched = touched_inputs(case, loss_input, gradient)
    return Outcome(frozen, gradients, touched)


def is_fused_entry(entry: Capability) -> bool:
    """Whether an entry takes hidden states."""
    return entry in (Capability.FUSED, Capability.DIVERGENCE)
