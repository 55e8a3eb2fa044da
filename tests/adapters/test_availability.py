"""Without its peer an adapter says in one line what to install; the package itself needs none."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from sdpo_implementations.adapters.availability import NotInstalled, require

ADAPTERS = {
    "claas": ("claas.training.sdpo_loss", "pip install git+https://github.com/kfallah/CLaaS"),
    "lasgroup_sdpo": ("verl.trainer.ppo.core_algos", "pip install git+https://github.com/lasgroup/SDPO"),
    "trl_sdpo": ("trl.experimental.sdpo.sdpo_trainer", "pip install 'trl>=1.16'"),
    "liger_chunked_jsd": ("liger_kernel.chunked_loss", "pip install liger-kernel"),
    "liger_triton_jsd": ("liger_kernel.transformers.fused_linear_jsd", "pip install liger-kernel"),
    "liger_scaled_cross_entropy": (
        "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        "pip install 'liger-kernel[cutedsl]'",
    ),
    "quack_linear_cross_entropy": ("quack.epilogue.library", "pip install 'quack-kernels[cu13]'"),
    "verl_linear_cross_entropy": ("verl.utils.kernel.linear_cross_entropy", "pip install verl"),
    "torch_linear_cross_entropy": ("torch.nn.functional", "pip install 'torch>=2.13'"),
    "cut_cross_entropy": ("cut_cross_entropy", "pip install cut-cross-entropy"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_missing_peer_is_one_line_with_the_command(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, command = ADAPTERS[adapter]
    name = f"sdpo_implementations.adapters.{adapter}"
    monkeypatch.setitem(sys.modules, peer, None)  # what Python itself puts there to block an import
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(NotInstalled) as raised:
        importlib.import_module(name)
    message = str(raised.value)
    assert message.startswith(f"not installed: {peer} (")
    assert command in message
    assert "\n" not in message


def test_another_package_of_the_same_name_is_not_the_peer() -> None:
    with pytest.raises(NotInstalled, match="no attribute 'compute_sdpo_loss'"):
        require("json", "compute_sdpo_loss", "pip install the-right-one")


def test_the_package_imports_no_peer() -> None:
    program = (
        "import sys, sdpo_implementations.adapters; "
        "print([name for name in ('torch', 'claas', 'verl', 'trl', 'liger_kernel', 'cut_cross_entropy')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
