"""Is each red cell of a published package its own published formula, and not the suite's mistake?

Every failing input in published/matrix.json is put through the package's formula as its source has it, written here
anew in float64, with no line of the suite's oracle; value or gradient must be what the suite says it got. Prints what
agrees, what does not, and what is no number.

    python docs/pages/recheck.py
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

TOLERANCE = {"bfloat16": 4e-2, "float16": 5e-3}
"""Relative, for what a package computes in half precision throughout; float32: 4e-4."""


def normalised(x: Tensor) -> Tensor:
    return x - x.logsumexp(-1, keepdim=True)


def with_tail(x: Tensor) -> Tensor:
    mass = x.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([x, torch.log(-torch.expm1(mass))], -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def divergence(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """lasgroup, TRL and Liger alike: the ends are full KLs, the inside the generalised Jensen-Shannon divergence."""
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(alpha), student + math.log1p(-alpha))
    return alpha * kl(teacher, mixture) + (1 - alpha) * kl(student, mixture)


def full_teacher(x: dict[str, Tensor], vocabulary: int) -> Tensor:
    """As the adapters complete a top-k: the mass that is left, in equal shares."""
    known, k = x["teacher_logprobs"], x["teacher_logprobs"].shape[-1]
    left = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    share = left.log() - math.log(max(vocabulary - k, 1))
    return share.expand(*known.shape[:-1], vocabulary).scatter(-1, x["teacher_indices"], known)


def ratio(x: dict[str, Tensor], chosen: Tensor, cap: float) -> Tensor:
    return (chosen - x["old_student_logprobs"]).detach().clamp(-20, 20).exp().clamp(max=cap)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def lasgroup(x: dict[str, Tensor], logprobs: Tensor, chosen: Tensor, alpha: float, cap: float) -> Tensor:
    """core_algos.py compute_self_distillation_loss: student's top-k, tail bucket, token mean."""
    top = logprobs.topk(x["teacher_indices"].shape[-1], -1).indices
    teacher = full_teacher(x, logprobs.shape[-1]).gather(-1, top)
    each = divergence(with_tail(teacher), with_tail(logprobs.gather(-1, top)), alpha)
    return token_mean(each * ratio(x, chosen, cap), x["response_mask"])


def trl(x: dict[str, Tensor], logprobs: Tensor, chosen: Tensor, alpha: float, cap: float) -> Tensor:
    """loss_utils.py compute_topk_self_distillation_loss: student's top-k, renormalised, mean of row means."""
    top = logprobs.topk(x["teacher_indices"].shape[-1], -1).indices
    teacher = full_teacher(x, logprobs.shape[-1]).gather(-1, top)
    each = divergence(normalised(teacher), normalised(logprobs.gather(-1, top)), alpha)
    return row_means(each * ratio(x, chosen, cap), x["response_mask"])


def trl_server(x: dict[str, Tensor], logprobs: Tensor, chosen: Tensor, alpha: float, cap: float) -> Tensor:
    """sdpo_trainer.py _compute_server_distillation_loss: teacher's top-k, renormalised, mean of row means."""
    student = logprobs.gather(-1, x["teacher_indices"])
    each = divergence(normalised(x["teacher_logprobs"]), normalised(student), alpha)
    return row_means(each * ratio(x, chosen, cap), x["response_mask"])


def trl_sampled(x: dict[str, Tensor], logprobs: Tensor, chosen: Tensor, alpha: float, cap: float) -> Tensor:
    """loss_utils.py compute_sampled_token_self_distillation_loss: takes logits, so it normalises the teacher."""
    teacher = normalised(full_teacher(x, logprobs.shape[-1])).gather(-1, x["response_ids"].unsqueeze(-1)).squeeze(-1)
    return row_means((chosen - teacher).detach() * chosen * ratio(x, chosen, cap), x["response_mask"])


def liger(x: dict[str, Tensor], logprobs: Tensor, chosen: Tensor, alpha: float, cap: float) -> Tensor:
    """chunked_loss/jsd_loss.py: the whole vocabulary, no ratio; a token counts or does not."""
    each = divergence(full_teacher(x, logprobs.shape[-1]), logprobs, alpha)
    return token_mean(each, (x["response_mask"] != 0).double())


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "adapters.lasgroup_sdpo": lasgroup,
    "adapters.trl_sdpo": trl,
    "adapters.trl_sdpo:teacher_server": trl_server,
    "adapters.trl_sdpo:sampled_token": trl_sampled,
    "adapters.liger_chunked_jsd": liger,
    "adapters.liger_triton_jsd": liger,
}


def recompute(formula: Callable[..., Tensor], stored: dict[str, Tensor], program: str, aspect: str) -> float | None:
    """The value, or the entry of the gradient, that ``aspect`` names; None for anything else."""
    wanted = re.fullmatch(r"gradient to (student_\w+)\[([\d, ]+)\]", aspect)
    if wanted is None and aspect not in ("loss", "distill_loss"):
        return None
    number = {name: float(re.search(rf"{name}=([-+.\de]+)", program)[1]) for name in ("alpha", "is_clip")}  # type: ignore[index]
    integers = ("teacher_indices", "response_ids")
    x = {name: value.long() if name in integers else value.double() for name, value in stored.items()}
    if "student_logits" in x:
        leaf = x["student_logits"].requires_grad_()
        logits = leaf
    else:
        leaf = x["student_hidden"].requires_grad_()
        logits = leaf @ x["lm_head_weight"].T
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, x["response_ids"].unsqueeze(-1)).squeeze(-1)
    loss = formula(x, logprobs, chosen, number["alpha"], number["is_clip"])
    if wanted is None:
        return float(loss.detach())
    (gradient,) = torch.autograd.grad(loss, leaf, x.get("incoming", torch.ones(())).reshape(loss.shape).to(loss))
    return float(gradient[tuple(int(index) for index in wanted[2].split(","))])


def main() -> None:
    """One line for each disagreement, one tally for each package."""
    torch.set_num_threads(1)
    document: dict[str, Any] = json.loads(
        (Path(__file__).parents[1] / "results" / "published" / "matrix.json").read_text("utf-8")
    )
    for column in document["implementations"]:
        formula = FORMULAS.get(column["implementation"])
        if formula is None or column["results"] is None:
            continue
        tally: Counter[str] = Counter()
        said: Counter[str] = Counter()
        for record in column["results"]["records"]:
            if record["status"] != "failed":
                continue
            failure = record["failure"]
            found = column["reproductions"].get(failure.get("reproduction") or "", {"input": ""})
            mine = None
            if failure["kind"] == "disagreement" and found["input"]:
                stored = load(base64.b64decode(found["input"]))
                mine = recompute(formula, stored, found["program"], failure["aspect"])
            if mine is None:
                tally["no number"] += 1
                said[failure["summary"][:100]] += 1
                continue
            got = float(failure["got"].split()[0])
            share = next((bound for name, bound in TOLERANCE.items() if name in failure["words"]), 4e-4)
            same = abs(got - mine) <= share * max(abs(mine), 1e-3) or (math.isnan(got) and math.isnan(mine))
            tally["as its own formula" if same else "otherwise"] += 1
            if not same:
                print(f"  {column['implementation']} {record['requirement']}: got {got:g}, its formula {mine:g}")
        for summary, count in said.items():
            print(f"  {column['implementation']} {count} times no number: {summary}")
        print(column["implementation"], dict(tally))


if __name__ == "__main__":
    main()
