"""One rank: a process that holds the implementation, its place in the mesh, and answers one call at a time.

Whatever user code does here stays here: what it raises becomes a ``Fault``, a stack is written to the rank's log
when the judge asks for one, and the process ends when the judge's does.
"""

from __future__ import annotations

import faulthandler
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from sdpo_conformance.judging.implementation import LoadingError, load_implementation
from sdpo_conformance.judging.places import innermost_of_user, place
from sdpo_conformance.protocol import (
    METRIC_KEYS,
    Capability,
    Claims,
    ShardedFusedSDPOLossInput,
    ShardedSDPOLossInput,
)
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.part import HEAD, LOGITS, Part
from sdpo_conformance.specs import find_spec


@dataclass(frozen=True)
class Setting:
    """What a rank is started with. ``rendezvous``: a file that the ranks meet at; ``collective_seconds``: how long one
    collective may take; ``spec``: the name of the one that is judged by."""

    target: str
    mesh: MeshShape
    device: str
    backend: str
    rendezvous: str
    collective_seconds: float
    log: str
    search_path: tuple[str, ...]
    spec: str


@dataclass(frozen=True)
class Request:
    """One call of ``entry`` on this rank's ``part``. ``backward``: how many backward passes. ``before``: another part,
    whose graph is made first, is alive through the call, and is differentiated last.
    ``target``: another implementation than the pool's. ``k`` for the teacher's top-k;
    ``grad_mode``: "enabled", "no_grad" or "inference"."""

    entry: str
    part: Part
    backward: int = 1
    k: int = 0
    grad_mode: str = "enabled"
    before: Part | None = None
    target: str = ""


@dataclass(frozen=True)
class Answer:
    """``result`` float64 on the CPU (or, where it is no number, its type's name); ``problems``: keys and types that are
    not the protocol's; ``gradients``, one set per backward pass."""

    result: Mapping[str, Tensor | str]
    gradients: tuple[Mapping[str, Tensor | None], ...] = ()
    touched: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """The implementation raised. ``collective`` where it stood, or empty; ``where``: the user's file and line."""

    kind: str
    text: str
    stack: str
    collective: str
    device_lost: bool = False
    where: str = ""


@dataclass(frozen=True)
class Ready:
    """What the rank found when it loaded the implementation, or why it could not. ``places``: entry to file:line."""

    offered: tuple[str, ...] = ()
    claims: Claims = field(default_factory=Claims)
    error: str = ""
    places: Mapping[str, str] = field(default_factory=dict)


def main(connection: Connection, setting: Setting, rank: int) -> None:
    """The body of a rank process."""
    try:
        log = open(setting.log, "w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)
    except FileNotFoundError:  # the judge has ended meanwhile, and taken its folder along
        os._exit(1)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    silence(log)
    sys.path[:] = list(setting.search_path)
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(connection, setting, rank)
    os._exit(0)


def silence(log: Any) -> None:
    """What user code prints goes to the log."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


def end_with_parent() -> None:
    """A thread that ends this process when the judge's ends, whatever it is doing: no orphan stays."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(connection: Connection, setting: Setting, rank: int) -> None:
    """Join the mesh, load the implementation, then answer until the judge hangs up."""
    device = device_of(setting.device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        setting.backend,
        init_method=f"file://{setting.rendezvous}",
        rank=rank,
        world_size=setting.mesh.ranks,
        timeout=timedelta(seconds=setting.collective_seconds),
    )
    sizes = tuple(size for _, size in setting.mesh.sizes)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=setting.mesh.names)
    spec = find_spec(setting.spec)
    try:
        implementation = load_implementation(setting.target, spec)
    except LoadingError as error:
        send(connection, Ready(error=str(error)))
        return
    offered = tuple(entry.value for entry in implementation.offered if takes_mesh(implementation.object, entry))
    places = {name: place(getattr(implementation.object, name)) for name in offered}
    send(connection, Ready(offered, implementation.claims, places=places))
    while True:
        request: Request = pickle.loads(connection.recv_bytes())
        found = load_implementation(request.target, spec) if request.target else implementation
        send(connection, answered(found.object, found.claims, mesh, device, request))


def takes_mesh(implementation: Any, entry: Capability) -> bool:
    """Whether an entry can be called on a mesh: a loss reads it off its input, the others take it as a keyword."""
    if entry in (Capability.LOSS, Capability.FUSED):
        return True
    return entry is not Capability.DISTILL and "mesh" in accepted(getattr(implementation, entry.value))


def accepted(function: Any) -> set[str]:
    """Which of the mesh's keywords a function takes."""
    keywords = {"mesh", "vocab_start", "vocab_size"}
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return keywords
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keywords
    return keywords & set(parameters)


def device_of(device: str, rank: int) -> torch.device:
    """Each rank its own GPU where there is one; they share where there are too few."""
    if not device.startswith("cuda"):
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def send(connection: Connection, message: Any) -> None:
    """Plain pickling: nothing of it lives in shared memory."""
    connection.send_bytes(pickle.dumps(message))


def answered(implementation: Any, claims: Claims, mesh: Any, device: torch.device, request: Request) -> Answer | Fault:
    """Call, and turn whatever happens into a message."""
    try:
        return answer(implementation, claims, mesh, device, request)
    except BaseException as error:
        text = " ".join(str(error).split()) or "no message"
        kind = "sys.exit" if isinstance(error, SystemExit) else type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)
        stack = "".join(traceback.format_list(frames[-4:]))
        collective = next((f.name for f in frames if is_collective(f.filename, f.name)), "")
        lost = "CUDA error" in text or kind == "AcceleratorError"
        return Fault(kind, text[:400], stack, collective, lost, innermost_of_user(error.__traceback__))


def is_collective(filename: str, name: str) -> bool:
    """Whether a frame is a collective of torch.distributed, as its callers name it."""
    return "torch/distributed" in filename.replace("\\", "/") and (
        name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv", "wait_"))
        or name in ("batch_isend_irecv", "monitored_barrier", "full_tensor", "redistribute", "wait")
    )


def answer(implementation: Any, claims: Claims, mesh: Any, device: torch.device, request: Request) -> Answer:
    """One call, its backward passes, and what it did to its inputs."""
    entry = Capability(request.entry)
    function = getattr(implementation, entry.value)
    tensors = placed(request.part, mesh, device, claims.dtensor, asks=request.grad_mode == "enabled")
    mode = {"enabled": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    kept, earlier = None, {}
    with mode[request.grad_mode]():
        if request.before is not None:
            earlier = placed(request.before, mesh, device, claims.dtensor, asks=True)
            kept = read(entry, called(function, entry, request.before, earlier, mesh, request.k), True)[0]
        returned = called(function, entry, request.part, tensors, mesh, request.k)
    output, result, problems = read(entry, returned, request.grad_mode == "enabled" and request.backward > 0)
    passes = []
    wanted = [(request.part, tensors, output)] * request.backward
    if request.before is not None:
        wanted.append((request.before, earlier, kept))
    for number, (part, leaves, out) in enumerate(wanted):
        if out is None or not out.requires_grad:
            problems = (*problems, "the output carries no graph although the student asks for a gradient")
            break
        found = torch.autograd.grad(
            out,
            [leaves[key] for key in part.differentiable],
            incoming(part, entry, out),
            retain_graph=number + 1 < request.backward,
            allow_unused=True,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        passes.append({key: local(gradient) for key, gradient in zip(part.differentiable, found, strict=True)})
        for key, gradient in passes[-1].items():
            if gradient is not None and gradient.shape != part.tensors[key].shape:
                shape, right = tuple(gradient.shape), tuple(part.tensors[key].shape)
                problems = (*problems, f"the gradient to {key} has shape {shape}, not {right}")
    return Answer(result, tuple(passes), touched(request.part, tensors), problems)


def placed(part: Part, mesh: Any, device: torch.device, as_dtensor: bool, asks: bool) -> dict[str, Any]:
    """Fresh tensors on the device, those that are differentiated asking for a gradient where ``asks``."""
    tensors: dict[str, Any] = {}
    for key, given in part.tensors.items():
        tensor = given.detach().clone().to(device)
        if as_dtensor and "tp" in mesh.mesh_dim_names:
            tensor = distributed(key, tensor, mesh["tp"], part.extent)
        tensors[key] = tensor.detach().requires_grad_() if asks and key in part.differentiable else tensor
    return tensors


def distributed(key: str, tensor: Tensor, mesh: Any, extent: int) -> DTensor:
    """A DTensor over tp: cut along the vocabulary, padding included, or the same on every rank."""
    if key not in (LOGITS, HEAD):
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    dim = tensor.dim() - 1 if key == LOGITS else 0
    shape = list(tensor.shape)
    shape[dim] = extent
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )  # fmt: skip


def called(function: Any, entry: Capability, part: Part, tensors: Mapping[str, Any], mesh: Any, k: int) -> Any:
    """The implementation's own function on its rank's input."""
    place = {"mesh": mesh, "vocab_start": part.vocab_start, "vocab_size": part.vocab_size}
    if entry is Capability.LOSS:
        return function(ShardedSDPOLossInput(training=part.training, **place, **tensors))
    if entry is Capability.FUSED:
        return function(ShardedFusedSDPOLossInput(training=part.training, **place, **tensors))
    hidden, head = tensors["student_hidden"], tensors["lm_head_weight"]
    place = {key: value for key, value in place.items() if key in accepted(function)}
    if entry is Capability.DIVERGENCE:
        support = (tensors["teacher_logprobs"], tensors["teacher_indices"])
        return function(hidden, head, *support, part.training.alpha, **place)
    if entry is Capability.RESPONSE_LOGPROBS:
        return function(hidden, head, tensors["response_ids"], **place)
    return function(hidden, head, k, **place)


def incoming(part: Part, entry: Capability, output: Tensor) -> Tensor:
    """The gradient that arrives: one number at a loss, one per token at a divergence; the same on every rank of tp."""
    one = torch.full(tuple(output.shape), part.incoming, device=output.device, dtype=output.dtype)
    arriving = part.tensors["incoming"].to(one) if entry is Capability.DIVERGENCE else one
    if isinstance(output, DTensor):
        return DTensor.from_local(
            arriving, output.device_mesh, [Replicate()] * output.device_mesh.ndim, run_check=False
        )
    return arriving


def read(
    entry: Capability, returned: Any, differentiated: bool
) -> tuple[Any, dict[str, Tensor | str], tuple[str, ...]]:
    """(what to differentiate, the results as numbers, what is wrong with keys and types)."""
    if entry is Capability.TEACHER_TOPK:
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            return None, {}, (f"returned a {type(returned).__name__}, expected (logprobs, indices)",)
        found: dict[str, Tensor | str] = {"logprobs": as_number(returned[0]), "indices": as_number(returned[1])}
        return None, found, with_graph(returned[0])
    if entry in (Capability.DIVERGENCE, Capability.RESPONSE_LOGPROBS):
        if not isinstance(returned, Tensor):
            return None, {}, (f"returned a {type(returned).__name__}, expected a (B, T) tensor",)
        problems = () if entry is Capability.DIVERGENCE else with_graph(returned)
        return returned, {"divergence": as_number(returned)}, problems
    if not isinstance(returned, Mapping):
        return None, {}, (f"returned a {type(returned).__name__}, expected a mapping with loss and the metrics",)
    missing = [f"the result has no {key!r}" for key in ("loss", *METRIC_KEYS) if key not in returned]
    loss = returned.get("loss")
    if differentiated and not isinstance(loss, Tensor):
        missing.append(f"loss is a {type(loss).__name__}, expected a tensor to differentiate")
        loss = None
    elif isinstance(loss, Tensor) and loss.dim() != 0:
        missing.append(f"loss has shape {tuple(loss.shape)}, expected 0-dim")
        loss = None
    for key in METRIC_KEYS:
        value = returned.get(key)
        if isinstance(value, Tensor) and (value.dim() != 0 or value.requires_grad):
            missing.append(f"{key} is a tensor of shape {tuple(value.shape)}, requires_grad {value.requires_grad}")
    return loss, {key: as_number(value) for key, value in returned.items()}, tuple(missing)


def with_graph(logprobs: Any) -> tuple[str, ...]:
    """What is wrong with log-probs that must carry no graph."""
    carries = isinstance(logprobs, Tensor) and logprobs.requires_grad
    return ("the log-probs carry a graph, expected none",) if carries else ()


def as_number(value: Any) -> Tensor | str:
    """float64 on the CPU, or the name of a type that is no number."""
    if isinstance(value, DTensor):
        value = value.full_tensor().detach()
    if isinstance(value, Tensor):
        kept = torch.int64 if not value.is_floating_point() else torch.float64
        return value.detach().to("cpu", kept).clone()
    try:
        return torch.tensor(float(value), dtype=torch.float64)
    except (TypeError, ValueError):
        return type(value).__name__


def local(gradient: Tensor | None) -> Tensor | None:
    """A gradient as this rank holds it, whole where it is replicated."""
    if gradient is None:
        return None
    if isinstance(gradient, DTensor):
        sharded = [placement if placement.is_shard() else Replicate() for placement in gradient.placements]
        gradient = gradient.redistribute(placements=sharded).to_local()
    return gradient.detach().to("cpu", torch.float64).clone()


def touched(part: Part, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Inputs whose values are no longer those handed over."""
    found = []
    for key, before in part.tensors.items():
        after = tensors[key]
        after = after.to_local() if isinstance(after, DTensor) else after
        after = after.detach().cpu()
        same = after.shape == before.shape and after.dtype == before.dtype
        if not same or not torch.equal(torch.nan_to_num(after), torch.nan_to_num(before)):
            found.append(key)
    return tuple(found)
