"""`sdpo-conformance bench`: the command line of the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sdpo_conformance.bench.workloads import Workload


def bench(
    context: typer.Context,
    implementations: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMPL...",
            help="as in `run`; the first is what ratios refer to; compile:IMPL is its loss through torch.compile",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="add the published packages that are installed")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="small shapes and few rounds: minutes on a laptop")] = False,
    full: Annotated[bool, typer.Option("--full", help="the whole plan even on a CPU: hours")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    dtype: Annotated[str, typer.Option(help="default: bfloat16 on CUDA, float32 on the CPU")] = "",
    workload: Annotated[
        list[str] | None, typer.Option(help="qwen3-0.6b, qwen3-8b, llama-3.2-1b, 32b or laptop (repeatable)")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="response tokens (repeatable)")] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(help="forward, forward+backward, log-probs, top-k or step (repeatable)"),
    ] = None,
    samples: Annotated[list[int] | None, typer.Option(help="samples of a step's batch (repeatable)")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    anchor: Annotated[list[float] | None, typer.Option(help="kl_reg_weight; 0 is off (repeatable)")] = None,
    support: Annotated[
        str,
        typer.Option(
            metavar="uniform|zipf|FILE",
            help="how tokens share ids of the teacher's support; FILE: recorded teacher_indices (.safetensors)",
        ),
    ] = "uniform",
    out: Annotated[Path, typer.Option(help="folder for benchmark.json, results.md and the plots")] = Path(
        ".sdpo-conformance/bench"
    ),
    compare: Annotated[
        Path | None, typer.Option(metavar="BASELINE.json", help="benchmark.json of an earlier run: flag regressions")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="seconds after which no further row is begun")] = None,
    row_timeout: Annotated[float, typer.Option(help="seconds after which a row is given up")] = 300.0,
) -> None:
    """Time implementations on the same work beside the bare product h @ W.T, with memory and error.

    Exit status: 0 measured, 1 regressions or wrong answers, 2 nothing could be measured, 128 and the signal's number
    where a signal ended it: the rows that were done are printed, and no file is written.
    """
    from sdpo_conformance.bench.workloads import Selection
    from sdpo_conformance.running.options import RunError

    if not implementations and not peers:
        print(f"{context.get_help()}\n\nsdpo-conformance bench: name an implementation, or --peers", file=sys.stderr)
        raise typer.Exit(2)
    if device == "cpu" and not (quick or full or workload or tokens or direction or samples):
        print("sdpo-conformance bench: on the CPU with --quick; --full runs the whole plan", file=sys.stderr)
        quick = True
    selection = Selection(
        workload or (), tokens or (), direction or (), alpha or (), anchor or (), dtype, device, quick, support,
        samples or (),
    )  # fmt: skip
    try:
        status = run_command(
            implementations or [], peers, selection, out, compare, time_limit=time_limit, row_timeout=row_timeout
        )
    except (RunError, OSError, ValueError) as error:
        print(f"sdpo-conformance bench: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


def run_command(
    implementations: list[str],
    peers: bool,
    selection: Any,
    out: Path,
    baseline_path: Path | None,
    *,
    time_limit: float | None,
    row_timeout: float,
) -> int:
    """Check, measure, write and print; the exit status. Raises RunError in one line."""
    from rich.console import Console

    from sdpo_conformance.bench.bench_process import measured_so_far, run_bench
    from sdpo_conformance.bench.bench_results import rows_of
    from sdpo_conformance.bench.bench_table import print_changes, print_run
    from sdpo_conformance.bench.comparing import changes, comparable, read_document
    from sdpo_conformance.bench.markdown import markdown
    from sdpo_conformance.bench.peers import PEERS
    from sdpo_conformance.bench.plots import write_plots
    from sdpo_conformance.bench.workloads import NOTHING_LEFT, plan, problems
    from sdpo_conformance.files import write_text
    from sdpo_conformance.report.progress import progress_on_terminal
    from sdpo_conformance.running.children import Interrupted
    from sdpo_conformance.running.folder import staged
    from sdpo_conformance.running.options import RunError

    baseline = read_document(baseline_path) if baseline_path is not None else None
    targets = list(dict.fromkeys([*implementations, *(PEERS if peers else ())]))
    selection, complaints = problems(selection)
    for line in filter(NOTHING_LEFT.__ne__, complaints):
        print(f"sdpo-conformance bench: {line}", file=sys.stderr)
    check_place(selection.device, selection.dtype)
    works = plan(selection)
    check_support(works)
    check_tools()
    if NOTHING_LEFT in complaints:
        raise RunError(NOTHING_LEFT)
    found = None
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    with staged(out) as stage:
        try:
            with progress_on_terminal() as progress:
                document = run_bench(
                    works, targets, stage, time_limit=time_limit, cell_timeout=row_timeout, progress=progress
                )
            if baseline is not None:
                comparable(baseline, document)
                found = changes(baseline, document)
            write_text(stage / "results.md", markdown(document, targets, found))
            plots = write_plots(document, targets, stage)
        except Interrupted as signalled:
            document, done, planned = measured_so_far(stage, works, targets)
            if done:
                print_run(document, targets, console)
            signalled.rest = f"{done} of {planned} rows were done. No file is written, and earlier results stay."
            raise
    print_run(document, targets, console)
    if found is not None:
        print_changes(found, str(baseline_path), console)
    files = ["benchmark.json", "results.md", *(path.name for path in plots if path.suffix == ".png")]
    console.print(f"written to {out}: {', '.join(files)}", markup=False)
    rows = rows_of(document)
    if not any(row.measured for row in rows):
        raise RunError("nothing could be measured; the reasons are above")
    regressed = any(change.worse for change in found or ())
    return 1 if regressed or any(row.bad for row in rows) else 0


def check_place(device: str, dtype: str) -> None:
    """Raise RunError for a device or dtype that is not there."""
    from sdpo_conformance.protocol import DTYPE_NAMES
    from sdpo_conformance.running.options import RunError

    if dtype and dtype not in DTYPE_NAMES:
        raise RunError(f"no dtype {dtype!r}; dtypes: {', '.join(DTYPE_NAMES)}")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise RunError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RunError(f"--device={device}: PyTorch {torch.__version__} sees no CUDA device")
        if index and int(index) >= torch.cuda.device_count():
            raise RunError(f"--device={device}: there are {torch.cuda.device_count()} CUDA devices")


def check_support(works: list[Workload]) -> None:
    """Raise RunError for a file of supports that cannot serve one of the works."""
    from sdpo_conformance.bench.supports import recorded_support
    from sdpo_conformance.bench.workloads import SUPPORTS
    from sdpo_conformance.running.options import RunError

    for work in works:
        if work.support not in SUPPORTS:
            try:
                recorded_support(work.support, work.tokens, work.top_k, work.head.vocabulary)
            except ValueError as error:
                raise RunError(f"--support: {error}") from None


def check_tools() -> None:
    """Raise RunError where what a benchmark is built on is not installed."""
    from importlib.util import find_spec

    from sdpo_conformance.running.options import RunError

    for module, package in (("pytest_benchmark", "pytest-benchmark"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise RunError(f"{package} is not installed: pip install 'sdpo-conformance[bench]'")
