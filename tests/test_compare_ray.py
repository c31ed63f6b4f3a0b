"""Cells on a real Ray cluster of two nodes, a worker of which is killed in the middle of its cell."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from eval.compare import cell as cells
from eval.compare import engines
from eval.compare.grid import Cell, Plan
from eval.compare.settings import CompareSettings
from singlora_diffusion.settings import build

ray = pytest.importorskip("ray", reason="needs ray: pip install 'singlora-diffusion[ray]'")

TODO = [Cell(f"s{number}", "lora", 1e-3) for number in range(8)]
KILLED = TODO[3]


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of this machine with two nodes of one processor each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield
    finally:
        cluster.shutdown()


def work(plan: Plan, cell: Cell) -> None:
    """In place of `cell.run`: writes down who begins a cell, waits, and writes down that it is done."""
    note = plan.folder(cell).parent / "lines.txt"
    note.parent.mkdir(parents=True, exist_ok=True)
    for word in ("begun", "done"):
        with note.open("a") as file:
            file.write(f"{word} {os.getpid()} {ray.get_runtime_context().get_node_id()}\n")
        if word == "begun":
            time.sleep(30 if cell == KILLED and note.read_text().count("begun") == 1 else 0.3)


def lines(plan: Plan, cell: Cell) -> list[list[str]]:
    note = plan.folder(cell).parent / "lines.txt"
    return [line.split() for line in note.read_text().splitlines()] if note.exists() else []


def test_a_killed_worker_loses_nothing_and_repeats_nothing(
    two_nodes: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cells, "run", work)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find test modules
    plan = Plan(build(CompareSettings, output_dir=tmp_path, engine="ray", workers=2), {}, tmp_path, {})

    def kill() -> None:
        while not (begun := lines(plan, KILLED)):
            time.sleep(0.1)
        os.kill(int(begun[0][1]), signal.SIGKILL)

    Thread(target=kill, daemon=True).start()
    done = list(engines.engine(plan)(plan, TODO))
    assert Counter(done) == Counter(TODO)
    words = {cell: [line[0] for line in lines(plan, cell)] for cell in TODO}
    assert words.pop(KILLED) == ["begun", "begun", "done"]
    assert all(told == ["begun", "done"] for told in words.values())
    assert len({line[2] for cell in TODO for line in lines(plan, cell)}) == 2  # both nodes worked
