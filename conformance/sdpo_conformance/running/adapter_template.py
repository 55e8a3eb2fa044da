"""The adapter that ``sdpo-conformance init`` writes."""

from __future__ import annotations

from pathlib import Path

from sdpo_conformance.files import write_text

ADAPTER = '''"""Makes my SDPO loss callable by sdpo-conformance: sdpo-conformance check {name}"""

from mypkg.loss import my_loss  # your function

SDPO_CLAIMS = {{"dtypes": ["float32", "bfloat16"], "devices": ["cpu", "cuda"]}}


def compute_sdpo_loss(loss_input):
    """loss_input: student_logits (B,T,V), teacher_logprobs and teacher_indices (B,T,K), base_logprobs,
    response_mask, old_student_logprobs, response_ids (B,T), training.alpha, .is_clip, .kl_reg_weight.
    From hidden states instead: name this compute_fused_sdpo_loss and read student_hidden (B,T,H) and
    lm_head_weight (V,H)."""
    loss, metrics = my_loss(
        loss_input.student_logits,
        loss_input.teacher_logprobs,
        loss_input.teacher_indices,
        base_logprobs=loss_input.base_logprobs,
        old_logprobs=loss_input.old_student_logprobs,
        response_ids=loss_input.response_ids,
        mask=loss_input.response_mask,
        alpha=loss_input.training.alpha,
        is_clip=loss_input.training.is_clip,
        kl_reg_weight=loss_input.training.kl_reg_weight,
    )
    # metrics: distill_loss, kl_reg, mean_is_ratio, clip_fraction, each a float or a 0-dim tensor without graph
    return {{"loss": loss, **metrics}}
'''


def write_adapter(path: Path) -> None:
    """Write the template; raises FileExistsError rather than overwrite, ValueError for a name that is no module's."""
    if path.suffix != ".py":
        raise ValueError(f"{path} does not end in .py, so `run` could not load it; name it {path}.py")
    if path.exists():
        raise FileExistsError(f"{path} exists; name another file")
    write_text(path, ADAPTER.format(name=path))
