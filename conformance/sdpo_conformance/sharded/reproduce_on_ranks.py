"""Shows one failure of an SDPO loss on several ranks: plain PyTorch, no harness.

    python THIS.py                                  starts the ranks itself
    torchrun --nproc-per-node=RANKS THIS.py         uses those of torchrun

The input lies beside this file (.safetensors; each rank's tensors, and what is true of the whole batch).
Exit status: 1 the defect is there, 0 it is not, 125 it could not be run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from dataclasses import make_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from safetensors import safe_open
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
except ImportError as error:
    print(f"could not run: {error}", file=sys.stderr)
    raise SystemExit(125) from None

CASE = Path(__file__).with_suffix(".safetensors")
DEFECT, RIGHT, NOT_RUN = 1, 0, 125


def implementation(where: dict[str, Any]) -> Any:
    """The module or object under test."""
    sys.path[:0] = [path for path in where["search_path"] if path not in sys.path]
    if where["defect"]:
        return importlib.import_module(where["module"]).load(where["defect"])
    if where["file"]:
        spec = importlib.util.spec_from_file_location("implementation", where["file"])
        assert spec is not None
        assert spec.loader is not None
        found: Any = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(where["file"]).parent))
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(where["module"])
    for name in where["attribute"]:
        found = getattr(found, name)
    return found


def on_rank(rank: int, rendezvous: str) -> None:
    """Call the loss on this rank's part, compare, and end with the exit status."""
    os._exit(status_of(rank, rendezvous))


def status_of(rank: int, rendezvous: str) -> int:
    """One of the exit statuses; prints what is wrong."""
    try:
        with safe_open(CASE, framework="pt") as handle:
            facts = json.loads(handle.metadata()["facts"])
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  (no mapping)
        sizes = dict(facts["sizes"])
        kind = "cuda" if facts["device"].startswith("cuda") else "cpu"
        device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        world = 1
        for size in sizes.values():
            world *= size
        start: dict[str, Any] = (
            {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": world} if rendezvous else {}
        )
        dist.init_process_group(facts["backend"], timeout=timedelta(seconds=30), **start)
        mesh = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        function = getattr(implementation(facts["where"]), facts["entry"])
    except (Exception, SystemExit) as error:
        print(f"could not run: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return NOT_RUN
    mine = f"{rank}/"
    fields: dict[str, Any] = {
        key.removeprefix(mine): value.to(device)
        for key, value in tensors.items()
        if key.startswith(mine) and key.count("/") == 1
    }
    arriving = fields.pop("incoming", None)
    if facts["extent"] and "tp" in sizes:
        fields = {key: distributed(key, value, mesh["tp"], facts["extent"]) for key, value in fields.items()}
    for key in facts["differentiable"]:
        fields[key].requires_grad_()
    try:
        returned, output = call(function, facts, fields, mesh, rank)
        gradients = torch.autograd.grad(
            output,
            [fields[key] for key in facts["differentiable"]],
            gradient_into(output, facts, arriving),
            allow_unused=True,
        )
    except Exception as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
        traceback.print_exc()
        return DEFECT
    wrong = []
    for key, (value, bound) in {k: v for k, v in tensors.items() if k.startswith("expected/")}.items():
        got = float(held(torch.as_tensor(returned.get(key.removeprefix("expected/"), float("nan")))))
        if not abs(got - float(value)) <= float(bound):
            wrong.append(f"{key.removeprefix('expected/')}: expected {float(value):.7g}, got {got:.7g}")
    for key, gradient in zip(facts["differentiable"], gradients, strict=True):
        truth = tensors[f"{rank}/gradient/{key}"] * facts["batch_ranks"]
        bound = tensors[f"{rank}/bound/{key}"] * facts["batch_ranks"]
        got_gradient = torch.zeros_like(truth) if gradient is None else held(gradient).cpu().double()
        off = (got_gradient - truth).abs() > bound
        if bool((off | got_gradient.isnan()).any()):
            at = tuple(int(i) for i in (off | got_gradient.isnan()).nonzero()[0])
            wrong.append(
                f"this rank's gradient to {key}[{', '.join(map(str, at))}]: "
                f"expected {float(truth[at]):.7g}, got {float(got_gradient[at]):.7g}"
            )
    for line in wrong:
        print(f"rank {rank}: {line}", flush=True)
    return DEFECT if wrong else RIGHT


def call(function: Any, facts: dict[str, Any], fields: dict[str, Any], mesh: Any, rank: int) -> tuple[Any, Any]:
    """(the results by name, what is differentiated)."""
    place = {"mesh": mesh, "vocab_start": facts["vocab_start"][rank], "vocab_size": facts["vocab_size"]}
    training = record("Training", facts["training"], frozen=True)
    if facts["entry"] == "compute_divergence":
        names = ("student_hidden", "lm_head_weight", "teacher_logprobs", "teacher_indices")
        found = function(*(fields[name] for name in names), training.alpha, **place)
        return {}, found
    returned = function(record("LossInput", {**fields, **place, "training": training}))
    return returned, returned["loss"]


def record(name: str, fields: dict[str, Any], frozen: bool = False) -> Any:
    """A dataclass with these fields, as the suite hands them over: ``dataclasses.replace`` takes it."""
    return make_dataclass(name, list(fields), frozen=frozen)(**fields)


def gradient_into(output: Any, facts: dict[str, Any], arriving: Any) -> Any:
    """The gradient that is sent into the output: one number, or ``arriving``, one per token."""
    one = torch.full(tuple(output.shape), facts["incoming"], dtype=output.dtype, device=output.device)
    gradient = one if arriving is None else arriving.to(one)
    if isinstance(output, DTensor):
        return DTensor.from_local(
            gradient, output.device_mesh, [Replicate()] * output.device_mesh.ndim, run_check=False
        )
    return gradient


def distributed(key: str, tensor: torch.Tensor, mesh: Any, extent: int) -> torch.Tensor:
    """A DTensor over tp: cut along the vocabulary, padding included, or the same on every rank."""
    if key not in ("student_logits", "lm_head_weight"):
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    dim = tensor.dim() - 1 if key == "student_logits" else 0
    shape = list(tensor.shape)
    shape[dim] = extent
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(tensor, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride)


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds: its part of what is cut, all of what is replicated."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    placements = [placement if placement.is_shard() else Replicate() for placement in tensor.placements]
    return tensor.redistribute(placements=placements).to_local().detach()


def main() -> int:
    """The worst of the ranks' exit statuses."""
    try:
        with safe_open(CASE, framework="pt") as handle:
            facts = json.loads(handle.metadata()["facts"])
    except Exception as error:
        print(f"could not run: {type(error).__name__}: {error}", file=sys.stderr)
        return NOT_RUN
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return status_of(int(os.environ["RANK"]), "")
    print(facts["statement"])
    print(f"seen: {facts['summary']}", flush=True)
    ranks = len(facts["vocab_start"])
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rendezvous")
        processes = [context.Process(target=on_rank, args=(rank, path)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    if all(code == RIGHT for code in codes):
        print("right on every rank")
        return RIGHT
    return NOT_RUN if NOT_RUN in codes else DEFECT  # the others may have waited for it


if __name__ == "__main__":
    sys.exit(main())
