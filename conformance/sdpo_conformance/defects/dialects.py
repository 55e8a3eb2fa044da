"""Other algorithms that share the name SDPO, or its parts: their conventions as replaced parts.

Source: lasgroup/SDPO (verl/trainer/ppo/core_algos.py and workers), TRL's SDPOTrainer and GKDTrainer, veRL's
kl_penalty; each described in docs/dialects.md.
"""

from __future__ import annotations

from sdpo_conformance.defects.model import Defect

DIALECTS: tuple[Defect, ...] = ()
