"""Samples that share a forward: the same step as one sample at a time, or a refusal that names why not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_conformance.bench.memory import MIB, cpu_peak
from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_implementations import packed_attention, reference, step_loop
from sdpo_implementations.micro_batches import activation_bytes_per_token, micro_batches
from sdpo_implementations.packed_attention import can_pack
from sdpo_implementations.step_loop import Kernels

KERNELS = Kernels.from_hidden_states(
    reference.compute_fused_sdpo_loss, reference.compute_response_logprobs, reference.compute_teacher_topk
)
TRAINING = TrainingConfig(
    steps_per_batch=2, teacher_top_k=5, kl_reg_weight=0.3, learning_rate=1e-2, is_clip=3.0, max_grad_norm=0.5
)
VOCABULARY = 37


def samples(seed: int = 0) -> list[Sample]:
    """Seven of uneven length, two of them equal, one without recorded log-probs, one of a single token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()  # type: ignore[no-any-return]

    sizes = [(2, 6, 3), (5, 1, 9), (1, 9, 4), (4, 3, 4), (3, 4, 1), (6, 2, 7)]
    made = [Sample(ids(p), ids(t), ids(q), (-3 * torch.rand(t, generator=generator)).tolist()) for p, t, q in sizes]
    made[3] = replace(made[3], response_logprobs=None)
    return [*made, made[2]]


def tiny(name: str, **more: Any) -> Any:
    """A causal language model with every weight random and large."""
    arguments: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
    }
    if name == "GPT2":
        arguments = {"vocab_size": VOCABULARY, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
        arguments |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(2)
    config = getattr(transformers, f"{name}Config")(**(arguments | more))
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    return model


def adapted(model: Any, **arguments: Any) -> Any:
    """With LoRA, its B away from zero."""
    torch.manual_seed(3)
    targets = ["c_attn", "c_proj"] if isinstance(model, transformers.GPT2LMHeadModel) else ["q_proj", "o_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**({"r": 4, "target_modules": targets} | arguments)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped


class Recorded(torch.optim.AdamW):
    """AdamW that remembers the gradients of each step."""

    seen: ClassVar[list[list[Tensor]]] = []

    def step(self, closure: Any = None) -> None:
        Recorded.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        super().step(closure)


def step_of(model: Any, budget: int | None, kernels: Kernels = KERNELS) -> tuple[list[Any], list[list[Tensor]]]:
    Recorded.seen = []
    result = step_loop.distill(model, samples(), TRAINING, Recorded, kernels, budget)
    return list(result["per_step_metrics"]), Recorded.seen


def assert_same(one: tuple[list[Any], list[list[Tensor]]], other: tuple[list[Any], list[list[Tensor]]]) -> None:
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    for mine, theirs in zip(one[1], other[1], strict=True):
        for gradient, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=2e-5)


MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", {}, True),
    "qwen2": ("Qwen2", {}, True),
    "qwen3": ("Qwen3", {}, True),
    "mistral": ("Mistral", {"sliding_window": None}, True),
    "gpt2, learned positions": ("GPT2", {}, True),
    "tied head": ("Qwen3", {"tie_word_embeddings": True}, True),
    "eager": ("Llama", {"attn_implementation": "eager"}, False),
    "sliding window": ("Mistral", {"sliding_window": 3}, False),
    "some layers sliding": ("Qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, False),
    "softcapped attention": ("Gemma2", {"final_logit_softcapping": None, "attn_implementation": "eager"}, False),
    "logit scale": ("Cohere", {"logit_scale": 0.25}, False),
    "logits scaling": ("Granite", {"logits_scaling": 4.0}, False),
}


@pytest.mark.parametrize("label", MODELS)
def test_shared_forwards_are_those_of_one_sample_at_a_time(label: str) -> None:
    name, more, packs = MODELS[label]
    alone = step_of(adapted(tiny(name, **more)), None, Kernels.from_logits(reference.compute_sdpo_loss))
    for budget in (None, 26):
        model = adapted(tiny(name, **more))
        assert can_pack(model) is packs
        assert_same(step_of(model, budget), alone)
        assert model.get_base_model().config._attn_implementation == more.get("attn_implementation", "sdpa")


@pytest.mark.parametrize(
    "arguments", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}, {"bias": "lora_only"}]
)
def test_other_adapters_in_the_decoder(arguments: dict[str, Any]) -> None:
    alone = step_of(adapted(tiny("Llama"), **arguments), None, Kernels.from_logits(reference.compute_sdpo_loss))
    assert_same(step_of(adapted(tiny("Llama"), **arguments), None), alone)


def one_call(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    """What ``torch.nn.attention.varlen`` computes, which a CPU has not, one sequence after the other."""
    ends = bounds.tolist()
    assert longest == max(end - start for start, end in itertools.pairwise(ends))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor[start:end].transpose(0, 1) for tensor in (query, key, value)),
            is_causal=True, scale=scale, enable_gqa=True,
        ).transpose(0, 1)
        for start, end in itertools.pairwise(ends)
    ]  # fmt: skip
    return torch.cat(parts)


@pytest.mark.parametrize("label", ["qwen3", "gpt2, learned positions"])
def test_uneven_sequences_are_one_call_where_torch_has_it(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, more, _ = MODELS[label]
    plain = step_of(adapted(tiny(name, **more)), None)
    calls: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return one_call(*arguments)

    monkeypatch.setattr(packed_attention, "in_one_call", lambda query: True)
    monkeypatch.setattr(packed_attention, "variable_length_attention", lambda: counted)
    assert_same(step_of(adapted(tiny(name, **more)), None), plain)
    assert len(calls) == 2 * 4, "two layers: base, teacher, and the two steps' student"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("packs", [True, False])
def test_gradient_checkpointing(reentrant: bool, packs: bool) -> None:
    attention = {} if packs else {"attn_implementation": "eager"}
    plain = step_of(adapted(tiny("Qwen3", **attention)), None)
    model = adapted(tiny("Qwen3", **attention))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step_of(model, None), plain)


def test_dropout_leaves_a_ratio_of_one_after_the_first_step() -> None:
    model = adapted(tiny("Qwen3"), lora_dropout=0.5)
    metrics, _ = step_of(model, None)
    assert metrics[1]["mean_is_ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics[1]["clip_fraction"] == 0


HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "fresh LoRA": ("Qwen3", {}, {"target_modules": ["q_proj", "lm_head"]}, "adapter on the head"),
    "DoRA": ("Qwen3", {}, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "DoRA"),
    "modules_to_save": ("Qwen3", {}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "bias": ("Phi", {}, {"target_modules": ["q_proj"]}, "has a bias"),
    "softcap": ("Gemma2", {"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping"),
}


@pytest.mark.parametrize("label", HEADS)
def test_heads_that_are_more_than_a_weight_are_refused_by_name(label: str) -> None:
    """Also where they do nothing yet: a fresh B is zero, and still has a gradient."""
    name, more, arguments, reason = HEADS[label]
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny(name, **more), peft.LoraConfig(**({"target_modules": ["q_proj"]} | arguments)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        step_of(model, None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_virtual_tokens_are_refused_by_name() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        step_of(peft.get_peft_model(tiny("Qwen3"), config), None)


def test_a_head_with_an_unknown_multiplier_and_a_look_ahead_are_refused() -> None:
    model = adapted(tiny("Qwen3"))
    model.get_base_model().lm_head.register_forward_hook(lambda module, arguments, output: output * 1.01)
    with pytest.raises(ValueError, match=r"not hidden @ head\.T"):
        step_of(model, None)
    model = adapted(tiny("Qwen3"))
    model.get_base_model().model.layers[0].register_forward_hook(
        lambda module, arguments, output: output + output.mean(1, keepdim=True)
    )
    with pytest.raises(ValueError, match="see the tokens after it"):
        step_of(model, None)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.integers(1, 120),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_every_sample_is_in_one_forward_within_the_budget(lengths: Sequence[int], budget: int, packed: bool) -> None:
    groups = micro_batches(lengths, budget, packed)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        inside = [lengths[index] for index in group]
        assert len(group) == 1 or (sum(inside) if packed else max(inside) * len(inside)) <= budget


def test_forwards_are_evened_out_without_becoming_more() -> None:
    assert [len(group) for group in micro_batches([704] * 8, 4096, packed=True)] == [4, 4]
    assert [len(group) for group in micro_batches([704] * 8, 704 * 8, packed=True)] == [8]


@pytest.mark.parametrize("budget", [0, -1, 1.5, True])
def test_a_budget_out_of_range_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="token_budget"):
        step_of(adapted(tiny("Qwen3")), budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_the_stated_bytes_per_token(dtype: torch.dtype, checkpointing: bool) -> None:
    """The growth of the peak with the number of samples in one forward; the constant part drops out."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 8}
    torch.manual_seed(2)
    model = adapted(tiny("Qwen3", **sizes, head_dim=32, num_key_value_heads=4, max_position_embeddings=128).to(dtype))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sample, training = Sample([1] * 64, [2] * 64, [3] * 64, [-4.0] * 64), TrainingConfig(teacher_top_k=4)

    def peak(count: int) -> float:
        measured = cpu_peak(
            lambda: step_loop.distill(model, [sample] * count, training, torch.optim.AdamW, KERNELS, 10_000)
        )
        assert measured is not None
        return measured * MIB

    measured = (peak(4) - peak(2)) / (2 * 128)
    stated = activation_bytes_per_token(model, 128)
    assert measured <= stated <= 3 * measured
