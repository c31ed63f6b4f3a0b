"""The queue of trainings on disk: order, stopping, and what outlives whom. Real commands in processes of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from singlora_diffusion import files, settings
from singlora_diffusion.app import jobs, progress
from singlora_diffusion.app.worker import LOOK, suspend
from singlora_diffusion.errors import UserError
from singlora_diffusion.training import log_file, run_folder
from singlora_diffusion.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
PATIENCE = 400.0
"""Seconds for what takes a few."""


def until(true: Callable[[], object]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.05)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A queue whose processes do not outlive the test, however it ends."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path / "queue"
    for path in (tmp_path / "queue").glob(f"*/{jobs.STATE}"):
        if (left := jobs.process(files.read_json(path))) is not None:
            left.kill()


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody works the queue off."""
    monkeypatch.setattr(jobs, "start_worker", lambda queue: None)


@contextmanager
def worker(queue: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker, which has ended at the end, also where a test fails: it would wait for its training."""
    words = [sys.executable, "-m", "singlora_diffusion.app.worker", str(queue)]
    process = subprocess.Popen(words, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def training(recipe: Recipe, **values: object) -> list[str]:
    return shlex.split(settings.command_line("train", settings.replaced(recipe, **values)))[1:]


def test_a_training_outlives_its_worker_is_stopped_and_goes_on(
    queue: Path, recipe: Recipe, tmp_path: Path, asleep: None
) -> None:
    """A killed worker leaves the training running; the next one finds it, and stops it when asked."""
    run = recipe.output.output_dir
    job = jobs.add(queue, training(recipe, max_train_steps=100_000), run)
    other = jobs.add(queue, ["toyworld", "subject", "--name", "dog-1", "--output_dir", "dog"], tmp_path / "dog")
    assert [one.state for one in jobs.jobs(queue)] == ["waiting", "waiting"]
    with worker(queue) as first:
        until(lambda: progress.read(run).step >= 3)
        first.kill()
    trainer = jobs.process(files.read_json(job.folder / jobs.STATE))
    assert trainer is not None and jobs.job(job.folder).state == "running"
    with pytest.raises(UserError, match="waits or runs there already"):
        jobs.add(queue, training(recipe), run)
    jobs.stop(other)
    with worker(queue) as second, worker(queue) as third:  # of two that start at once, one does the work
        jobs.stop(job)
        second.wait(PATIENCE)
        third.wait(PATIENCE)
    assert not psutil.pid_exists(trainer.pid) or trainer.status() == psutil.STATUS_ZOMBIE
    # that it was stopped, not lost, only its own parent could see; its folder says how to go on
    assert [one.state for one in jobs.jobs(queue)] == ["lost", "withdrawn", "withdrawn"]  # the last is the refused one
    assert "to go on: singlora train" in jobs.job(job.folder).output
    assert not (tmp_path / "dog").exists()
    stopped = progress.read(run)
    assert stopped.checkpoints == (stopped.step,) and stopped.total == 100_000 and stopped.adapter is None

    again = training(recipe, max_train_steps=stopped.step + 2, resume_from_checkpoint="latest")
    jobs.add(queue, again, run)
    with worker(queue) as last:
        last.wait(PATIENCE)
    assert jobs.jobs(queue)[-1].state == "done", jobs.jobs(queue)[-1].output
    done = progress.read(run)
    assert done.step == done.total == stopped.step + 2 and done.adapter == run / run_folder.ADAPTER
    assert [row["step"] for row in done.rows] == [*range(1, done.total + 1)]


def test_a_paused_training_stands_still_whoever_is_killed_and_goes_on(
    queue: Path, recipe: Recipe, asleep: None
) -> None:
    """What is asked stands on disk, and whether it is so is asked of the process: no worker has to remember it."""
    run = recipe.output.output_dir
    job = jobs.add(queue, training(recipe, max_train_steps=100_000), run)

    def state() -> str:
        return jobs.job(job.folder).state

    with worker(queue) as first:
        until(lambda: progress.read(run).step >= 3)
        jobs.pause(jobs.job(job.folder))
        until(lambda: state() == "paused")
        first.kill()
    trainer = jobs.process(files.read_json(job.folder / jobs.STATE))
    assert trainer is not None and all(map(jobs.suspended, [trainer, *trainer.children(recursive=True)]))
    stood = progress.read(run)
    with worker(queue):
        time.sleep(4 * LOOK)
        assert state() == "paused" and progress.read(run).step == stood.step
    jobs.go_on(jobs.job(job.folder))
    assert state() == "paused"  # until there is a worker
    with worker(queue):
        until(lambda: state() == "running" and progress.read(run).step > stood.step + 3)
        jobs.pause(jobs.job(job.folder))
        until(lambda: state() == "paused")
        jobs.stop(jobs.job(job.folder))
        assert state() == "stopping"
        until(lambda: not jobs.job(job.folder).open)
    stopped = progress.read(run)
    assert stopped.checkpoints == (stopped.step,)
    assert [row["step"] for row in stopped.rows] == [*range(1, stopped.step + 1)]


def test_processes_of_a_job_are_suspended_together() -> None:
    child = (
        f"import subprocess, time; subprocess.Popen([{sys.executable!r}, '-c', 'while True: pass']); time.sleep(600)"
    )
    parent = psutil.Process(subprocess.Popen([sys.executable, "-c", child], start_new_session=True).pid)
    both = [parent]
    try:
        until(parent.children)
        both += parent.children()
        for wanted in (True, True, False, False, True):
            suspend(parent, wanted)
            until(partial(lambda state: all(jobs.suspended(one) == state for one in both), wanted))
    finally:
        for one in both:
            one.kill()
        parent.wait()


def test_a_worker_is_started_where_none_lives(queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr(jobs, "start_worker", started.append)
    jobs.tend(queue)
    assert not started
    jobs.add(queue, ["check", str(tmp_path)], tmp_path / "a")
    started.clear()
    jobs.tend(queue)
    assert started == [queue]
    files.write_json(queue / jobs.WORKER, jobs.identity(psutil.Process()))
    jobs.tend(queue)
    assert started == [queue]
    (queue / jobs.WORKER).unlink()
    with worker(queue) as only:
        only.wait(PATIENCE)
    jobs.tend(queue)  # all have ended
    assert started == [queue] and jobs.process(files.read_json(queue / jobs.WORKER)) is None


def test_jobs_run_in_order_and_a_failed_one_says_why(queue: Path, tmp_path: Path, asleep: None) -> None:
    """The first fails as the command line does, and does not keep the second from running."""
    jobs.add(queue, ["toyworld", "subject", "--name", "nobody", "--output_dir", "a"], tmp_path / "a")
    jobs.add(queue, ["check", str(tmp_path)], tmp_path / "b")
    with worker(queue) as only:
        only.wait(PATIENCE)
    first, second = jobs.jobs(queue)
    assert first.state == "failed" and first.output.startswith("singlora toyworld: ")
    assert second.state == "failed" and "singlora check: " in second.output
    ended = [(one.folder / jobs.STATE).stat().st_mtime_ns for one in (first, second)]
    began = [(one.folder / jobs.OUTPUT).stat().st_ctime_ns for one in (first, second)]
    assert ended[0] <= began[1]


def test_many_add_at_once(queue: Path, tmp_path: Path, asleep: None) -> None:
    threads = [threading.Thread(target=jobs.add, args=(queue, ["check", str(n)], tmp_path / str(n))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {job.words[1] for job in jobs.jobs(queue)} == {str(n) for n in range(20)}


def test_of_many_that_begin_one_run_at_once_one_does(queue: Path, tmp_path: Path, asleep: None) -> None:
    """Nobody waits for the others before looking whether there are any."""
    refused: list[str] = []
    ready = threading.Barrier(12)

    def begin() -> None:
        ready.wait()
        try:
            jobs.add(queue, ["check", "."], tmp_path / "run")
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 11 and all("waits or runs there already" in one for one in refused)
    there = jobs.jobs(queue)
    assert sorted(job.state for job in there) == ["waiting", *["withdrawn"] * 11]
    found = jobs.of(there, tmp_path / "run")
    assert found is not None and found.open


def test_a_process_with_a_recycled_number_is_another_one() -> None:
    own = psutil.Process()
    assert jobs.process({"pid": own.pid, "created": own.create_time()}) is not None
    assert jobs.process({"pid": own.pid, "created": own.create_time() - 1}) is None


def test_the_log_is_read_on_and_read_anew_where_a_run_went_back(tmp_path: Path) -> None:
    path = tmp_path / log_file.NAME
    log = progress.Log(path)

    def write(steps: range, mode: str, loss: float) -> None:
        with path.open(mode) as file:
            file.writelines(json.dumps({"step": n, "loss": loss, "seconds": n / 2}) + "\n" for n in steps)

    assert log.update() == []
    write(range(1, 11), "w", 1.0)
    with path.open("a") as file:
        file.write('{"step": 11, "lo')  # torn: its end is yet to come
    assert [row["step"] for row in log.update()] == [*range(1, 11)]
    with path.open("a") as file:
        file.write('ss": 1.0, "seconds": 5.5}\n')
    assert len(log.update()) == 11
    write(range(1, 6), "w", 1.0)  # cut off where a run goes on from an earlier step
    write(range(6, 14), "a", 1.0)
    assert [row["step"] for row in log.update()] == [*range(1, 14)]
    path.rename(tmp_path / "old")  # put away
    write(range(1, 31), "w", 2.0)
    assert [row["step"] for row in log.update()] == [*range(1, 31)]
    assert {row["loss"] for row in log.rows} == {2.0}
    (tmp_path / run_folder.RECIPE).write_text('{"max_train_steps": 40}')
    assert progress.read(tmp_path, log).left == pytest.approx(0.5 * 10)
    with path.open("a") as file:  # after a pause of an hour
        file.writelines(json.dumps({"step": n, "loss": 1.0, "seconds": 3600 + n / 2}) + "\n" for n in (31, 32))
    assert progress.read(tmp_path, log).left == pytest.approx(0.5 * 8)
