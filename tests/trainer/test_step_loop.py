"""The bundled step loop on real architectures: right on each, and the model left as it was found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_conformance.specs.claas.step_loop.findings import findings
from sdpo_conformance.trainer.models import LORA_RANK, ModelSpec, adapter_weights, build, frozen_weights
from sdpo_conformance.trainer.observation import run
from sdpo_conformance.trainer.scenarios import BFLOAT16, SCENARIOS, UNRECORDED, samples_of
from sdpo_implementations import reference, step_loop
from sdpo_implementations.causal_lm import require_linear_head, response_hidden, response_logits
from sdpo_implementations.shared_forward import lay_out
from sdpo_implementations.step_loop import Kernels

FROM_LOGITS = Kernels.from_logits(reference.compute_sdpo_loss)
FROM_HIDDEN = Kernels.from_hidden_states(
    reference.compute_fused_sdpo_loss, reference.compute_response_logprobs, reference.compute_teacher_topk
)
KERNELS = {"logits": FROM_LOGITS, "hidden states": FROM_HIDDEN}
FAMILIES = ("qwen3", "llama", "gpt2")
SCENARIO = SCENARIOS[1]


def distill_with(kernels: Kernels) -> Callable[..., Any]:
    def distill(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
        return step_loop.distill(model, samples, training, optimizer_cls, kernels)

    return distill


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("family", "tied"), itertools.product(FAMILIES, (True, False)))
def test_right_on_every_architecture(family: Any, tied: bool, kernels: str) -> None:
    scenario = replace(SCENARIO, model=ModelSpec(family, tied, seed=21), sampler="mismatched")
    observation = run(distill_with(KERNELS[kernels]), scenario, "cpu")
    assert [str(finding.disagreement) for finding in findings(observation)] == []


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_in_bfloat16(family: Any, kernels: str) -> None:
    scenario = replace(BFLOAT16, model=ModelSpec(family, False, seed=22, dtype="bfloat16"))
    observation = run(distill_with(KERNELS[kernels]), scenario, "cpu")
    assert [str(finding.disagreement) for finding in findings(observation)] == []


@pytest.mark.parametrize("kernels", KERNELS)
def test_unrecorded_log_probs_are_stood_in_for(kernels: str) -> None:
    observation = run(distill_with(KERNELS[kernels]), UNRECORDED, "cpu")
    assert [str(finding.disagreement) for finding in findings(observation)] == []
    samples = [replace(sample, response_logprobs=None) for sample in samples_of(UNRECORDED)]
    model = build(UNRECORDED.model)
    result = step_loop.distill(model, samples, UNRECORDED.training, torch.optim.AdamW, KERNELS[kernels])
    assert result["per_step_metrics"][0]["mean_is_ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_gradient_checkpointing_changes_nothing_and_stays_on(family: Any, kernels: str) -> None:
    def distilled(checkpointing: bool) -> tuple[Any, dict[str, Tensor]]:
        model = build(ModelSpec(family, False, seed=23))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        result = step_loop.distill(model, samples_of(SCENARIO), SCENARIO.training, torch.optim.AdamW, KERNELS[kernels])
        assert bool(model.is_gradient_checkpointing) is checkpointing
        return result, adapter_weights(model)

    plain, checkpointed = distilled(False), distilled(True)
    for one, other in zip(plain[0]["per_step_metrics"], checkpointed[0]["per_step_metrics"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name, weight in plain[1].items():
        torch.testing.assert_close(weight, checkpointed[1][name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_model_is_left_as_found(kernels: str) -> None:
    model = build(ModelSpec("qwen3", True, seed=24)).eval()
    next(iter(model.modules()))
    model.get_base_model().model.layers[0].train()
    frozen_by_caller = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen_by_caller.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, untouched = frozen_weights(model), frozen_by_caller.detach().clone()
    training = replace(SCENARIO.training, steps_per_batch=2)
    step_loop.distill(model, samples_of(SCENARIO), training, torch.optim.AdamW, KERNELS[kernels])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(frozen_by_caller, untouched)
    assert all(torch.equal(value, before[name]) for name, value in frozen_weights(model).items())
    assert model.get_model_status().enabled is True


def with_dropout(probability: float) -> Any:
    model = build(ModelSpec("llama", False, seed=25))
    for module in model.modules():
        if isinstance(module, torch.nn.Identity | torch.nn.Dropout):
            continue
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(probability)
    return model.train()


def test_refresh_is_that_of_the_policy_without_dropout() -> None:
    seen: list[Tensor] = []

    def remember(logits: Tensor, response_ids: Tensor) -> Tensor:
        seen.append(FROM_LOGITS.response_logprobs(logits, response_ids))
        return seen[-1]

    model, samples = with_dropout(0.5), samples_of(SCENARIO)
    training = replace(SCENARIO.training, steps_per_batch=2, learning_rate=0.0)
    kernels = replace(FROM_LOGITS, response_logprobs=remember)
    result = step_loop.distill(model, samples, training, torch.optim.AdamW, kernels)
    refreshed = seen[-len(samples) :]
    model.eval()
    for sample, got in zip(samples, refreshed, strict=True):
        ids = torch.tensor([[*sample.prompt_token_ids, *sample.response_token_ids]])
        y = torch.tensor([sample.response_token_ids])
        with torch.no_grad():
            logits = response_logits(model, ids, y.shape[1])
        torch.testing.assert_close(got, FROM_LOGITS.response_logprobs(logits, y))
    ratios = [entry["mean_is_ratio"] for entry in result["per_step_metrics"]]
    assert all(abs(ratio - 1) > 1e-3 for ratio in ratios), "dropout acts in the gradient's forward"


def test_next_forward_refresh_has_ratio_one_under_dropout() -> None:
    model, samples = with_dropout(0.5), samples_of(SCENARIO)
    result = step_loop.distill(model, samples, SCENARIO.training, torch.optim.AdamW, FROM_HIDDEN)
    ratios = [entry["mean_is_ratio"] for entry in result["per_step_metrics"]]
    assert ratios[1:] == pytest.approx([1.0] * (SCENARIO.training.steps_per_batch - 1))


def wrapped(model: Any, modules: Sequence[str] = ("q_proj", "v_proj")) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=LORA_RANK, target_modules=list(modules)))


def tiny(name: str, **more: Any) -> Any:
    torch.manual_seed(2)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=0,
        **more,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


IDS = torch.tensor([[5, 7, 11, 13, 17, 19]])


@pytest.mark.parametrize(
    ("name", "more"), [("Cohere", {"logit_scale": 0.25}), ("Granite", {"logits_scaling": 4.0}), ("Qwen3", {})]
)
def test_hidden_states_carry_the_heads_constant_factor(name: str, more: dict[str, Any]) -> None:
    model = wrapped(tiny(name, **more))
    require_linear_head(model, IDS)
    read = response_hidden(model, lay_out([([5, 7], [11, 13, 17, 19])], IDS.device))
    torch.testing.assert_close(read.hidden @ read.head_weight.T, response_logits(model, IDS, 4))


@pytest.mark.parametrize(
    ("name", "more", "modules", "reason"),
    [
        ("Gemma2", {"final_logit_softcapping": 30.0}, ("q_proj",), "caps its output logits"),
        ("Phi", {}, ("q_proj",), "has a bias"),
        ("Qwen3", {}, ("q_proj", "lm_head"), "adapter on the head"),
    ],
)
def test_a_head_that_is_not_linear_is_refused(
    name: str, more: dict[str, Any], modules: Sequence[str], reason: str
) -> None:
    model = wrapped(tiny(name, **more), modules)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_()
    before = adapter_weights(model)
    sample = Sample([1, 2], [3, 4, 5], [6, 7], [-1.0, -2.0, -3.0])
    with pytest.raises(ValueError, match=reason):
        step_loop.distill(model, [sample], TrainingConfig(), torch.optim.AdamW, FROM_HIDDEN)
    assert all(torch.equal(value, before[key]) for key, value in adapter_weights(model).items())
    result = step_loop.distill(model, [sample], TrainingConfig(), torch.optim.AdamW, FROM_LOGITS)
    assert len(result["per_step_metrics"]) == 1


GOOD = Sample([1, 2], [3, 4, 5], [6, 7], [-1.0, -2.0, -3.0])


@pytest.mark.parametrize(
    ("samples", "training", "words"),
    [
        ([], {}, "at least one sample"),
        (
            [GOOD, replace(GOOD, response_logprobs=[-1.0])],
            {},
            r"samples\[1\].response_logprobs must have one",
        ),
        ([replace(GOOD, response_token_ids=[], response_logprobs=[])], {}, "must not be empty"),
        ([replace(GOOD, prompt_token_ids=[])], {}, "prompt_token_ids must not be empty"),
        ([replace(GOOD, teacher_prompt_token_ids=[67])], {}, "token id 67, outside"),
        ([replace(GOOD, response_logprobs=[-1.0, float("nan"), -1.0])], {}, "has a NaN"),
        ([GOOD], {"steps_per_batch": 0}, "steps_per_batch"),
        ([GOOD], {"alpha": 1.5}, "alpha"),
        ([GOOD], {"is_clip": 0.0}, "is_clip"),
        ([GOOD], {"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    samples: Sequence[Sample], training: dict[str, Any], words: str
) -> None:
    model = build(ModelSpec("qwen3", False, seed=26))
    before = adapter_weights(model)
    with pytest.raises(ValueError, match=words):
        reference.distill(model, samples, replace(TrainingConfig(), **training), torch.optim.AdamW)
    assert all(torch.equal(value, before[name]) for name, value in adapter_weights(model).items())


def test_a_frozen_adapter_is_refused() -> None:
    model = build(ModelSpec("qwen3", False, seed=27))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        reference.distill(model, [GOOD], TrainingConfig(), torch.optim.AdamW)


def test_a_gradient_that_is_not_finite_takes_no_step() -> None:
    model = build(ModelSpec("qwen3", False, seed=28))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    before = adapter_weights(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        reference.distill(model, [GOOD], TrainingConfig(), torch.optim.AdamW)
    now = adapter_weights(model)
    assert all(torch.equal(value.nan_to_num(), now[name].nan_to_num()) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(2, 7, 8, generator=generator), torch.randn(29, 8, generator=generator)
    ids = torch.randint(0, 29, (2, 7), generator=generator)
    truth = (hidden @ head.T).log_softmax(-1)
    monkeypatch.setattr("sdpo_implementations.reference.response_logprobs.CHUNK", chunk)
    monkeypatch.setattr("sdpo_implementations.reference.teacher_topk.CHUNK", chunk)
    torch.testing.assert_close(
        reference.compute_response_logprobs(hidden, head, ids),
        truth.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
    )
    logprobs, indices = reference.compute_teacher_topk(hidden, head, 5)
    torch.testing.assert_close(logprobs, truth.topk(5, dim=-1).values)
    assert torch.equal(indices, truth.topk(5, dim=-1).indices)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        reference.compute_response_logprobs(torch.zeros(1, 2, 3), torch.zeros(5, 4), torch.zeros(1, 2).long())
    with pytest.raises(ValueError, match="response_ids must be"):
        reference.compute_response_logprobs(torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match="do not fit"):
        reference.compute_teacher_topk(torch.zeros(2, 3), torch.zeros(5, 3), 1)
