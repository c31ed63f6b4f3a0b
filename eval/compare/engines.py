"""Who runs the cells: this process, processes of this machine, or a Ray cluster. All tell when a cell is done."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
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
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(plan.settings.run.workers, mp_context=context) as pool:
                futures = {pool.submit(cells.run, plan, cell): cell for cell in left}
                try:
                    for future in as_completed(futures):
                        future.result()
                        left.remove(futures[future])
                        done += 1
                        yield futures[future]
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
        except BrokenProcessPool:
            deaths = 0 if done else deaths + 1
            if deaths > RETRIES:
                raise _dying(plan, left[0]) from None
            note(f"a worker died; {len(left)} cells go on in new ones")


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
