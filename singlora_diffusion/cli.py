"""The `singlora` command: one verb per job. Nothing heavy is imported before a verb runs, so help answers at once."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NamedTuple

from . import __version__
from .errors import UserError


class Verb(NamedTuple):
    """Where a verb's settings (a dataclass, free of torch) and its work are found, as module:name."""

    settings: str
    work: str
    line: str


VERBS = {
    "train": Verb(
        "singlora_diffusion.training.recipe:Recipe",
        "train_dreambooth:main",
        "learn a subject from a folder of pictures",
    ),
    "generate": Verb(
        "singlora_diffusion.sampling.settings:GenerateSettings",
        "singlora_diffusion.sampling.generate:generate",
        "make pictures with an adapter, prompts x seeds",
    ),
    "score": Verb("eval.score:ScoreSettings", "eval.score:run", "CLIP-I, CLIP-T and DINO of a folder of pictures"),
    "demo": Verb(
        "singlora_diffusion.demo:DemoSettings",
        "singlora_diffusion.demo:demo",
        "all of it on a toyworld subject, with a report",
    ),
    "toyworld": Verb(
        "singlora_diffusion.toyworld.command:SubjectSettings",
        "singlora_diffusion.toyworld.command:write",
        "write a toyworld subject's pictures: singlora toyworld subject --name dog-1",
    ),
    "budget": Verb(
        "singlora_diffusion.adapters.budget:BudgetSettings",
        "singlora_diffusion.adapters.budget:budget",
        "ranks of equal numbers of parameters",
    ),
    "export": Verb(
        "singlora_diffusion.formats.settings:ExportSettings",
        "singlora_diffusion.formats.verbs:export",
        "write an adapter as an ordinary LoRA for other tools",
    ),
    "import": Verb(
        "singlora_diffusion.formats.settings:ImportSettings",
        "singlora_diffusion.formats.verbs:import_",
        "read other tools' SingLoRA files",
    ),
    "inspect": Verb(
        "singlora_diffusion.formats.settings:InspectSettings",
        "singlora_diffusion.formats.verbs:inspect",
        "say what an adapter file is, layer by layer",
    ),
    "add": Verb(
        "singlora_diffusion.formats.settings:AddSettings",
        "singlora_diffusion.formats.verbs:add",
        "add SingLoRAs up, exactly",
    ),
}


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
    lines = [f"  {name:<10}{verb.line}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "Teach Stable Diffusion one subject from a handful of pictures, with SingLoRA.",
            "",
            "usage: singlora VERB [flags]        singlora VERB --help lists a verb's flags",
            "",
            *lines,
            "",
            "first steps: singlora demo",
            '             singlora train --instance_data_dir my_dog --instance_prompt "a photo of sks dog"',
        ]
    )


def run(name: str, arguments: list[str]) -> int:
    """Run a verb; returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    if name not in VERBS:
        print(f"singlora: no verb {name!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    import tyro

    verb = VERBS[name]
    try:
        settings = tyro.cli(
            _find(verb.settings),
            args=arguments,
            prog=f"singlora {name}",
            description=verb.line,
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        quiet_libraries()
        _find(verb.work)(settings)
    except UserError as error:
        print(f"singlora {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough, as in `singlora inspect FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would complain again
    except KeyboardInterrupt:
        print(f"singlora {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the screen; theirs is not the job the user asked for."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    main()
