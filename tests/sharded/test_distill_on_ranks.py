"""``distill`` on two ranks: whichever way they hold the model, metrics, gradients and adapter of one process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from tests.sharded.distill_on_ranks import compare
from torch.multiprocessing import start_processes

IMPORTED_ONCE = ["torch.distributed.fsdp", "transformers.models.qwen3.modeling_qwen3", "peft"]


def test_two_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    start_processes(compare, (2, str(tmp_path / "rendezvous")), nprocs=2, start_method="forkserver")
