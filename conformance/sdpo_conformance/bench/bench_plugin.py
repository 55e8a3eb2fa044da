"""pytest plugin of the worker processes: the cells of a plan as benchmarks, and where they ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdpo_conformance.bench.bench_cells import SESSION, read_plan, record_path, write_json


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-folder", type=Path, required=True, help="folder with the plan; records go there")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cells without a record: a worker that follows a crashed one goes on where that stopped."""
    folder = metafunc.config.getoption("--bench-folder")
    cells, _ = read_plan(folder)
    left = [cell for cell in cells if not record_path(folder, cell).exists()]
    metafunc.parametrize("bench_cell", left, ids=[cell.name for cell in left])


@pytest.fixture
def bench_folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.config.getoption("--bench-folder")
    return folder


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Write down the machine and the commit, once, in pytest-benchmark's own words."""
    config = session.config
    path = config.getoption("--bench-folder") / SESSION
    if path.exists():
        return
    import pytest_benchmark

    machine = config.hook.pytest_benchmark_generate_machine_info(config=config)
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=machine)
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    write_json(path, {"machine_info": machine, "commit_info": commit, "version": pytest_benchmark.__version__})


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what decides about these numbers: the device and the libraries."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    cells, _ = read_plan(config.getoption("--bench-folder"))
    device = cells[0].work.device if cells else "cpu"
    machine_info["device"] = machine_info.get("cpu", {}).get("brand_raw") or machine_info.get("machine", "cpu")
    if device.startswith("cuda") and torch.cuda.is_available():
        machine_info["device"] = torch.cuda.get_device_name(device)
    machine_info["device_type"] = device.partition(":")[0]
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"], machine_info["cuda"] = torch.__version__, torch.version.cuda
    packages = {}
    for name in ("triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "sdpo-conformance"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    machine_info["packages"] = packages
