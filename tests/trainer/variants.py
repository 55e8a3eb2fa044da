"""Ways to write the step loop, wrong and right, that the STEP requirements are tested on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sdpo_conformance.protocol import SDPOLossInput
from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.loss_parts import Parts
from sdpo_conformance.specs.claas.defects.step_loop_variants import Prepared, Run, TrainerParts, logprobs, topk, trainer


def do_nothing(run: Run) -> None:
    """A part left out."""


def adapter_off_refresh(run: Run) -> None:
    for one in run.batch:
        one.behaviour = right.base(run, one)


def refresh_one_late(run: Run) -> None:
    """Refreshed with what was computed before the update."""
    for one in run.batch:
        one.behaviour = getattr(one, "upcoming", one.behaviour)


def remember_own(run: Run) -> None:
    for one in run.batch:
        one.upcoming = logprobs(run, one.ids, one.response)  # type: ignore[attr-defined]


def own_at_start(run: Run, one: Prepared) -> Tensor:
    return logprobs(run, one.ids, one.response)


def fit(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values[:, :length], (0, max(0, length - values.shape[1])))


def refresh_swapped(run: Run) -> None:
    right.refresh(run)
    fresh = [one.behaviour for one in run.batch]
    for index, one in enumerate(run.batch):
        one.behaviour = fit(fresh[(index + 1) % len(fresh)], one.response.shape[1])


def refresh_last_sample_only(run: Run) -> None:
    """One variable for all samples."""
    right.refresh(run)
    last = run.batch[-1].behaviour
    for one in run.batch:
        one.behaviour = fit(last, one.response.shape[1])


def recorded_swapped(run: Run) -> None:
    if run.step == 1:
        fresh = [one.behaviour for one in run.batch]
        for index, one in enumerate(run.batch):
            one.behaviour = fit(fresh[index - 1], one.response.shape[1])


def teacher_adapter_on(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    return topk(run, one.teacher_ids, one.response, run.training.teacher_top_k)


def teacher_moves(run: Run) -> None:
    for one in run.batch:
        one.support = teacher_adapter_on(run, one)


def teacher_without_feedback(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    with run.model.disable_adapter():
        return topk(run, one.ids, one.response, run.training.teacher_top_k)


def anchor_moves(run: Run) -> None:
    for one in run.batch:
        one.base = logprobs(run, one.ids, one.response)


def anchor_to_behaviour(run: Run, one: Prepared) -> Tensor:
    return right.first_behaviour(run, one)


def pooled(run: Run) -> Tensor:
    lengths = [one.response.shape[1] for one in run.batch]
    return sum((n * loss for n, loss in zip(lengths, run.losses, strict=True)), torch.zeros(())) / sum(lengths)


def last_loss(run: Run) -> Tensor:
    return run.losses[-1]


def no_clip(run: Run) -> float:
    return float(torch.nn.utils.clip_grad_norm_(run.parameters, float("inf")))


def clip_by_value(run: Run) -> float:
    found = no_clip(run)
    torch.nn.utils.clip_grad_value_(run.parameters, run.training.max_grad_norm)
    return found


def clip_each(run: Run) -> float:
    found = no_clip(run)
    for parameter in run.parameters:
        torch.nn.utils.clip_grad_norm_([parameter], run.training.max_grad_norm)
    return found


def norm_after_clipping(run: Run) -> float:
    right.clip(run)
    return no_clip(run)


def stale_metrics(run: Run, total: Tensor, grad_norm: float) -> dict[str, float]:
    if run.step > 1:
        return {**run.metrics[0], "step": run.step}
    return right.report(run, total, grad_norm)


def metrics_of_last_sample(run: Run, total: Tensor, grad_norm: float) -> dict[str, float]:
    keep = run.results
    run.results = keep[-1:]
    found = right.report(run, total, grad_norm)
    run.results = keep
    return found


def metrics_from_zero(run: Run, total: Tensor, grad_norm: float) -> dict[str, float]:
    return {**right.report(run, total, grad_norm), "step": run.step - 1}


def without_grad_norm(run: Run, total: Tensor, grad_norm: float) -> dict[str, float]:
    found = right.report(run, total, grad_norm)
    del found["grad_norm"]
    return found


def trains_a_base_weight(run: Run) -> None:
    with torch.no_grad():
        next(p for p in run.model.parameters() if not p.requires_grad).add_(1e-4)


def leaves_adapter_disabled(run: Run) -> None:
    run.model.base_model.disable_adapter_layers()


def merges_adapter(run: Run) -> None:
    run.model.merge_adapter()


def activates_first(run: Run) -> None:
    run.model.set_adapter(next(iter(run.model.peft_config)))


def activates_last(run: Run) -> None:
    run.model.set_adapter(next(reversed(run.model.peft_config)))


def no_weight_decay(run: Run, optimizer_cls: Any) -> Any:
    return optimizer_cls(run.parameters, lr=run.training.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)


def default_learning_rate(run: Run, optimizer_cls: Any) -> Any:
    return optimizer_cls(run.parameters, weight_decay=0.01)


def only_lora_b(run: Run, optimizer_cls: Any) -> Any:
    chosen = [p for n, p in run.model.named_parameters() if p.requires_grad and "lora_B" in n]
    return optimizer_cls(chosen, lr=run.training.learning_rate, weight_decay=0.01)


def new_optimizer_each_step(run: Run) -> None:
    run.optimizer = right.make_optimizer(run, type(run.optimizer))


def restores_start(run: Run) -> None:
    with torch.no_grad():
        for parameter, start in zip(run.parameters, run.start, strict=True):  # type: ignore[attr-defined]
            parameter.copy_(start)


def remembers_start(run: Run) -> None:
    if run.step == 1:
        run.start = [p.detach().clone() for p in run.parameters]  # type: ignore[attr-defined]


def loss_with(**parts: Any) -> Callable[..., Any]:
    changed = replace(Parts(), **parts)
    return partial(changed.entry, changed)


def ratio_one(work: Any) -> Tensor:
    return torch.ones_like(work.chosen)


def accept_anything(samples: Any, training: Any) -> None:
    """Refuses nothing."""


def accept_by_total(samples: Any, training: Any) -> None:
    """Refuses log-probs whose number is wrong over the whole batch."""
    responses = sum(len(sample.response_token_ids) for sample in samples)
    if not samples or sum(len(sample.response_logprobs) for sample in samples) != responses:
        raise ValueError("response_logprobs and the responses differ in length")


DEFECTIVE: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "no ratio": ("STEP-1", trainer(loss=loss_with(ratio=ratio_one))),
    "recorded log-probs ignored": ("STEP-1", trainer(first_behaviour=own_at_start)),
    "no refresh": ("STEP-3", trainer(refresh=do_nothing)),
    "starting policy's log-probs, no refresh": (
        "STEP-1",
        trainer(first_behaviour=own_at_start, refresh=do_nothing),
    ),
    "refresh with the adapter off": ("STEP-2", trainer(refresh=adapter_off_refresh)),
    "refresh one step late": ("STEP-2", trainer(before_step=remember_own, refresh=refresh_one_late)),
    "another sample's log-probs": ("STEP-4", trainer(refresh=refresh_swapped)),
    "the last sample's log-probs": ("STEP-4", trainer(refresh=refresh_last_sample_only)),
    "recorded log-probs swapped": ("STEP-4", trainer(before_step=recorded_swapped)),
    "teacher with the adapter on": ("STEP-5", trainer(teacher=teacher_adapter_on)),
    "teacher that moves": ("STEP-5", trainer(before_step=teacher_moves)),
    "teacher without feedback": ("STEP-5", trainer(teacher=teacher_without_feedback)),
    "anchor to the starting policy": ("STEP-5", trainer(base=own_at_start)),
    "anchor to the current policy": ("STEP-5", trainer(before_step=anchor_moves)),
    "anchor to the sampler": ("STEP-5", trainer(base=anchor_to_behaviour)),
    "stale metrics": ("STEP-6", trainer(report=stale_metrics)),
    "metrics of the last sample": ("STEP-6", trainer(report=metrics_of_last_sample)),
    "steps counted from 0": ("STEP-6", trainer(report=metrics_from_zero)),
    "grad_norm missing": ("STEP-6", trainer(report=without_grad_norm)),
    "grad_norm after clipping": ("STEP-6", trainer(clip=norm_after_clipping)),
    "pooled token mean": ("STEP-7", trainer(reduce=pooled)),
    "sum over samples": ("STEP-7", trainer(reduce=lambda run: torch.stack(run.losses).sum())),
    "last sample only": ("STEP-7", trainer(reduce=last_loss)),
    "gradients left in": ("STEP-8", trainer(zero=do_nothing)),
    "no clipping": ("STEP-8", trainer(clip=no_clip)),
    "clipping by value": ("STEP-8", trainer(clip=clip_by_value)),
    "clipping tensor by tensor": ("STEP-8", trainer(clip=clip_each)),
    "base weight trained": ("STEP-9", trainer(before_step=trains_a_base_weight)),
    "adapter left disabled": ("STEP-9", trainer(finish=leaves_adapter_disabled)),
    "first adapter left active": ("STEP-9", trainer(finish=activates_first)),
    "last adapter left active": ("STEP-9", trainer(finish=activates_last)),
    "adapter merged": ("STEP-9", trainer(finish=merges_adapter)),
    "no weight decay": ("STEP-10", trainer(make_optimizer=no_weight_decay)),
    "default learning rate": ("STEP-10", trainer(make_optimizer=default_learning_rate)),
    "only lora_B trained": ("STEP-10", trainer(make_optimizer=only_lora_b)),
    "moments forgotten": ("STEP-10", trainer(before_step=new_optimizer_each_step)),
    "adapter restored at the end": ("STEP-10", trainer(before_step=remembers_start, finish=restores_start)),
    "lengths checked over the batch": (
        "STEP-11",
        trainer(accept=accept_by_total, first_behaviour=lambda run, one: fit(one.recorded, one.response.shape[1])),
    ),
    "accepts anything": ("STEP-12", trainer(accept=accept_anything)),
}
"""Name -> the requirement that must name it, and the trainer."""


# --- other ways to be right ---


class Sound:
    """Trainers that are right, each in another way than the reference."""

    @staticmethod
    def next_forward(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Takes the behaviour log-probs of a later step from that step's own forward."""

        def own(run: Run) -> None:
            if run.step > 1:
                right.refresh(run)

        return right.distill(TrainerParts(refresh=do_nothing, before_step=own), model, samples, training, optimizer_cls)

    @staticmethod
    def refresh_after_last(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Refreshes after the last step too."""
        return right.distill(TrainerParts(finish=right.refresh), model, samples, training, optimizer_cls)

    @staticmethod
    def backward_per_sample(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Accumulates each sample's gradient on its own."""

        def reduce(run: Run) -> Tensor:
            total = torch.zeros(())
            for loss in run.losses[:-1]:
                (loss / len(run.losses)).backward(retain_graph=True)
                total = total + loss.detach() / len(run.losses)
            return total + run.losses[-1] / len(run.losses)

        return right.distill(TrainerParts(reduce=reduce), model, samples, training, optimizer_cls)

    @staticmethod
    def parameter_groups(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Two groups, named parameters' order reversed, foreach, positional hyperparameters."""

        def make(run: Run, cls: Any) -> Any:
            a = [p for n, p in run.model.named_parameters() if p.requires_grad and "lora_B" not in n]
            b = [p for n, p in run.model.named_parameters() if p.requires_grad and "lora_B" in n]
            groups = [{"params": b[::-1]}, {"params": a}]
            return cls(groups, run.training.learning_rate, (0.9, 0.999), 1e-8, 0.01, foreach=True)

        return right.distill(TrainerParts(make_optimizer=make), model, samples, training, optimizer_cls)

    @staticmethod
    def two_optimizers(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """One optimizer for B and one for the rest."""

        class Both:
            def __init__(self, run: Run, cls: Any) -> None:
                named = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad]
                halves = [[p for n, p in named if ("lora_B" in n) is second] for second in (False, True)]
                self.each = [cls(half, lr=run.training.learning_rate, weight_decay=0.01) for half in halves]

            def step(self) -> None:
                for optimizer in self.each:
                    optimizer.step()

        return right.distill(TrainerParts(make_optimizer=Both), model, samples, training, optimizer_cls)

    @staticmethod
    def closure(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """optimizer.step(closure), gradients zeroed before each step, in place."""

        class WithClosure(optimizer_cls):  # type: ignore[misc]
            def step(self, closure: Any = None) -> Any:
                return super().step(lambda: torch.zeros(()))

        def zero_first(run: Run) -> None:
            run.optimizer.zero_grad(set_to_none=False)

        parts = TrainerParts(zero=do_nothing, before_step=zero_first)
        return right.distill(parts, model, samples, training, WithClosure)

    @staticmethod
    def checkpointed(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Turns gradient checkpointing on and leaves it on; metrics as tensors."""

        def as_tensors(run: Run, total: Tensor, grad_norm: float) -> Any:
            found = right.report(run, total, grad_norm)
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}

        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return right.distill(TrainerParts(report=as_tensors), model, samples, training, optimizer_cls)

    @staticmethod
    def prompt_cache(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """The prompt's keys and values first, with gradients, and the response after them."""

        def cached(run: Run, ids: Tensor, response: Tensor) -> Tensor:
            split = ids.shape[1] - response.shape[1] - 1
            cache = DynamicCache()
            if split:
                cache = run.model(input_ids=ids[:, :split], past_key_values=cache, use_cache=True).past_key_values
            found: Tensor = run.model(input_ids=ids[:, split:], past_key_values=cache, use_cache=True).logits[:, :-1]
            return found

        return right.distill(TrainerParts(forward=cached), model, samples, training, optimizer_cls)

    @staticmethod
    def master_weights(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Steps float64 copies of the adapter and writes them back."""

        class Master:
            def __init__(self, run: Run, cls: Any) -> None:
                self.run = run
                self.copies = [torch.nn.Parameter(p.detach().double()) for p in run.parameters]
                self.inner = cls(self.copies, lr=run.training.learning_rate, weight_decay=0.01)

            def step(self) -> None:
                for copy, parameter in zip(self.copies, self.run.parameters, strict=True):
                    assert parameter.grad is not None
                    copy.grad = parameter.grad.double()
                self.inner.step()
                with torch.no_grad():
                    for copy, parameter in zip(self.copies, self.run.parameters, strict=True):
                        parameter.copy_(copy)

        return right.distill(TrainerParts(make_optimizer=Master), model, samples, training, optimizer_cls)

    @staticmethod
    def boolean_mask(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """A causal mask of its own, as PyTorch's attention takes it."""

        def masked(run: Run, ids: Tensor, response: Tensor) -> Tensor:
            seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            logits: Tensor = run.model(input_ids=ids, attention_mask=seen[None, None], use_cache=False).logits
            return logits[:, -1 - response.shape[1] : -1]

        return right.distill(TrainerParts(forward=masked), model, samples, training, optimizer_cls)

    @staticmethod
    def asks_the_embedding(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Reads a field that peft's layer in place of an embedding lacks."""
        assert model.get_input_embeddings().num_embeddings > 0
        return right.distill(TrainerParts(), model, samples, training, optimizer_cls)

    @staticmethod
    def knows_no_gpt2(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Asks for the decoder by the name that it has in most architectures."""
        assert model.get_base_model().model is not None
        return right.distill(TrainerParts(), model, samples, training, optimizer_cls)

    @staticmethod
    def own_optimizer(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        """Ignores the optimizer class it is given."""
        return right.distill(TrainerParts(), model, samples, training, torch.optim.AdamW)


def padded_batch(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
    """One forward for all samples, padded on the right; the ratio of later steps taken as 1 on purpose."""
    right.accept(samples, training)
    rows = [right.prepared(sample, next(model.parameters()).device) for sample in samples]
    width = max(row.ids.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row.ids, (0, width - row.ids.shape[1])) for row in rows])
    mask = torch.cat([torch.arange(width)[None] < row.ids.shape[1] for row in rows]).long()
    run = Run(model, training, [p for p in model.parameters() if p.requires_grad], rows)
    for row in rows:
        row.base, row.support = right.base(run, row), right.teacher(run, row)
    optimizer = optimizer_cls(model.named_parameters(), lr=torch.tensor(training.learning_rate))
    for run.step in range(1, training.steps_per_batch + 1):
        optimizer.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        run.results = []
        for row, scores in zip(rows, logits, strict=True):
            end, length = row.ids.shape[1], row.response.shape[1]
            z = scores[None, end - length - 1 : end - 1]
            own = z.detach().log_softmax(-1).gather(-1, row.response[..., None])[..., 0]
            row.behaviour = row.recorded if run.step == 1 and row.recorded is not None else own
            run.results.append(right.right_loss(loss_input_of(row, z, training)))
        total = torch.stack([result["loss"] for result in run.results]).mean()
        total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(run.parameters, training.max_grad_norm))
        optimizer.step()
        run.metrics.append(right.report(run, total.detach(), norm))
    return {"per_step_metrics": run.metrics}


def loss_input_of(row: Prepared, logits: Tensor, training: Any) -> SDPOLossInput:
    """One row of a padded batch as a loss input."""
    return SDPOLossInput(
        student_logits=logits,
        teacher_logprobs=row.support[0],
        teacher_indices=row.support[1],
        base_logprobs=row.base,
        response_mask=torch.ones_like(row.base),
        old_student_logprobs=row.behaviour,
        response_ids=row.response,
        training=training,
    )


SOUND: Mapping[str, Callable[..., Any]] = {
    "as it is": trainer(),
    "padded batch": padded_batch,
    **{name: value.__func__ for name, value in vars(Sound).items() if isinstance(value, staticmethod)},
}
