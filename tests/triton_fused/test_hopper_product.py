"""The Gluon kernel compiles under the Triton that is installed: nothing on a machine without a Hopper GPU runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SHARED = 227 * 1024
"""Bytes of shared memory that one program may have on compute capability 9.0."""


def test_every_form_compiles_and_fits(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        pytest.skip("the module refuses to be imported before Triton 3.6")
    program = Path(__file__).with_name("compile_hopper_product.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=600)
    assert found.returncode == 0, found.stderr[-4000:]
    sizes = [int(line) for line in found.stdout.split()]
    assert len(sizes) == 4
    assert max(sizes) <= MOST_SHARED
