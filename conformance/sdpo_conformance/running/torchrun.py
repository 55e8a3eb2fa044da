"""Under torchrun: one process judges, on ranks of its own that it can replace, and the others wait for its end.

A rank that dies or hangs would end torchrun's whole job; the ranks that are judged are therefore children of the
first process. All of them must be on one host.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed import TCPStore

from sdpo_conformance.running.options import RunError
from sdpo_conformance.sharded.mesh import MeshShape

LONGEST = timedelta(hours=12)
_KEY = "sdpo-conformance/status"


def checked_mesh(mesh: str) -> None:
    """Raise RunError unless torchrun's processes are those that the mesh asks for, on one host."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if not mesh:
        raise RunError(f"under torchrun with {world} processes: name the mesh, such as --mesh tp={world}")
    try:
        shape = MeshShape.parse(mesh)
    except ValueError as error:
        raise RunError(str(error)) from None
    if shape.ranks != world:
        raise RunError(f"--mesh {mesh} has {shape.ranks} ranks, torchrun started {world}: make them equal")
    if local != world:
        raise RunError(f"torchrun started {world} processes on several hosts: a mesh is judged on one host")


def store() -> TCPStore:
    """torchrun's own store."""
    return TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=hosts_store(), wait_for_workers=False
    )


def hosts_store() -> bool:
    """Whether this process has to open the store: torchrun's agent does, unless told not to."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
    return not agent and os.environ["RANK"] == "0"


_OPEN: list[TCPStore] = []


def stand_by() -> int | None:
    """None on the first process, which judges. The others wait for its end, and get its exit status."""
    _OPEN.append(store())
    if os.environ["RANK"] == "0":
        return None
    _OPEN[0].wait([_KEY], LONGEST)
    return int(_OPEN[0].get(_KEY))


def finished(status: int) -> None:
    """Tell the others the exit status."""
    if _OPEN:
        _OPEN[0].set(_KEY, str(status))
