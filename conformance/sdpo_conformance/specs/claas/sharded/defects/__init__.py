"""The known ways to get SDPO wrong under torch.distributed, each with an executable form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module

from sdpo_conformance.specs.claas.sharded.defects.sharded_defect import ShardedDefect

MODULES = ("wrong_logsumexp", "wrong_shards", "wrong_sharded_heads", "wrong_token_mean", "wrong_sequence", "wrong_mesh")


@cache
def sharded_catalogue() -> Mapping[str, ShardedDefect]:
    """Every sharded defect by name."""
    found: dict[str, ShardedDefect] = {}
    for module in MODULES:
        for defect in import_module(f"{__name__}.{module}").DEFECTS:
            if defect.name in found:
                raise ValueError(f"two sharded defects are called {defect.name}")
            found[defect.name] = defect
    return found


__all__ = ["ShardedDefect", "sharded_catalogue"]
