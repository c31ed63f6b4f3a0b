"""Who runs the cells: processes that die, and a Ray that is stood in for by its contract."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from eval.compare import cell as cells
from eval.compare import engines
from eval.compare.grid import Cell, Plan
from eval.compare.settings import CompareSettings
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import build

TODO = [Cell(f"s{number}", "lora", 1e-3) for number in range(5)]


def plan(tmp_path: Path, **flags: Any) -> Plan:
    return Plan(build(CompareSettings, output_dir=tmp_path, **flags), {}, tmp_path, {})


class Pool:
    """A process pool whose workers die on the cells that `deaths` names, so often."""

    deaths: dict[str, int]
    opened = 0

    def __init__(self, *_: object, **__: object) -> None:
        Pool.opened += 1
        self.broken = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, **_: object) -> None: ...

    def submit(self, work: Callable[..., None], plan: Plan, cell: Cell) -> Future[None]:
        future: Future[None] = Future()
        if self.deaths.get(cell.subject, 0) > 0 and not self.broken:
            self.broken = True
            self.deaths[cell.subject] -= 1
        if self.broken:
            future.set_exception(BrokenProcessPool())
        else:
            work(plan, cell)
            future.set_result(None)
        return future


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that were run, in their order."""
    found: list[Cell] = []
    monkeypatch.setattr(cells, "run", lambda plan, cell: found.append(cell))
    monkeypatch.setattr(engines, "ProcessPoolExecutor", Pool)
    Pool.opened = 0
    return found


def test_a_worker_that_dies_costs_no_cell(ran: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pool.deaths = {"s2": 2}
    done = list(engines.processes(plan(tmp_path, workers=2), TODO))
    assert sorted(map(str, done)) == sorted(map(str, TODO)) and Pool.opened == 3
    assert "a worker died" in capsys.readouterr().err
    assert len(ran) >= len(TODO)


def test_workers_that_always_die_are_named(ran: list[Cell], tmp_path: Path) -> None:
    Pool.deaths = {"s0": 99}
    with pytest.raises(UserError, match=r"workers die on .*s0.*is memory short"):
        list(engines.processes(plan(tmp_path, workers=2), TODO))


@pytest.mark.parametrize("end", ["error", "kill"])
def test_workers_end_with_what_they_work_for(end: str) -> None:
    """A worker that outlived its comparison would be in the way of the next one, at the very cell that is to go on."""
    lines = (
        "import time",
        "from eval.compare import engines",
        "if __name__ == '__main__':",
        "    with engines._pool(1) as pool:",
        "        pool.submit(print, 'at work', flush=True).result()",
        "        pool.submit(time.sleep, 600)",
        *(["        raise SystemExit(3)"] if end == "error" else ["        time.sleep(600)"]),
    )
    with subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        if end == "kill":
            process.kill()
        process.communicate(timeout=60)  # the worker has the same stdout: it is read to its end when both are gone
    assert process.returncode == (3 if end == "error" else -signal.SIGKILL)


class Ticket:
    def __init__(self, plan: Plan, cell: Cell, work: Callable[..., None]) -> None:
        self.plan, self.cell, self.work = plan, cell, work


class Crashed(Exception): ...


class RayTaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@pytest.fixture
def stand_in(ran: list[Cell], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `ray` is asked, and what of it is used."""
    asked = SimpleNamespace(tasks=[], waiting=0, most=0, shut=False)
    ray: Any = ModuleType("ray")

    def remote(**options: Any) -> Callable[..., Any]:
        asked.options = options

        def task(cell_run: Callable[..., None]) -> Any:
            def begin(plan: Plan, cell: Cell) -> object:
                asked.waiting += 1
                asked.most = max(asked.most, asked.waiting)
                ticket = Ticket(plan, cell, cell_run)
                asked.tasks.append(ticket)
                return ticket

            return SimpleNamespace(remote=begin)

        return task

    def wait(tickets: list[Any]) -> tuple[list[Any], list[Any]]:
        asked.waiting -= 1
        return tickets[-1:], tickets[:-1]

    def get(ticket: Any) -> None:
        try:
            ticket.work(ticket.plan, ticket.cell)
        except UserError as error:
            raise RayTaskError(error) from error

    ray.remote, ray.wait, ray.get, ray.put = remote, wait, get, lambda plan: plan
    ray.exceptions = SimpleNamespace(RayTaskError=RayTaskError, WorkerCrashedError=Crashed)
    ray.is_initialized = lambda: False
    ray.init = lambda **options: None
    ray.shutdown = lambda: setattr(asked, "shut", True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return asked


def test_ray_gets_a_task_for_each_cell(stand_in: SimpleNamespace, ran: list[Cell], tmp_path: Path) -> None:
    wanted = plan(tmp_path, engine="ray", workers=2, gpus_per_cell=0.5)
    assert engines.engine(wanted) is engines.ray
    done = list(engines.ray(wanted, TODO))
    assert sorted(map(str, done)) == sorted(map(str, TODO)) == sorted(map(str, ran))
    assert stand_in.options == {"num_cpus": 1, "num_gpus": 0.5, "max_retries": engines.RETRIES}
    assert stand_in.most == 2 and stand_in.shut


def test_ray_hands_on_what_the_user_can_mend(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(plan: Plan, cell: Cell) -> None:
        raise UserError("no such model")

    monkeypatch.setattr(cells, "run", refuse)
    with pytest.raises(UserError, match="no such model"):
        list(engines.ray(plan(tmp_path, engine="ray"), TODO))
    assert stand_in.shut


def test_ray_workers_that_always_die_are_named(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash(plan: Plan, cell: Cell) -> None:
        raise Crashed

    monkeypatch.setattr(cells, "run", crash)
    with pytest.raises(UserError, match=r"workers die on .*s0"):
        list(engines.ray(plan(tmp_path, engine="ray"), TODO))


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'singlora-diffusion\[ray\]'"):
        list(engines.ray(plan(tmp_path, engine="ray"), TODO))
