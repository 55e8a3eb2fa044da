"""kfallah/CLaaS itself, whose code is the spec: its loss as it is, and its loop through ``claas_trainer``."""

from __future__ import annotations

from sdpo_implementations.adapters.availability import require
from sdpo_implementations.adapters.claas_trainer import INSTALL, distill

__all__ = ["compute_sdpo_loss", "distill"]

compute_sdpo_loss = require("claas.training.sdpo_loss", "compute_sdpo_loss", INSTALL)
