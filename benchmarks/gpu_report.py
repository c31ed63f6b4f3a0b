"""The Markdown table of `benchmarks.gpu`: what its stages left, a line per figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import timing

COLUMNS = ("what", "seconds", "/ floor", "/ PEFT lora", "peak GB", "/ PEFT lora's", "remarks")
Row = dict[str, str]


def markdown(report: Mapping[str, Any]) -> str:
    """Title, machine and one table. Seconds are medians (quartiles); ratios are those of medians."""
    rows = [row for result in report["stages"] for row in _rows(result, report["stages"])]
    machine = "; ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [f"# {report['machine']['device']}, {report['date']}", "", f"`{report['command']}`: {machine}", ""]
    lines += [_line(COLUMNS), _line(["---", *["---:"] * (len(COLUMNS) - 2), "---"])]
    lines += [_line([row.get(column, "") for column in COLUMNS]) for row in rows]
    if report["not_reached"]:
        lines += ["", f"Not reached: {', '.join(report['not_reached'])}. The same command goes on with them."]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _rows(result: Mapping[str, Any], all_of_them: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    if result["status"] == "failed":
        yield {"what": result["stage"], "remarks": f"failed: {result['reason']}"}
    elif result["part"] == "step":
        yield _step(result, all_of_them)
    elif result["part"] == "sampling":
        for name, seconds in result["figures"]["seconds"].items():
            to_base = timing.spread(seconds).median / timing.spread(result["figures"]["seconds"]["base"]).median
            yield {
                "what": f"{result['stage']} {name}",
                "seconds": str(timing.spread(seconds)),
                "remarks": f"{to_base:.3f} of the base",
            }
        switch = statistics.median(result["figures"]["switching_seconds"])
        yield {"what": f"{result['stage']} switching adapters", "seconds": f"{switch:.4f}"}
    else:
        yield {"what": result["stage"], "seconds": f"{result['spent']:.0f}", "remarks": "; ".join(result["said"])}


def _step(result: Mapping[str, Any], all_of_them: Sequence[Mapping[str, Any]]) -> Row:
    figures = result["figures"]
    row = {
        "what": result["stage"],
        "seconds": str(timing.spread(figures["seconds"])),
        "peak GB": f"{figures['peak_bytes'] / 1e9:.3f}",
        "remarks": f"{figures['trained']:,} trained",
    }
    done = {other["stage"]: other["figures"] for other in all_of_them if other["status"] == "done"}
    for name in ("floor", "PEFT lora"):
        if to := done.get(f"{result['group']} {name}"):
            row[f"/ {name}"] = f"{statistics.median(figures['seconds']) / statistics.median(to['seconds']):.3f}"
    if to := done.get(f"{result['group']} PEFT lora"):
        row["/ PEFT lora's"] = f"{figures['peak_bytes'] / to['peak_bytes']:.3f}"
    return row
