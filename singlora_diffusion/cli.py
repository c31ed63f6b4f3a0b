"""The `singlora` command: one command per job. Nothing heavy is imported before one runs, so help answers at once.

Exit codes: 0; 2 for what the user can mend, with one line on stderr; 130 after Ctrl-C, 143 after SIGTERM. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from . import __version__
from .errors import UserError
from .terminal import escaped

LONGEST = 2000
"""Characters of a message: enough for two long paths, not for a file's contents."""


class Command(NamedTuple):
    """Where a command's settings (a dataclass, free of torch) and its work are found, as module:name."""

    settings: str
    work: str
    line: str
    parse: str | None = None
    """What makes settings of a command line. None: `settings.parse`."""


COMMANDS = {
    "check": Command(
        "singlora_diffusion.data.check_command:CheckSettings",
        "singlora_diffusion.data.check_command:run",
        "look at a folder of images before training: what is odd, and the fix",
    ),
    "train": Command(
        "singlora_diffusion.training.command_line:Training",
        "train_dreambooth:train",
        "learn a subject from a folder of images",
        "singlora_diffusion.training.command_line:parse",
    ),
    "generate": Command(
        "singlora_diffusion.sampling.settings:GenerateSettings",
        "singlora_diffusion.sampling.generate:generate",
        "make images with an adapter, prompts x seeds",
    ),
    "score": Command("eval.score:ScoreSettings", "eval.score:run", "CLIP-I, CLIP-T and DINO of a folder of images"),
    "report": Command("eval.report:ReportSettings", "eval.report:run", "show scored folders side by side on one page"),
    "compare": Command(
        "eval.compare.settings:CompareSettings",
        "eval.compare.command:compare",
        "adapters of equal size over many subjects, with statistics",
    ),
    "demo": Command(
        "singlora_diffusion.demo.settings:DemoSettings",
        "singlora_diffusion.demo.flow:demo",
        "all of it on a toyworld subject, with a report",
    ),
    "toyworld": Command(
        "singlora_diffusion.toyworld.command:SubjectSettings",
        "singlora_diffusion.toyworld.command:write",
        "write a toyworld subject's images: singlora toyworld subject --name dog-1",
    ),
    "app": Command(
        "singlora_diffusion.app.settings:AppSettings",
        "singlora_diffusion.app.server:run",
        "subject, training, images, scores and files as pages in a browser",
    ),
    "budget": Command(
        "singlora_diffusion.adapters.budget:BudgetSettings",
        "singlora_diffusion.adapters.budget:budget",
        "ranks of equal numbers of parameters",
    ),
    "export": Command(
        "singlora_diffusion.formats.settings:ExportSettings",
        "singlora_diffusion.formats.commands:export",
        "write an adapter as an ordinary LoRA for other tools",
    ),
    "import": Command(
        "singlora_diffusion.formats.settings:ImportSettings",
        "singlora_diffusion.formats.commands:import_",
        "read other tools' SingLoRA files",
    ),
    "inspect": Command(
        "singlora_diffusion.formats.settings:InspectSettings",
        "singlora_diffusion.formats.commands:inspect",
        "say what an adapter file is, layer by layer",
    ),
    "add": Command(
        "singlora_diffusion.formats.settings:AddSettings",
        "singlora_diffusion.formats.commands:add",
        "add SingLoRAs up, exactly",
    ),
}


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt, it unwinds what is being done."""


def main() -> None:
    """Entry point of `singlora`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        sys.exit(0)
    sys.exit(run(arguments[0], arguments[1:]))


def usage() -> str:
    """What `singlora --help` says."""
    lines = [f"  {name:<10}{command.line}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Teach an image model one subject from a handful of images, with SingLoRA.",
            "",
            "usage: singlora COMMAND [flags]     singlora COMMAND --help lists a command's flags",
            "",
            *lines,
            "",
            "first steps: singlora demo",
            '             singlora train --instance_data_dir my_dog --instance_prompt "a photo of sks dog"',
        ]
    )


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code. Help and misspelt flags are a SystemExit."""
    if name not in COMMANDS:
        print(f"singlora: no command {escaped(repr(name))}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from . import settings

    command = COMMANDS[name]
    try:
        with _sigterm():
            parse = _find(command.parse) if command.parse else settings.parse
            chosen = parse(_find(command.settings), arguments, f"singlora {name}", command.line)
            quiet_libraries()
            _find(command.work)(chosen)
    except BrokenPipeError:  # whoever read our output has seen enough, as in `singlora inspect FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would complain again
    except KeyboardInterrupt:
        print(f"singlora {name}: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print(f"singlora {name}: terminated", file=sys.stderr)
        return 143
    except UserError as error:
        for one in error.lines:
            print(f"singlora {name}: {escaped(one, LONGEST)}", file=sys.stderr)
        return 2
    except Exception as error:
        line = in_one_line(error)
        if line is None:
            raise
        print(f"singlora {name}: {escaped(line, LONGEST)}", file=sys.stderr)
        return 2
    return 0


def in_one_line(error: Exception) -> str | None:
    """What to tell the user, for errors that are no bugs; None for all others."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        from .files import reason

        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" -> ".join(names), reason(error)] if names else [reason(error)])
    if type(error).__name__ == "SafetensorError" and "(os error " in str(error):  # what is no OSError only in Rust
        return str(error)
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        said = str(error).strip().partition("\n")[0]
        return f"out of memory{f' ({said})' if said else ''}; make batches, resolution or rank smaller"
    return None


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the screen; theirs is not the job the user asked for."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _is_torch_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or (torch is not None and isinstance(error, torch.OutOfMemoryError))


@contextmanager
def _sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`. Only a program's main thread can be told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminated(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    main()
