"""The losses of lasgroup, TRL, ms-swift and verl-topk against the plain references in float64, value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_implementations.reference import lasgroup as _lasgroup
from sdpo_implementations.reference import ms_swift as _ms_swift
from sdpo_implementations.reference import trl as _trl
from sdpo_implementations.reference import verl_topk as _verl_topk
from sdpo_implementations.triton_fused import lasgroup, ms_swift, row_loss, trl, verl_topk
from sdpo_implementations.triton_fused.row_loss import Rows

B, T, K = 2, 5, 4
GRADIENT_BOUND = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
PLAIN: dict[ModuleType, ModuleType] = {
    trl: _trl, lasgroup: _lasgroup, ms_swift: _ms_swift, verl_topk: _verl_topk,
}  # fmt: skip

TRL = {
    "distillation_mode": "topk_logits", "distillation_topk": K, "distillation_add_tail": False,
    "distillation_alpha": 0.5, "distillation_is_clip": 2.0, "temperature": 1.0, "use_teacher_server": False,
}  # fmt: skip
LASGROUP = {
    "full_logit_distillation": True, "distillation_topk": K, "distillation_add_tail": True, "alpha": 0.5,
    "is_clip": 2.0, "temperature": 1.0, "loss_agg_mode": "token-mean", "rollout_is": "sequence",
    "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True, "batch_num_tokens": None,
    "global_batch_size": None,
}  # fmt: skip
MS_SWIFT = {"beta": 0.5, "temperature": 1.0, "gkd_logits_topk": None, "num_items_in_batch": None}
VERL = {
    "log_prob_min_clamp": -4.0, "loss_max_clamp": 10.0, "temperature": 1.0, "loss_agg_mode": "token-mean", "dp_size": 1,
    "batch_num_tokens": 7.0, "global_batch_size": 2, "loss_scale_factor": None,
}  # fmt: skip


def drawn(vocabulary: int, dtype: torch.dtype, extra: int = 0) -> dict[str, Tensor]:
    """Tensors that the four specs' inputs are made of; ``extra`` ids that only the teacher has."""
    generator = torch.Generator().manual_seed(vocabulary + extra)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    student = 2 * normal(B, T, vocabulary)
    student.scatter_add_(-1, student.topk(K, dim=-1).indices, torch.full((B, T, K), 0.5))  # no tie at the edge
    teacher = torch.cat((student, normal(B, T, max(0, extra))), dim=-1)[..., : vocabulary + extra]
    teacher = teacher + normal(*teacher.shape)
    teacher.scatter_add_(-1, teacher.topk(K, dim=-1).indices, torch.full((B, T, K), 0.5))
    top = teacher.log_softmax(-1).topk(K, dim=-1)
    ids = student[..., :vocabulary].argmax(-1)
    ids[:, ::2] = torch.randint(0, vocabulary, ids[:, ::2].shape, generator=generator)
    student = student.to(dtype)
    chosen = student.double().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return {
        "student": student, "teacher": teacher.to(dtype), "ids": ids, "top_values": top.values, "top_ids": top.indices,
        "actual": teacher.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        "old": (chosen + normal(B, T)).float(), "mask": torch.tensor([[1.0] * T, [0.5, 0.0, 1.0, 1.0, 0.0]]),
    }  # fmt: skip


def trl_input(x: dict[str, Tensor], **options: Any) -> SimpleNamespace:
    served = options.get("use_teacher_server", False)
    return SimpleNamespace(
        student_logits=x["student"], completion_ids=x["ids"], completion_mask=x["mask"],
        training=SimpleNamespace(**TRL | options), teacher_logits=None if served else x["teacher"],
        self_distillation_mask=None, old_per_token_logps=x["old"], teacher_topk_logprobs=x["top_values"],
        teacher_topk_ids=x["top_ids"], teacher_actual_logprobs=x["actual"],
    )  # fmt: skip


def lasgroup_input(x: dict[str, Tensor], **options: Any) -> SimpleNamespace:
    return SimpleNamespace(
        student_logits=x["student"], teacher_logits=x["teacher"], response_ids=x["ids"], response_mask=x["mask"],
        training=SimpleNamespace(**LASGROUP | options), old_log_probs=x["old"], rollout_is_weights=None,
        self_distillation_mask=None, rollout_log_probs=x["old"] + 0.3,
    )  # fmt: skip


def ms_swift_input(x: dict[str, Tensor], given: bool = False, **options: Any) -> SimpleNamespace:
    """The teacher's active positions are as many as the student's, in other places."""
    labels = torch.full((B, T), -100)
    labels[:, 1:] = torch.where(x["mask"][:, :-1] != 0, x["ids"][:, :-1], -100)
    values = x["top_values"].clone()
    values[0, 1] = -math.inf
    return SimpleNamespace(
        student_logits=x["student"], labels=labels, teacher_labels=labels.flip(0),
        training=SimpleNamespace(**MS_SWIFT | options), teacher_logits=None if given else x["teacher"],
        teacher_topk_logprobs=values if given else None, teacher_topk_indices=x["top_ids"] if given else None,
    )  # fmt: skip


def verl_input(x: dict[str, Tensor], **options: Any) -> SimpleNamespace:
    return SimpleNamespace(
        student_logits=x["student"], teacher_logprobs=x["top_values"], teacher_ids=x["top_ids"],
        response_mask=x["mask"], training=SimpleNamespace(**VERL | options),
    )  # fmt: skip


def on(device: torch.device | None, given: SimpleNamespace) -> SimpleNamespace:
    """On this device; None: upcast to float64 on the CPU."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if device is None:
            return value.double() if value.is_floating_point() else value
        return value.to(device)

    return SimpleNamespace(**{name: moved(value) for name, value in vars(given).items()})


def evaluate(module: ModuleType, given: SimpleNamespace) -> tuple[dict[str, Tensor], Tensor]:
    leaf = given.student_logits.detach().clone().requires_grad_()
    result = module.compute_sdpo_loss(SimpleNamespace(**vars(given) | {"student_logits": leaf}))
    (gradient,) = torch.autograd.grad(result["loss"], leaf, torch.full_like(result["loss"], -1000.0))
    return result, gradient


def check(module: ModuleType, given: SimpleNamespace, device: torch.device) -> Tensor:
    """Value, metrics and every row of the gradient; returns the gradient."""
    true, true_gradient = evaluate(PLAIN[module], on(None, given))
    got, gradient = evaluate(module, on(device, given))
    assert set(got) == set(true)
    for name, value in true.items():
        assert abs(float(got[name].detach()) - float(value.detach())) <= 3e-6 * abs(float(value.detach())), name
        assert got[name].requires_grad == (name == "loss")
    assert gradient.dtype == given.student_logits.dtype
    error = (gradient.cpu().double() - true_gradient).norm(dim=-1)
    size = true_gradient.norm(dim=-1)
    assert float((error / size.clamp(min=1e-2 * float(size.max()))).max()) < GRADIENT_BOUND[gradient.dtype]
    assert bool((gradient.cpu()[size == 0] == 0).all())
    return gradient


CASES: dict[str, tuple[ModuleType, Callable[[dict[str, Tensor]], SimpleNamespace]]] = {
    "trl renormalised": (trl, lambda x: trl_input(x, temperature=0.7)),
    "trl tail": (trl, lambda x: trl_input(x, distillation_add_tail=True, distillation_alpha=1.0)),
    "trl sampled": (trl, lambda x: trl_input(x, distillation_mode="sampled_token", distillation_alpha=1.0)),
    "trl whole": (trl, lambda x: trl_input(x, distillation_mode="full_logits", distillation_alpha=0.3)),
    "trl served": (trl, lambda x: trl_input(x, use_teacher_server=True, distillation_alpha=0.0)),
    "trl served tail": (trl, lambda x: trl_input(x, use_teacher_server=True, distillation_add_tail=True)),
    "lasgroup tail": (lasgroup, lambda x: lasgroup_input(x, temperature=1.4)),
    "lasgroup rows": (lasgroup, lambda x: lasgroup_input(x, alpha=0.0, loss_agg_mode="seq-mean-token-mean")),
    "lasgroup renormalised": (lasgroup, lambda x: lasgroup_input(x, distillation_add_tail=False, is_clip=None)),
    "lasgroup whole": (lasgroup, lambda x: lasgroup_input(x, distillation_topk=None, alpha=1.0)),
    "ms-swift given": (ms_swift, lambda x: ms_swift_input(x, given=True, temperature=1.4)),
    "ms-swift own": (ms_swift, lambda x: ms_swift_input(x, gkd_logits_topk=K, beta=1.0)),
    "ms-swift whole": (ms_swift, lambda x: ms_swift_input(x, beta=0.0)),
    "verl-topk": (verl_topk, verl_input),
    "verl-topk rows": (verl_topk, lambda x: verl_input(x, loss_agg_mode="seq-mean-token-sum-norm", temperature=0.7)),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(device: torch.device, name: str) -> None:
    """At 300 columns the top-k is selected among stretches, at 70 it is PyTorch's."""
    module, build = CASES[name]
    check(module, build(drawn(300, torch.float32)), device)
    check(module, build(drawn(70, torch.bfloat16)), device)


@pytest.mark.parametrize("name", ["trl renormalised", "lasgroup tail", "verl-topk"])
def test_float16(device: torch.device, name: str) -> None:
    module, build = CASES[name]
    check(module, build(drawn(300, torch.float16)), device)


@pytest.mark.parametrize(("extra", "beta"), [(7, 0.3), (-7, 0.0), (-7, 0.3), (-7, 1.0)])
def test_two_vocabularies(device: torch.device, extra: int, beta: float) -> None:
    check(ms_swift, ms_swift_input(drawn(70, torch.float32, extra), beta=beta), device)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_support_that_holds_everything_closes_the_tail(device: torch.device, alpha: float) -> None:
    x = drawn(70, torch.float32)
    for side in ("student", "teacher"):
        x[side].scatter_add_(-1, x["student"].topk(K, dim=-1).indices, torch.full((B, T, K), 60.0))
    check(lasgroup, lasgroup_input(x, alpha=alpha), device)


@pytest.mark.parametrize("name", ["trl renormalised", "ms-swift given", "ms-swift own"])
def test_renormalised_gradients_are_sparse_and_keep_no_logits(device: torch.device, name: str) -> None:
    module, build = CASES[name]
    given = on(device, build(drawn(300, torch.float32)))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda one: one):
        _, gradient = evaluate(module, given)
    assert int((gradient != 0).sum(-1).max()) <= K
    assert all(300 not in shape for shape in kept)


@pytest.mark.parametrize("name", ["trl renormalised", "trl whole", "lasgroup tail", "verl-topk"])
def test_nothing_is_read_where_the_mask_is_0(device: torch.device, name: str) -> None:
    module, build = CASES[name]
    x = drawn(300, torch.float32)
    clean_result, clean = evaluate(module, on(device, build(x)))
    for key in ("student", "teacher", "old", "top_values"):
        x[key] = torch.where((x["mask"] == 0).view(B, T, *[1] * (x[key].dim() - 2)), math.nan, x[key])
    result, gradient = evaluate(module, on(device, build(x)))
    assert torch.equal(gradient, clean)
    assert torch.equal(result["loss"], clean_result["loss"])


@pytest.mark.parametrize("k", [1, 5, 6, 200])
def test_the_own_top_k_takes_exactly_k_of_equals(device: torch.device, k: int) -> None:
    """Up to as many as there are stretches, and beyond; a last stretch of 23 columns."""
    z = torch.randint(-3, 3, (6, 343), generator=torch.Generator().manual_seed(k)).to(torch.bfloat16)
    rows = Rows.read(z.to(device), torch.ones(6, device=device), 1.0, sums=False, maxima=True)
    values, ids = (one.cpu() for one in rows.topk(k))
    assert torch.equal(values.sort(-1, descending=True).values, z.float().topk(k, dim=-1).values)
    assert torch.equal(z.float().gather(-1, ids), values)
    assert ids.sort(-1).values.diff(dim=-1).gt(0).all()


def test_what_is_not_served_is_refused_by_name(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = on(device, trl_input(drawn(70, torch.float32)))

    def refused(words: str, **fields: Any) -> None:
        with pytest.raises(ValueError, match=words) as raised:
            trl.compute_sdpo_loss(SimpleNamespace(**vars(given) | fields))
        assert "\n" not in str(raised.value)

    refused("TRL loss is that of one process: it takes no mesh", mesh=object())
    refused("student_logits must be float32, bfloat16 or float16", student_logits=given.student_logits.double())
    refused("teacher_logits must have shape", teacher_logits=given.teacher_logits[..., 1:])
    refused("distillation_topk must lie in", training=SimpleNamespace(**TRL | {"distillation_topk": 71}))
    refused("distillation_mode must be one of", training=SimpleNamespace(**TRL | {"distillation_mode": "top_k"}))
    refused("temperature must be above 0", training=SimpleNamespace(**TRL | {"temperature": 0.0}))
    monkeypatch.setattr(row_loss, "MOST_ENTRIES", 3)
    refused("serves supports of at most 3 tokens, got 4")
    hidden = SimpleNamespace(**{name: value for name, value in vars(given).items() if name != "student_logits"})
    with pytest.raises(ValueError, match="computed from student_logits, which the input does not have"):
        trl.compute_sdpo_loss(hidden)
