"""The dtypes that a run can be asked for, as torch has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sdpo_conformance.protocol import DTYPE_NAMES

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""By the names that ``--dtype`` and ``SDPO_CLAIMS`` use."""
