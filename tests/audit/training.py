"""A small step loop with faults to switch on, and the folder that such a run leaves behind.

It is written apart from the bundled trainers on purpose: the audit must not learn their habits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdpo_conformance.protocol import Sample, SDPOLossInput, TrainingConfig
from sdpo_implementations.reference.loss import compute_sdpo_loss

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}
VOCABULARY = 64
TRAINING = TrainingConfig(learning_rate=5e-3, kl_reg_weight=0.1, teacher_top_k=20, steps_per_batch=4)

Distill = Callable[[Any, Sequence[Sample], Any, Any], Any]


@dataclass(frozen=True)
class Faults:
    """What the loop gets wrong. `stale_from`: the step (from 1) from which the loss reads cached logits."""

    refresh: bool = True
    ratio: bool = True
    recorded: bool = True
    stale_from: int | None = None
    anchor_sign: float = 1.0
    anchor_to: str = "base"
    saves_update: bool = True
    shift: int = 0
    frozen: frozenset[str] = field(default_factory=frozenset)


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """A two-layer Qwen3 of 64 tokens, float32."""
    import transformers

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "eos_token_id": 1, "bos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**settings, **changes}))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # away from a uniform policy
    return model.eval()


def with_adapter(base: Any, seed: int = 1) -> Any:
    """The model with a LoRA adapter whose lora_B are not zero."""
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


def logprobs(model: Any, sample: Sample, prompt: Sequence[int] | None = None) -> torch.Tensor:
    """(1, T, V) log-probs at the response's positions."""
    prompt = sample.prompt_token_ids if prompt is None else prompt
    ids = torch.tensor([[*prompt, *sample.response_token_ids]])
    return torch.log_softmax(model(input_ids=ids).logits[:, len(prompt) - 1 : -1], dim=-1)


def chosen(values: torch.Tensor, sample: Sample) -> torch.Tensor:
    return values.gather(-1, torch.tensor([sample.response_token_ids])[..., None])[..., 0]


def samples_of(model: Any, *, count: int = 2, length: int = 24, mismatch: float = 0.0, seed: int = 2) -> list[Sample]:
    """Random responses with the log-probs that a sampler `mismatch` nats (standard deviation) off would
    record.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(number: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (number,), generator=generator).tolist()

    samples = []
    for _ in range(count):
        sample = Sample(ids(6), ids(length), ids(9), None)
        with torch.no_grad():
            recorded = chosen(logprobs(model, sample), sample)[0]
        noise = mismatch * torch.randn(recorded.shape, generator=generator)
        samples.append(Sample(**{**asdict(sample), "response_logprobs": (recorded + noise).tolist()}))
    return samples


def distill(model: Any, samples: Sequence[Sample], training: TrainingConfig, faults: Faults) -> list[dict[str, Any]]:
    """The step loop of the spec, with the faults."""
    parameters = [
        p for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in faults.frozen)
    ]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=(0.9, 0.999), weight_decay=0.01)
    states = []
    for sample in samples:
        with torch.no_grad(), model.disable_adapter():
            base = chosen(logprobs(model, sample), sample)
            top = logprobs(model, sample, sample.teacher_prompt_token_ids).topk(training.teacher_top_k, dim=-1)
        with torch.no_grad():
            start = chosen(logprobs(model, sample), sample)
        old = torch.tensor([sample.response_logprobs]) if faults.recorded else start
        old = old.roll(faults.shift, dims=-1)
        states.append({"base": base if faults.anchor_to == "base" else start, "top": top, "old": old})
    cached: list[torch.Tensor | None] = [None] * len(samples)
    metrics = []
    for step in range(1, training.steps_per_batch + 1):
        optimizer.zero_grad()
        results = []
        for index, (sample, state) in enumerate(zip(samples, states, strict=True)):
            fresh = logprobs(model, sample)
            if faults.stale_from is not None and step >= faults.stale_from:
                if cached[index] is None:
                    cached[index] = fresh.detach()
                logits = cached[index] + (fresh - fresh.detach())  # stale values, a gradient all the same
            else:
                logits = fresh
            old = state["old"] if faults.ratio else chosen(logits, sample).detach()
            result = compute_sdpo_loss(
                SDPOLossInput(
                    student_logits=logits, teacher_logprobs=state["top"].values, teacher_indices=state["top"].indices,
                    base_logprobs=state["base"], response_mask=torch.ones_like(state["base"]), old_student_logprobs=old,
                    response_ids=torch.tensor([sample.response_token_ids]), training=training,
                )
            )  # fmt: skip
            weight = training.kl_reg_weight * faults.anchor_sign
            d = chosen(logits, sample) - state["base"]
            anchor = (d.exp() - 1 - d).mean()
            total = result["loss"] - training.kl_reg_weight * anchor + weight * anchor
            (total / len(samples)).backward()
            results.append({**{k: float(v) for k, v in result.items() if k != "loss"}, "total_loss": total.item()})
        norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        means = {name: sum(r[name] for r in results) / len(results) for name in results[0]}
        metrics.append({"step": step, **means, "grad_norm": float(norm)})
        if faults.refresh and step < training.steps_per_batch:
            for sample, state in zip(samples, states, strict=True):
                with torch.no_grad():
                    state["old"] = chosen(logprobs(model, sample), sample)
    return metrics


def leave_behind(
    folder: Path,
    faults: Faults = Faults(),
    *,
    training: TrainingConfig = TRAINING,
    mismatch: float = 0.0,
    trainer: Distill | None = None,
    settings: bool = True,
) -> Path:
    """Train, and write what a run leaves: before/, after/, distill_response.json and distill_request.json."""
    model = with_adapter(tiny_model())
    samples = samples_of(model, mismatch=mismatch)
    model.save_pretrained(folder / "before")
    if trainer is None:
        metrics = distill(model, samples, training, faults)
    else:
        metrics = list(trainer(model, samples, training, torch.optim.AdamW)["per_step_metrics"])
    if faults.saves_update:
        model.save_pretrained(folder / "after")
    else:
        import shutil

        shutil.copytree(folder / "before", folder / "after")
    response = {
        "lora_id": "x",
        "metadata": {"per_step_metrics": metrics, "steps_per_batch_applied": len(metrics)},
    }
    (folder / "distill_response.json").write_text(json.dumps(response))
    request = {"samples": [asdict(sample) for sample in samples]}
    if settings:
        request["training"] = asdict(training)  # type: ignore[assignment]
    (folder / "distill_request.json").write_text(json.dumps(request))
    return folder
