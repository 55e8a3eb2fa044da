"""CLaaS-style SDPO in plain PyTorch."""

import torch


def sdpo_loss(logits, teacher_logprobs, support, response, behaviour, base, mask, *, alpha, is_clip, kl_weight):
    """Logits (B, T, V); teacher log-probs and their vocabulary indices (B, T, K); the rest (B, T).

    Returns the loss, and a dictionary of metrics without graph.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits.to(wide).log_softmax(-1)
    chosen = logprobs.gather(-1, response.long().unsqueeze(-1)).squeeze(-1)
    teacher_logprobs = teacher_logprobs.to(wide)
    if alpha < 1:
        divergence = jensen_shannon(logprobs.gather(-1, support.long()), teacher_logprobs, alpha)
    else:
        found = support == response.unsqueeze(-1)
        teacher = torch.where(found, teacher_logprobs, 0).sum(-1)
        teacher = torch.where(found.any(-1), teacher, -20)
        divergence = (chosen - teacher).detach() * chosen

    ratio = (chosen - behaviour).detach().clamp(-20, 20).exp().clamp(max=is_clip)
    drift = (chosen - base).clamp(-20, 20)
    k3 = drift.exp() - 1 - drift

    weights = mask.to(wide) / mask.to(wide).sum().clamp(min=1)
    distillation, anchor = (divergence * ratio * weights).sum(), (k3 * weights).sum()
    return distillation + kl_weight * anchor, {
        "distill_loss": distillation.detach(),
        "kl_reg": anchor.detach(),
        "mean_is_ratio": (ratio * weights).sum(),
        "clip_fraction": ((ratio >= is_clip) * weights).sum(),
    }


def jensen_shannon(student_logprobs, teacher_logprobs, alpha):
    """Generalised divergence of the two sides, each renormalised over the support: (B, T)."""
    student, teacher = student_logprobs.exp(), teacher_logprobs.exp()
    student = student / student.sum(-1, keepdim=True).clamp(min=1e-8)
    teacher = teacher / teacher.sum(-1, keepdim=True).clamp(min=1e-8)
    mixture = alpha * teacher + (1 - alpha) * student
    of_teacher = torch.xlogy(teacher, teacher) - torch.xlogy(teacher, mixture)
    of_student = torch.xlogy(student, student) - torch.xlogy(student, mixture)
    return (alpha * of_teacher + (1 - alpha) * of_student).sum(-1)
