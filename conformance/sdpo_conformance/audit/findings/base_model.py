"""Whether two names of base models can be of the same model: a hub's name, a local path, a cache, a quantised copy."""

from __future__ import annotations

import re

from sdpo_conformance.audit.findings.model import Severity

#: Words in a name that say how the same weights are stored.
_STORAGE = re.compile(
    r"[-_.](?:unsloth|bnb|4bit|8bit|int4|int8|fp4|fp8|nf4|fp16|bf16|f16|awq|gptq|gguf|mlx|hf|dynamic|dequantized)"
    r"(?=[-_.]|$)"
)
_REVISION = re.compile(r"[0-9a-f]{12,}")


def other_base(old: object, new: object) -> Severity | None:
    """How sure it is that two names are of different models; None where they may be the same.

    Two names of a hub that differ are different models (Qwen3-8B and Qwen3-8B-Base, too). A local folder may be
    called anything, so that it is a warning at most.
    """
    if not isinstance(old, str) or not isinstance(new, str) or not old or not new:
        return None
    one, two = _model(old), _model(new)
    if one == two or not one or not two:
        return None
    local = [_is_local(text) for text in (old, new)]
    if any(local) and (one.startswith(two) or two.startswith(one)):
        return None  # a folder named after the model, with something of its own behind it
    return Severity.WARNING if any(local) else Severity.ERROR


def _model(text: str) -> str:
    """The model's own name, lower case, without owner, folder, and words of storage; empty where nothing says it."""
    parts = [part for part in text.replace("\\", "/").split("/") if part]
    for part in parts:
        if part.startswith("models--"):  # huggingface_hub's cache: models--owner--name/snapshots/revision
            parts = [part.split("--")[-1]]
    name = parts[-1].lower().replace("___", ".") if parts else ""  # modelscope's cache writes ___ for a dot
    if _REVISION.fullmatch(name):
        return ""
    return _STORAGE.sub("", name)


def _is_local(text: str) -> bool:
    if "models--" in text:
        return False
    return text.startswith(("/", ".", "~")) or text.replace("\\", "/").count("/") > 1
