"""Liger's chunked fused linear JSD, ``LigerFusedLinearJSDLoss``, put where the loss is.

Its convention is in ``liger``. The cross-entropy that it mixes in by default is off, and so is torch.compile,
which changes the speed alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdpo_implementations.adapters.availability import require
from sdpo_implementations.adapters.liger import IGNORED, INSTALL, jsd_arguments

_Loss = require("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", INSTALL)


def compute_fused_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """Mean over the tokens that count of the generalised JSD with beta = alpha."""
    loss = _Loss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=loss_input.training.alpha,
        ignore_index=IGNORED,
        compiled=False,
    )(*jsd_arguments(loss_input))
    return {"loss": loss, "distill_loss": loss.detach()}
