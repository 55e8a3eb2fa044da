"""Files that nobody vouches for: one clear line, exit status 2, nothing written, nothing run, bounded
memory.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer import Typer
from typer.testing import CliRunner

from sdpo_conformance.audit import AuditError, audit_run
from sdpo_conformance.audit.adapter import blocks
from sdpo_conformance.audit.audit_command import audit
from sdpo_conformance.audit.metrics import read_metrics

from .parts import SOUND, adapter

app = Typer()
app.command()(audit)
GOOD = save(adapter(1))


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "no header": (b"\0" * 8, "not JSON"),
    "truncated": (GOOD[:-5], "truncated"),
    "truncated header": (GOOD[:40], "header claims"),
    "header length too long": (struct.pack("<Q", 2**63) + GOOD[8:], "header claims"),
    "header length too short": (
        struct.pack("<Q", int.from_bytes(GOOD[:8], "little") - 12) + GOOD[8:],
        "not JSON",
    ),
    "trailing bytes": (GOOD + b"x", "belong to none"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "header claims"),
    "not JSON": (container(b"{nope"), "not JSON"),
    "not an object": (container([1, 2]), "not a JSON object"),
    "not text": (container(b"\xff\xfe\xfd"), "not JSON"),
    "deep nesting": (container(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "duplicate names": (container(b'{"a":{"dtype":"F32"},"a":{}}'), "appears twice"),
    "overlapping": (
        container({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[2], offsets=[4, 12])}, b"\0" * 12),
        "overlaps",
    ),
    "a hole": (container({"a": entry(shape=[1], offsets=[4, 8])}, b"\0" * 8), "belong to none"),
    "offsets backwards": (container({"a": entry(shape=[1], offsets=[4, 0])}, b"\0" * 4), "offsets span -4"),
    "offsets beyond the file": (container({"a": entry(shape=[9], offsets=[0, 36])}, b"\0" * 4), "truncated"),
    "huge shape": (container({"a": entry(shape=[2**40, 2**40], offsets=[0, 4])}, b"\0" * 4), "takes"),
    "huge dimension": (
        container({"a": entry(shape=[10**30], offsets=[0, 4])}, b"\0" * 4),
        "not a list of sizes",
    ),
    "negative shape": (container({"a": entry(shape=[-1], offsets=[0, 4])}, b"\0" * 4), "not a list of sizes"),
    "true as a size": (
        container({"a": entry(shape=[True], offsets=[0, 4])}, b"\0" * 4),
        "not a list of sizes",
    ),
    "fractional shape": (
        container({"a": entry(shape=[1.0], offsets=[0, 4])}, b"\0" * 4),
        "not a list of sizes",
    ),
    "unknown dtype": (container({"a": entry(dtype="F7", shape=[1])}, b"\0" * 4), "dtype 'F7'"),
    "dtype of a wrong type": (container({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}), "dtype"),
    "no entry": (container({"a": 3}), "expected dtype, shape and data_offsets"),
    "a pickle by another name": (pickle.dumps({"a": 1}), "header claims"),
    "terminal escapes": (container({"\x1b[31mred": entry(dtype="F7")}), "\\x1b[31mred"),
}


def refusal(*arguments: str) -> str:
    """Run the command; it must refuse in one line on stderr, with status 2, and print nothing else."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("audit: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.isprintable() or result.stderr[:-1].isprintable()
    assert len(result.stderr) < 700
    return result.stderr


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_none(name: str, tmp_path: Path) -> None:
    data, words = WEIGHTS[name]
    (tmp_path / "after.safetensors").write_bytes(data)
    listing = sorted(os.listdir(tmp_path))
    told = refusal(str(tmp_path), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    assert words in told
    assert "after.safetensors" in told
    assert sorted(os.listdir(tmp_path)) == listing


METRICS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "not JSON": (b"step,loss\n1,0.5\n", "is not JSON"),
    "half a document": (json.dumps(SOUND).encode()[:-20], "is not JSON"),
    "not text": (b"\xff\xfe\x00\x01", "not UTF-8"),
    "deep nesting": (b"[" * 500_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "a number": (b"42", "expected a JSON object or array"),
    "null": (b"null", "expected a JSON object or array"),
    "an empty array": (b"[]", "holds no per-step metrics"),
    "other JSON": (b'{"hello": "world"}', "no per-step metrics"),
    "rows of numbers": (b"[1, 2, 3]", "not an object of metrics"),
    "duplicate keys": (b'[{"step": 1, "kl_reg": 0.1, "kl_reg": 9.0}]', "'kl_reg' appears twice"),
    "words for numbers": (b'[{"step": 1, "kl_reg": "much"}]', "kl_reg is 'much', not a number"),
    "true for a number": (b'[{"step": 1, "kl_reg": true}]', "not a number"),
    "an object for a number": (b'[{"step": 1, "kl_reg": {}}]', "not a number"),
    "a step that is none": (b'[{"step": "first", "kl_reg": 0.1}]', "not a step number"),
    "a negative step": (b'[{"step": -1, "kl_reg": 0.1}]', "not a step number"),
    "a step without end": (b'[{"step": 1e999, "kl_reg": 0.1}]', "not a step number"),
    "endless digits": (b'[{"step": 1, "kl_reg": ' + b"9" * 5000 + b"}]", "is not JSON that can be read"),
    "one broken line": (b'{"step": 1, "kl_reg": 0.1}\n{"step": 2, "kl_reg"\n', "line 2"),
    "metrics of a wrong type": (b'{"metadata": {"per_step_metrics": "none"}}', "must be a list"),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_that_are_none(name: str, tmp_path: Path) -> None:
    data, words = METRICS[name]
    (tmp_path / "metrics.json").write_bytes(data)
    assert words in refusal(str(tmp_path))


def test_metrics_too_large(tmp_path: Path) -> None:
    with open(tmp_path / "metrics.json", "wb") as file:
        file.truncate(2**34)
    assert "larger than 16 MiB" in refusal(str(tmp_path))


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.json")  # opening it for reading would wait for ever
    assert "is a pipe, socket or device" in refusal(str(tmp_path))
    os.mkfifo(tmp_path / "after.safetensors")
    assert "is a pipe" in refusal("--after", str(tmp_path / "after.safetensors"))
    assert "is a pipe" in refusal("--metrics", "/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tmp_path)
        listener.bind("socket")
        assert "is a pipe, socket" in refusal("--metrics", "socket")


def test_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened" in refusal("--metrics", str(tmp_path / "loop"))
    (tmp_path / "metrics.json").symlink_to(tmp_path / "nowhere")
    assert "No such file" in refusal(str(tmp_path))
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "blob").write_text(json.dumps(SOUND))  # caches of models are made of links: these are right
    (tmp_path / "metrics.json").symlink_to(tmp_path / "blob")
    assert audit_run(tmp_path).findings == ()


def test_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").mkdir()
    assert "is a folder without .json" in refusal(str(tmp_path))
    (tmp_path / "after").mkdir()
    assert "neither adapter_model.safetensors nor adapter_config.json" in refusal("--after", str(tmp_path / "after"))
    (tmp_path / "after" / "adapter_model.safetensors").mkdir()
    assert "is a folder where a file was expected" in refusal("--after", str(tmp_path / "after"))
    assert "is a folder" in refusal(str(tmp_path), "--config", str(tmp_path), "--metrics", str(tmp_path))


def test_nothing_to_look_at(tmp_path: Path) -> None:
    assert "nothing to look at" in refusal(str(tmp_path))
    assert "nothing to look at" in refusal()
    assert "No such file" in refusal(str(tmp_path / "nowhere"))
    assert "No such file" in refusal(str(tmp_path), "--after", str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "after.bin", "after.pt"])
def test_pickles_are_refused_with_the_way_to_convert_them(name: str, tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    if name.startswith("adapter"):
        (tmp_path / "after").mkdir()
        path = tmp_path / "after" / name
        named = path.parent
    else:
        path = named = tmp_path / name
    torch.save({"a": Boom()}, path)
    told = refusal("--after", str(named))
    assert "is a pickle" in told
    assert "save_file" in told
    assert not (tmp_path / "ran").exists()


def test_optimizer_state_is_never_unpickled(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    after = tmp_path / "after"
    after.mkdir()
    (after / "adapter_model.safetensors").write_bytes(GOOD)
    torch.save({"state": Boom()}, after / "optimizer_state.pt")
    audit_run(tmp_path)
    (after / "optimizer_state.pt").write_bytes(pickle.dumps(Boom()))  # before torch 1.6: no archive at all
    audit_run(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_optimizer_archives_that_are_broken(tmp_path: Path) -> None:
    after = tmp_path / "after"
    after.mkdir()
    (after / "adapter_model.safetensors").write_bytes(GOOD)
    state = after / "optimizer_state.pt"
    state.write_bytes(b"PK\x03\x04" + b"\0" * 64)
    assert "not a whole torch archive" in refusal(str(tmp_path))
    with zipfile.ZipFile(state, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", b"\0" * 4)  # a compressed counter is none of torch's: it is not read
    assert audit_run(tmp_path).evidence.optimizer_after is not None
    raw = bytearray(state.read_bytes())
    raw[-10:-6] = (2**31).to_bytes(4, "little")  # the directory's size, in the archive's last record
    state.write_bytes(raw)
    assert "not a whole torch archive" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a JSON object"),
        ('{"is_clip": "five"}', "is_clip must be a finite number"),
        ('{"steps_per_batch": 0}', "positive whole number"),
        ('{"samples": 3}', "samples must be a list"),
        ('{"samples": [{"prompt_token_ids": [1], "response_token_ids": []}]}', "non-empty list of token ids"),
        ('{"samples": [{"prompt_token_ids": [-1], "response_token_ids": [1]}]}', "token ids only"),
        (
            ('{"samples": [{"prompt_token_ids": [1], "response_token_ids": [1], "response_logprobs": [0, 0]}]}'),
            "1 response tokens and 2 log-probs",
        ),
    ],
)
def test_settings_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(SOUND))
    (tmp_path / "training.json").write_text(text)
    assert words in refusal(str(tmp_path))


@pytest.mark.parametrize("shape", [(), (0, 5), (7,), (3, 5, 2), (2, 1, 100), (1, 64), (50, 3)])
@pytest.mark.parametrize("limit", [1, 4, 10, 1000])
def test_blocks_cover_every_element_once(shape: tuple[int, ...], limit: int) -> None:
    counted = torch.zeros(shape, dtype=torch.int64)
    for where in blocks(shape, limit):
        assert counted[where].numel() <= limit
        counted[where] += 1
    assert bool((counted == 1).all())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_adapter_in_little_memory(tmp_path: Path) -> None:
    """Two sparse 512 MiB adapters of one tensor each, within 256 MiB of memory of the audit's own."""
    elements = 2**27
    header = json.dumps({"m.lora_B.weight": entry(shape=[2, elements // 2], offsets=[0, 4 * elements])}).encode()
    for name in ("before", "after"):
        with open(tmp_path / f"{name}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 4 * elements)
    program = textwrap.dedent("""
        import re, sys, threading, time
        from pathlib import Path
        import torch, safetensors
        from sdpo_conformance.audit import audit_run
        torch.set_num_threads(1)

        def used():  # mapped files apart: the system drops their pages when it needs the room
            return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

        start, peak, done = used(), 0, False
        def watch():
            global peak
            while not done:
                peak = max(peak, used())
                time.sleep(0.005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        report = audit_run(Path(sys.argv[1]))
        done = True
        watcher.join()
        assert report.evidence.change.tensors[0].numel == 2**27
        assert peak - start < 256 * 2**20, peak - start
        print((peak - start) // 2**20, [finding.id for finding in report.findings])
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "weights-unchanged" in done.stdout


def test_metrics_of_many_rows_are_read_in_reasonable_time(tmp_path: Path) -> None:
    rows = [{**SOUND[n % 4], "step": n + 1, "kl_reg": 0.1 + 1e-7 * n} for n in range(50_000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_metrics(tmp_path / "metrics.jsonl").steps) == 50_000


def test_python_users_get_the_exception(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="nothing to look at"):
        audit_run(tmp_path)
