"""The same loss under the names that the conformance suite calls."""

from swiftsdpo.loss import sdpo_loss


def compute_sdpo_loss(x):
    loss, metrics = sdpo_loss(
        x.student_logits,
        x.teacher_logprobs,
        x.teacher_indices,
        x.response_ids,
        x.old_student_logprobs,
        x.base_logprobs,
        x.response_mask,
        alpha=x.training.alpha,
        is_clip=x.training.is_clip,
        kl_weight=x.training.kl_reg_weight,
    )
    return {"loss": loss, **metrics}
