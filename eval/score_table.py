"""A result of scoring, printed: a table, what to know about it, and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from singlora_diffusion.terminal import escaped

from .prompt_kinds import KINDS


def show(result: dict[str, Any]) -> None:
    """Print what `eval.score.score` returns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table()
    for heading in ("score", "mean", "sd", "n", "real to real", ""):
        table.add_column(heading, justify="left" if heading in ("score", "") else "right")
    for name, row in result["metrics"].items():
        mean = row["mean"] if "mean" in row else row["value"]
        numbers = [_rounded(mean), _rounded(row.get("sd")), str(row["n"]), _rounded(row["real_to_real"])]
        direction = "" if row["higher_is_better"] else "; lower is better"
        about = f"{row['label']}: {row['about']}{direction}"
        table.add_row(*(Text(cell) for cell in (name, *numbers, about)))
    prompts = max(row["prompts"] for row in result["metrics"].values())

    def say(text: str) -> None:
        console.print(escaped(text, 4096), markup=False, highlight=False, soft_wrap=True)

    say(f"{result['settings']['images']}: {_count(result['count'], 'image')} of {_count(prompts, 'prompt')}")
    console.print(table)
    if result["kinds"]:
        console.print(_by_kind(result["kinds"]))
    say(f"protocol {result['protocol']}: {result['protocol_because']}")
    for role, made in result["encoders"].items():
        way = made["preprocessing"]
        sizes = f"{way['interpolation']} to {way['resize']}, centre {way['crop']} x {way['crop']} pixels"
        say(f"  {role}: {made['architecture']}, {sizes}; {made['source']}")
    if result["references"]:
        place, number = result["settings"]["references"], _count(len(result["references"]), "image")
        say(f"references: {place}, {number}, mode {result['reference_mode']}")
    for name, reason in result["skipped"].items():
        say(f"no {name}: {reason}")
    for count, what in (
        (result["blank"], "black or of one colour, and counted like the others"),
        (result["copies"], "pixel for pixel equal to a reference"),
    ):
        if count:
            say(f"{_count(count, 'image')} of {result['count']} {what}")
    if result["left_out"]:
        say("left out: " + ", ".join(f"{name} ({reason})" for name, reason in result["left_out"].items()))
    say(f"written: {result['output']}")
    say(f"next: {_next(result)}")


def _by_kind(kinds: dict[str, dict[str, float]]) -> Any:
    from rich.table import Table

    table = Table("prompts", "of")
    for name in next(iter(kinds.values())):
        table.add_column(name, justify="right")
    for name, scores in kinds.items():
        table.add_row(name, KINDS[name], *map(_rounded, scores.values()))
    return table


def _next(result: dict[str, Any]) -> str:
    """The page that shows the images with their scores; it looks for the result beside the images."""
    images, output = result["settings"]["images"], Path(result["output"])
    if output.parent != Path(images):
        return shlex.join(["python", "-m", "json.tool", str(output)])
    words = ["singlora", "report", "--runs", images]
    if result["references"]:
        words += ["--references", result["settings"]["references"]]
    return shlex.join([*words, "--output", str(output.with_name("report.html"))])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
