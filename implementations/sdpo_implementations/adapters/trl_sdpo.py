"""TRL's experimental SDPO trainer: its own loss methods, run on a stand-in for the trainer.

Given TRL's input (``--spec trl``) it is what TRL computes in the mode that the options name. Given CLaaS's:

The module is ``distillation_mode="topk_logits"`` with a local teacher: the student's top-k, renormalised.
``trl_sdpo:sampled_token`` is TRL's default mode, the response tokens alone (alpha 1 only);
``trl_sdpo:teacher_server`` is ``use_teacher_server=True``, where the support is the teacher's top-k.

TRL's convention, not CLaaS's: each row is averaged over its own tokens before the rows are; alpha 0 and 1 are
the full forward and reverse KL; there is no anchor to the base policy. It reports no ``kl_reg``,
``mean_is_ratio`` or ``clip_fraction``. A local teacher outside its own top-k is completed by
``complete_teacher``. Source: ``trl/experimental/sdpo/sdpo_trainer.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require
from sdpo_implementations.adapters.teacher import as_module, complete_teacher

_INSTALL = "pip install 'trl>=1.16'"
_Trainer = require("trl.experimental.sdpo.sdpo_trainer", "SDPOTrainer", _INSTALL)
_Logits = require("trl.experimental.sdpo.sdpo_trainer", "DistillationLogits", _INSTALL)
_Sync = require("trl.trainer.callbacks", "SyncRefModelCallback", _INSTALL)
_Callback = require("trl.experimental.sdpo.teacher_sync", "PEFTAdapterEMACallback", _INSTALL)


@dataclass(frozen=True)
class TRLLoss:
    """One setting of TRL's trainer: its ``distillation_mode``, and whether a server holds the teacher."""

    mode: str
    server: bool = False

    def compute_sdpo_loss(self, loss_input: Any) -> dict[str, Tensor]:
        """TRL's loss with its default of no tail bucket; alpha and is_clip from the input. Raises ValueError
        where TRL does, as ``sampled_token`` for every alpha but 1."""
        teacher = complete_teacher(
            loss_input.teacher_logprobs, loss_input.teacher_indices, loss_input.student_logits.shape[-1]
        )
        trainer, model = self._trainer(loss_input, teacher), SimpleNamespace(training=True)
        mask = loss_input.response_mask.to(loss_input.old_student_logprobs.dtype)
        nothing = loss_input.response_ids[:, :0]
        batch = {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": loss_input.response_ids.long(),
            "completion_mask": mask,
            "old_per_token_logps": loss_input.old_student_logprobs,
        }
        if self.server:
            loss = _Trainer._compute_server_distillation_loss(trainer, model, batch)
        else:
            logits = _Logits(batch["completion_ids"], mask, mask, loss_input.student_logits, teacher)
            loss = _Trainer._compute_self_distillation_loss(trainer, model, batch, logits)
        return {"loss": loss, "distill_loss": loss.detach()}

    def _trainer(self, loss_input: Any, teacher: Tensor) -> SimpleNamespace:
        """CLaaS's options and teacher in TRL's words."""
        chosen = loss_input.response_ids.long().unsqueeze(-1)
        served = {
            "actual_logprobs": teacher.gather(-1, chosen).squeeze(-1),
            "topk_logprobs": loss_input.teacher_logprobs,
            "topk_token_ids": loss_input.teacher_indices.long(),
        }
        args = SimpleNamespace(
            distillation_mode=self.mode,
            distillation_topk=loss_input.teacher_indices.shape[-1],
            distillation_alpha=loss_input.training.alpha,
            distillation_add_tail=False,
            distillation_is_clip=loss_input.training.is_clip,
        )
        return _stand_in(args, loss_input.student_logits, served, lambda value: None)


def on_own_input(loss_input: Any) -> dict[str, Tensor]:
    """TRL's loss on TRL's input: the forward's logits are divided by the temperature, as ``_forward_logits`` does."""
    training = loss_input.training
    logged: list[float] = []
    logits = loss_input.student_logits / training.temperature
    mask = loss_input.completion_mask
    if loss_input.self_distillation_mask is not None:
        mask = mask * loss_input.self_distillation_mask.unsqueeze(1)
    served = {
        "actual_logprobs": loss_input.teacher_actual_logprobs,
        "topk_logprobs": loss_input.teacher_topk_logprobs,
        "topk_token_ids": loss_input.teacher_topk_ids,
    }
    trainer, model = _stand_in(training, logits, served, logged.append), SimpleNamespace(training=True)
    nothing = loss_input.completion_ids[:, :0]
    batch = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": loss_input.completion_ids,
        "completion_mask": loss_input.completion_mask,
        "self_distillation_mask": loss_input.self_distillation_mask,
        "old_per_token_logps": loss_input.old_per_token_logps,
    }
    if training.use_teacher_server:
        loss = _Trainer._compute_server_distillation_loss(trainer, model, batch)
    else:
        teacher = loss_input.teacher_logits / training.temperature
        pair = _Logits(batch["completion_ids"], loss_input.completion_mask, mask, logits, teacher)
        loss = _Trainer._compute_self_distillation_loss(trainer, model, batch, pair)
    return {"loss": loss, "logged_distillation_loss": torch.tensor(logged[-1], dtype=torch.float64)}


def _stand_in(args: Any, logits: Tensor, served: dict[str, Any], log: Any) -> SimpleNamespace:
    """What the two methods ask of ``self``: options, the forwards' results, and somewhere to log."""
    return SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(gather=torch.Tensor.detach),
        state=SimpleNamespace(global_step=0),
        _last_loaded_step=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _log_self_distillation_metric=lambda mode, value: log(value),
        _forward_logits=lambda **_: logits,
        _get_teacher_token_logprobs_from_server=lambda inputs, kept: served,
    )


def update_teacher(
    teacher: dict[str, Tensor], student: Mapping[str, Tensor], teacher_update_rate: float
) -> dict[str, Tensor]:
    """The teacher's callbacks: ``PEFTAdapterEMACallback`` for the factors of an adapter, in PEFT's names, else what
    ``SyncTeacherModelCallback`` calls for a model of its own."""
    if any(".lora_" in name for name in teacher):
        return _adapter_teacher(teacher, student, teacher_update_rate)
    names = list(teacher)
    modules = [as_module({name: one[name] for name in names}) for one in (teacher, student)]
    _Sync._sync_target_model(modules[1], modules[0], teacher_update_rate)
    return {name: value.detach() for name, value in zip(names, modules[0], strict=True)}


def _adapter_teacher(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], teacher_update_rate: float
) -> dict[str, Tensor]:
    """One step of the callback on a PEFT model of linear layers with these factors."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    layers = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in teacher})
    base, rank = torch.nn.Module(), 1
    for layer in layers:
        into, out = (student[f"base_model.model.{layer}.lora_{factor}.weight"] for factor in "AB")
        parent, rank = base, into.shape[0]
        *path, last = layer.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(into.shape[1], out.shape[0], bias=False))
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=layers))
    set_peft_model_state_dict(model, dict(student))
    callback = _Callback(model, update_rate=teacher_update_rate)
    callback._initialize_teacher_adapter()
    callback.shadow_weights = {name: value.detach().clone() for name, value in teacher.items()}
    callback.on_step_end(SimpleNamespace(), SimpleNamespace(global_step=1), None)
    return dict(callback.shadow_weights)


sampled_token = TRLLoss("sampled_token")
teacher_server = TRLLoss("topk_logits", server=True)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """TRL's loss on its own input (``--spec trl``), in the mode that its options name, or on CLaaS's."""
    if hasattr(loss_input, "completion_mask"):
        return on_own_input(loss_input)
    return TRLLoss("topk_logits").compute_sdpo_loss(loss_input)
