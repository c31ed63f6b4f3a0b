"""Any value of any flag of any command gives a run, a plan or one line: no traceback, no hang, no gigabytes.

Flags and their kinds of values are read from the settings classes, so that new ones are covered unasked. Every command
is stopped where its heavy work begins: when the base model is loaded, a network is called, or an image is drawn.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tyro.conf import Positional

from singlora_diffusion import cli
from singlora_diffusion.cli import COMMANDS

SECONDS = 60  # by the wall clock, on a machine that may have other work
BYTES = 2 * 10**9

TEXTS = ["", " ", "-", "--", "[/b]", "[red]x", "\x1b[2Jx\x07", "a\nb", "\u202ex", "é名", "\udcff", "%s{0}{", "None"]
NUMBERS = ["0", "-1", "1", "2", "7", "nan", "inf", "-inf", "1e-320", "1e300", "-0.5", str(2**31), str(2**63), "9" * 30]
PATHS = ["a file", "a folder", "a file/below", "/proc/nowhere/x", "/dev/null/x", ".", "x" * 300, "x/" * 3000, "nowhere"]
DEVICES = ["cpu", "cuda", "cuda:99", "mps", "meta", "cpu:7", "xla"]


class Reached(BaseException):
    """Every check is passed: the heavy work begins."""


class Flag(NamedTuple):
    """A field of a settings class."""

    name: str
    kind: Any
    positional: bool


def flags_of(kind: Any) -> Iterator[Flag]:
    """Those of a settings class, groups included."""
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        hint, positional = hints[one.name], False
        while get_origin(hint) is Annotated:
            positional |= bool(set(map(id, hint.__metadata__)) & set(map(id, Positional[int].__metadata__)))  # type: ignore[attr-defined]
            hint = get_args(hint)[0]
        if is_dataclass(hint):
            yield from flags_of(hint)
        else:
            yield Flag(one.name, hint, positional)


@cache
def flags(command: str) -> dict[str, Flag]:
    return {flag.name: flag for flag in flags_of(cli._find(COMMANDS[command].settings))}


def values(kind: Any, name: str) -> st.SearchStrategy[list[str]]:
    """Words to follow a flag, right and wrong ones, for a field of this type."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return values(inside[0], name)
    if origin in (Union, UnionType):
        return st.one_of([values(one, name) for one in inside if one is not NoneType])
    if origin is tuple:
        return st.lists(values(inside[0], name), max_size=3).map(lambda some: list(itertools.chain(*some)))
    if origin is Literal:
        return st.sampled_from([*inside, *TEXTS[:3]]).map(lambda one: [str(one)])
    if kind is bool:
        return st.just([])
    number = st.one_of(st.sampled_from(NUMBERS), st.integers().map(str), st.floats().map(str))
    if kind in (int, float):
        return st.one_of(number, st.sampled_from(TEXTS)).map(lambda one: [one])
    text = st.text(st.characters(exclude_characters="\0/~", exclude_categories=["Cs"]), max_size=30)
    special = st.sampled_from(TEXTS + PATHS + NUMBERS + (DEVICES if name == "device" else []))
    return st.one_of(special, text).map(lambda one: [one])


class Here(NamedTuple):
    """What the commands are pointed at."""

    images: Path
    references: Path
    model: Path
    adapter: Path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, make_networks: Any) -> Iterator[Here]:
    """A working folder with images, a model and an adapter in it."""
    from transformers.utils import logging

    from singlora_diffusion import adapters, formats
    from singlora_diffusion.adapters.config import AdapterConfig

    logging.disable_progress_bar()  # as the command does before transformers is imported
    place = tmp_path_factory.mktemp("fuzz")
    noise = np.random.default_rng(0)
    for folder, number in itertools.product(("images", "references"), range(2)):
        (place / folder).mkdir(exist_ok=True)
        image = Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(place / folder / f"{number}.png")
    adapter = place / "adapter.safetensors"
    about = dict(family="stable_diffusion", base_model=str(tiny_model), identifier="sks", class_noun="dog")
    formats.save(adapters.attach(make_networks(), AdapterConfig(rank=2)), adapter, about=about)
    (place / "a file").write_text("a dog\n")
    (place / "a folder").mkdir()
    with contextlib.chdir(place) if sys.version_info >= (3, 11) else _chdir(place):
        yield Here(place / "images", place / "references", tiny_model, adapter)


@contextlib.contextmanager
def _chdir(place: Path) -> Iterator[None]:
    import os

    before = Path.cwd()
    os.chdir(place)
    yield
    os.chdir(before)


def right(command: str, here: Here, number: int) -> dict[str, list[str]]:
    """Flags with which a command works; `number` keeps the results of calls apart."""
    out = [f"out/{number}"]
    file = [f"out/{number}.safetensors"]
    model = {"pretrained_model_name_or_path": [str(here.model)]}
    images = [str(here.images)]
    found: dict[str, dict[str, list[str]]] = {
        "train": {
            **model,
            "instance_data_dir": images,
            "instance_prompt": ["a photo of sks dog"],
            "output_dir": out,
            "device": ["cpu"],
            "report_to": ["none"],
        },
        "generate": {**model, "prompt": ["a dog"], "seeds": ["0"], "output_dir": out, "device": ["cpu"]},
        "score": {
            "images": images,
            "references": [str(here.references)],
            "protocol": ["toyworld"],
            "output": [f"out/{number}.json"],
        },
        "report": {"runs": images, "output": [f"out/{number}.html"]},
        "compare": {
            **model,
            "subjects_dir": [str(here.images.parent)],
            "subjects": ["images"],
            "tuning_subjects": ["references"],
            "protocol": ["toyworld"],
            "output_dir": out,
            "device": ["cpu"],
        },
        "demo": {**model, "output_dir": out, "device": ["cpu"]},
        "toyworld": {"what": ["subject"], "name": ["dog-1"], "output_dir": out},
        "budget": model,
        "app": {"output_dir": out},
        "check": {"folder": images},
        "export": {"adapter": [str(here.adapter)], "output": file},
        "import": {"file": [str(here.adapter)], "output": file, **model},
        "inspect": {"file": [str(here.adapter)]},
        "add": {"adapters": [str(here.adapter), str(here.adapter)], "output": file},
    }
    return found[command]


def words(command: str, given: Mapping[str, Sequence[str]]) -> list[str]:
    """The command line, positional ones first."""
    table, first, rest = flags(command), [], []
    for name, some in given.items():
        if table[name].positional:
            first += some
        elif table[name].kind is not bool and len(some) == 1:
            rest.append(f"--{name}={some[0]}")  # also where the value looks like a flag
        else:
            rest += [f"--{name}", *some]
    return [*first, *rest]


@pytest.fixture
def stopped(here: Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`Reached` is raised where heavy work begins, and memory is limited."""
    from torch import nn

    from eval.compare import engines
    from singlora_diffusion import device, models
    from singlora_diffusion.app import server as app_server
    from singlora_diffusion.toyworld import subjects

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setattr(models, "load", reached)
    monkeypatch.setattr(nn.Module, "__call__", reached)
    monkeypatch.setattr(subjects, "render", reached)
    monkeypatch.setattr(app_server, "serve", reached)
    monkeypatch.setattr(engines, "processes", reached)
    monkeypatch.setattr(engines, "ray", reached)
    monkeypatch.setattr(device, "free_memory", lambda name: BYTES)
    with at_most(BYTES):
        yield


@pytest.fixture
def stopped_later(here: Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model is loaded, the adapter attached; `Reached` is raised when the denoiser is called."""
    from torch import Tensor, nn

    from singlora_diffusion import device

    call = nn.Module.__call__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        large = any(isinstance(one, Tensor) and one.numel() > 1 << 22 for one in args)
        if large or type(module).__name__ == "UNet2DConditionModel":
            raise Reached
        return call(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", called)
    monkeypatch.setattr(device, "free_memory", lambda name: BYTES)
    with at_most(BYTES):
        yield


@contextlib.contextmanager
def at_most(count: int) -> Iterator[None]:
    """Address space beyond what is taken now."""
    statm = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        pytest.fail(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


counter = itertools.count()


def hold(command: str, given: Mapping[str, Sequence[str]]) -> object:
    """Run the command and look at how it ends; returns its exit code, or "reached"."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one per process, as a program has it
    out, err = io.StringIO(), io.StringIO()
    line = words(command, given)
    code: object = "reached"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within(SECONDS):
            code = cli.run(command, line)
    except Reached:
        pass
    except SystemExit as error:  # tyro: help, or a word that is no value of the flag's type
        assert error.code in (0, 2), (line, err.getvalue())
        return error.code
    finally:
        shutil.rmtree("out", ignore_errors=True)
    said = err.getvalue()
    assert code in ("reached", 0, 2), (line, code, said)
    if code == 2:
        lines = [one for one in said.splitlines() if not one.startswith("note: ")]
        assert 1 <= len(lines) <= len(given), (line, said)  # one, or one for each flag that is no flag or no choice
        assert "out of memory" not in said, line
        for one in lines:
            assert one.startswith(f"singlora {command}: "), (line, said)
            assert len(one) > len(f"singlora {command}: ") + 5, (line, said)
    odd = {c for c in said + out.getvalue() if not c.isprintable()} - set("\n\r\t")
    assert not odd, (line, odd, said)
    return code


ALL = [(command, name) for command in COMMANDS for name in flags(command)]


@pytest.mark.parametrize(("command", "name"), ALL, ids=[f"{command}-{name}" for command, name in ALL])
def test_any_value_of_a_flag(command: str, name: str, here: Here, stopped: None) -> None:
    @settings(max_examples=10)
    @given(values(flags(command)[name].kind, name))
    def any_value(some: list[str]) -> None:
        hold(command, {**right(command, here, next(counter)), name: some})

    any_value()


@pytest.mark.parametrize("command", COMMANDS)
def test_any_values_of_several_flags(command: str, here: Here, stopped: None) -> None:
    table = flags(command)
    several = st.lists(st.sampled_from(sorted(table)), min_size=2, max_size=5, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: values(table[name].kind, name) for name in names})
    )

    @settings(max_examples=25)
    @given(several)
    def any_values(some: dict[str, list[str]]) -> None:
        hold(command, {**right(command, here, next(counter)), **some})

    any_values()


def number_types(kind: Any) -> set[type]:
    """int, float, or both: what numbers a field takes, also in a tuple or beside None."""
    return {kind} & {int, float} | {one for inside in get_args(kind) for one in number_types(inside)}


NUMERIC = [(command, name) for command, name in ALL if number_types(flags(command)[name].kind)]


@pytest.mark.parametrize(("command", "name"), NUMERIC, ids=[f"{command}-{name}" for command, name in NUMERIC])
def test_every_number_has_a_range(command: str, name: str, here: Here, stopped: None) -> None:
    for value in ("nan", "inf", "-inf", f"-{10**30}", str(10**30)):
        assert hold(command, {**right(command, here, next(counter)), name: [value]}) == 2, value


DEEP = ("train", "generate")
LARGE = [
    (command, name, size)
    for command in DEEP
    for name, flag in flags(command).items()
    if int in number_types(flag.kind)
    for size in ("16384", "10000000")
]


@pytest.mark.parametrize(("command", "name", "size"), LARGE)
def test_large_numbers_take_no_memory(command: str, name: str, size: str, here: Here, stopped_later: None) -> None:
    hold(command, {**right(command, here, next(counter)), name: [size]})


@pytest.mark.parametrize("command", DEEP)
def test_any_values_with_the_model_loaded(command: str, here: Here, stopped_later: None) -> None:
    table = flags(command)
    several = st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: values(table[name].kind, name) for name in names})
    )

    @settings(max_examples=40)
    @given(several)
    def any_values(some: dict[str, list[str]]) -> None:
        hold(command, {**right(command, here, next(counter)), **some})

    any_values()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_right_flags_reach_the_work(command: str, here: Here, stopped: None) -> None:
    """Else the tests above would see nothing but the first complaint."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(Reached):
        assert cli.run(command, words(command, right(command, here, next(counter)))) == 0, said.getvalue()
    shutil.rmtree("out", ignore_errors=True)
