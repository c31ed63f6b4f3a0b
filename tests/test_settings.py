"""Settings: flags, ranges, command lines and JSON from one declaration."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from tyro.conf import arg

from singlora_diffusion import settings
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Number, Positive


@dataclass(frozen=True)
class Adapter:
    """What is trained."""

    rank: Count = 16
    """Rank r."""
    alpha: Positive | None = None
    """None: as the rank."""


@dataclass(frozen=True)
class Job:
    """A job."""

    data: Path
    """Folder."""
    adapter: Adapter = field(default_factory=Adapter)
    scales: tuple[Number, ...] = ()
    """One per adapter."""
    overwrite: bool = True
    """Replace what is there."""


@dataclass(frozen=True)
class Several:
    """Files."""

    files: tuple[Path, ...]
    one: Path | None = None


def parse(*words: str) -> Job:
    return settings.parse(Job, words, "job", "A job.")


def test_flags_are_flat_and_say_the_same_as_the_command_line_made_of_them() -> None:
    job = parse("--data", "my dog", "--rank", "3", "--no_overwrite", "--scales", "1", "-0.5")
    assert job == Job(Path("my dog"), Adapter(rank=3), (1.0, -0.5), False)
    words = shlex.split(settings.command_line("job", job))
    assert words[:2] == ["singlora", "job"] and parse(*words[2:]) == job
    assert settings.command_line("job", Job(Path("x"))) == "singlora job --data x"


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("--data=~/runs").data == Path("/home/me/runs") == settings.build(Job, data=Path("~/runs")).data
    assert parse("--data=~nobody-of-this-name/x").data == Path("~nobody-of-this-name/x")

    several = settings.build(Several, files=(Path("~/a"), Path("b~")), one=None)
    assert several.files == (Path("/home/me/a"), Path("b~"))


def test_what_was_changed() -> None:
    assert settings.changed(Job(Path("x"), Adapter(alpha=2.0))) == {"data": Path("x"), "alpha": 2.0}


def test_json_is_flat() -> None:
    job = Job(Path("x"), scales=(1.0,))
    assert settings.as_json(job) == {"data": "x", "rank": 16, "alpha": None, "scales": [1.0], "overwrite": True}


def test_build_finds_the_group() -> None:
    job = settings.build(Job, data=Path("x"), rank=2, overwrite=False)
    assert job == Job(Path("x"), Adapter(rank=2), overwrite=False)
    assert settings.build(Job, data=Path("x")) == Job(Path("x"))
    for wrong in ({"data": Path("x"), "ranke": 2}, {}):
        with pytest.raises(TypeError):
            settings.build(Job, **wrong)


def test_replaced_finds_the_group() -> None:
    job = settings.replaced(Job(Path("x")), rank=2, overwrite=False)
    assert job == Job(Path("x"), Adapter(rank=2), overwrite=False)
    with pytest.raises(TypeError, match="ranke"):
        settings.replaced(job, ranke=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "0"], ["--rank 0: must be at least 1"]),
        (["--rank", "9" * 30], ["--rank 99999999", "at most 1e+07"]),
        (["--alpha", "-3", "--rank", "-1"], ["--alpha -3.0: must be greater than 0", "--rank -1"]),
        (["--alpha", "nan"], ["--alpha nan"]),
        (["--alpha", "inf"], ["--alpha inf"]),
        (["--scales", "1", "nan"], ["--scales nan"]),
    ],
)
def test_values_out_of_range_are_named_in_one_line(words: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse("--data", "x", *words)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in said), str(error.value)


def test_help_groups_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "adapter options" in shown and "What is trained." in shown and "--rank" in shown


@dataclass(frozen=True)
class Rates:
    """A setting of two names."""

    learning_rate: Annotated[Positive, arg(aliases=["--unet_lr"])] = 1e-3
    """Rate."""
    layers: tuple[str, ...] = ()
    """Names."""


@pytest.mark.parametrize(
    "words",
    ["--learning_rate 1 --unet_lr 2", "--unet_lr 1 --learning-rate=2", "--layers a --unet-lr=1 --learning_rate 2"],
)
def test_a_flag_and_its_alias_have_one_value(words: str) -> None:
    with pytest.raises(UserError, match="are one setting: give one value"):
        settings.parse(Rates, words.split(), "rates", "")


def test_a_setting_may_be_said_twice() -> None:
    words = "--unet_lr 0.5 --learning_rate 0.5 --layers a --layers b"
    assert settings.parse(Rates, words.split(), "", "") == Rates(0.5, ("b",))  # of one flag the last value counts


def test_unknown_flags_are_all_named_with_those_that_are_meant() -> None:
    with pytest.raises(UserError) as error:
        parse("--data", "x", "--rnk=3", "--no_overwrit", "--rank", "-1", "--zzz", "1", "2")
    assert error.value.lines == (
        "--rnk: do you mean --rank?",
        "--no_overwrit: do you mean --no_overwrite?",
        "--zzz: there is no such flag; --help lists them",
    )


def test_a_command_line_flag_by_flag() -> None:
    words = ["x", "--rank", "-1", "--learning-rate=-1e-3", "--", "--scales"]
    assert settings.grouped(words) == [
        ("", ["x"]),
        ("rank", ["--rank", "-1"]),
        ("learning_rate", ["--learning-rate=-1e-3", "--"]),
        ("scales", ["--scales"]),
    ]
    assert settings.grouped([]) == [] and settings.grouped(["--a"]) == [("a", ["--a"])]


def test_flags_win_over_values_that_were_given_before() -> None:
    given = {"data": Path("~/x"), "rank": 3, "alpha": None, "scales": (1.0, 2.0), "overwrite": False}
    job = settings.parse(Job, ["--rank", "5", "--overwrite"], "job", "A job.", given)
    assert job == Job(Path.home() / "x", Adapter(5, None), (1.0, 2.0), True)
    with pytest.raises(SystemExit):
        settings.parse(Job, ["--rank", "5"], "job", "A job.", {"alpha": 1.0})
    with pytest.raises(UserError, match="--rank 0: must be at least 1"):
        settings.parse(Job, [], "job", "A job.", {"data": Path("x"), "rank": 0})
