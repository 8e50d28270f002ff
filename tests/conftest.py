"""Fixtures: the same random numbers every time, and memory that is never born clean."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Pools


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20240501)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that what a kernel forgets to write is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever number of threads a test sets, the next one has the number from before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model directory, as a user of the demo would have one."""
    from fused_rl.demo.task import start

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    for part in start(None, 1.0):
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """An export for the Hub, as the command line writes it. Nothing may be written into it."""
    pytest.importorskip("kernels")
    from fused_rl import cli

    folder = tmp_path_factory.mktemp("hub") / "parent" / "export"
    assert cli.main(["export-hub", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pools]:
    """Processes that form a group: `ranks(2).run("cases_of_something", "name", **options)`."""
    pools = Pools()
    yield pools
    pools.stop()
