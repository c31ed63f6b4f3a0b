"""Who runs the cells: this process, processes of this machine, or a Ray cluster. All tell when a cell is done."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, Protocol

from singlora_diffusion.errors import UserError
from singlora_diffusion.terminal import escaped, note

from . import cell as cells
from .grid import Cell, Plan

RETRIES = 3
"""How often a cell is begun again after its worker died."""


class Engine(Protocol):
    """Runs cells, in their order as far as there are workers, and yields each once it is done."""

    def __call__(self, plan: Plan, todo: Sequence[Cell]) -> Iterator[Cell]:
        """Raises UserError for a cell that cannot be run."""
        ...


def engine(plan: Plan) -> Engine:
    """The one that the settings name."""
    run = plan.settings.run
    return ray if run.engine == "ray" else processes if run.workers > 1 else here


def here(plan: Plan, todo: Sequence[Cell]) -> Iterator[Cell]:
    """One after the other in this process."""
    for cell in todo:
        cells.run(plan, cell)
        yield cell


def processes(plan: Plan, todo: Sequence[Cell]) -> Iterator[Cell]:
    """In processes of their own; if one dies, the cells that are not done begin again in new ones."""
    left, deaths = list(todo), 0
    while left:
        done = 0
        try:
            with _pool(plan.settings.run.workers) as pool:
                futures = {pool.submit(cells.run, plan, cell): cell for cell in left}
                for future in as_completed(futures):
                    future.result()
                    left.remove(futures[future])
                    done += 1
                    yield futures[future]
        except BrokenProcessPool:
            deaths = 0 if done else deaths + 1
            if deaths > RETRIES:
                raise _dying(plan, left[0]) from None
            note(f"a worker died; {len(left)} cells go on in new ones")


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the context and with this process, in the middle of a cell too: it is begun again."""
    context = multiprocessing.get_context("spawn")
    alive, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(alive,))
    try:
        yield pool
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        held.close()


def _end_with(alive: Connection) -> None:
    """End this process once the other end of a pipe is closed: by its holder, or because that has ended."""

    def wait() -> None:
        with suppress(EOFError, OSError):
            alive.recv_bytes()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def ray(plan: Plan, todo: Sequence[Cell]) -> Iterator[Cell]:
    """A task for each cell on the Ray cluster that RAY_ADDRESS names, or on one of this machine.

    The nodes share the folders of the comparison.
    """
    try:
        import ray as cluster
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'singlora-diffusion[ray]'") from error
    run = plan.settings.run
    begun = not cluster.is_initialized()
    if begun:
        cluster.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        task = cluster.remote(num_cpus=1, num_gpus=run.gpus_per_cell, max_retries=RETRIES)(cells.run)
        shared, waiting = cluster.put(plan), list(reversed(todo))
        running: dict[Any, Cell] = {}
        while waiting or running:
            while waiting and len(running) < run.workers:
                cell = waiting.pop()
                running[task.remote(shared, cell)] = cell
            ready, _ = cluster.wait(list(running))
            for one in ready:
                try:
                    cluster.get(one)
                except cluster.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, UserError) else error) from None
                except cluster.exceptions.WorkerCrashedError:
                    raise _dying(plan, running[one]) from None
                yield running.pop(one)
    finally:
        if begun:
            cluster.shutdown()


def _dying(plan: Plan, cell: Cell) -> UserError:
    return UserError(f"workers die on {escaped(plan.folder(cell), 1000)}: is memory short?")
