"""What Liger's two fused linear JSD losses share: how CLaaS's fields become their arguments.

Their convention, not CLaaS's: the divergence runs over the whole vocabulary, beta (here alpha) 0 and 1 are
the full forward and reverse KL, a token counts or does not (a fractional mask cannot be said), there is no
importance ratio and no anchor. They return one number, so no ratio can be applied to its tokens afterwards.
They report no ``kl_reg``, ``mean_is_ratio`` or ``clip_fraction``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.adapters.teacher import complete_teacher

INSTALL = "pip install liger-kernel"
IGNORED = -100


def jsd_arguments(loss_input: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student hidden (N, H) and head (V, H), teacher hidden (N, N) and head (V, N), labels (N,); N = B T.

    The teacher comes as log-probs. As Liger wants hidden states, token i's are the i-th unit vector and the
    head holds its log-probs in column i: their product is the log-probs, without rounding.
    """
    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    teacher = complete_teacher(loss_input.teacher_logprobs, loss_input.teacher_indices, head.shape[0])
    teacher = teacher.flatten(0, 1).to(hidden.dtype)
    units = torch.eye(teacher.shape[0], dtype=hidden.dtype, device=hidden.device)
    ids = loss_input.response_ids.flatten().long()
    labels = ids.masked_fill(loss_input.response_mask.flatten() == 0, IGNORED)
    return hidden.flatten(0, 1), head, units, teacher.T.contiguous(), labels
