"""Liger's Triton fused linear JSD, ``LigerFusedLinearJSD``, put where the loss is.

Its convention is in ``liger``. It needs a GPU, or Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from sdpo_implementations.adapters.availability import require
from sdpo_implementations.adapters.liger import IGNORED, INSTALL, jsd_arguments

_Loss = require("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD", INSTALL)

SDPO_CLAIMS = {"devices": ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)}


def compute_fused_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """Mean over the tokens that count of the generalised JSD with beta = alpha, computed in float32."""
    loss = _Loss(jsd_beta=loss_input.training.alpha, ignore_index=IGNORED)(*jsd_arguments(loss_input))
    return {"loss": loss, "distill_loss": loss.detach()}
