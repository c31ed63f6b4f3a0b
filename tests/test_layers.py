"""Which file may import which: read from the sources, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVELS = (
    "errors files device randomness progress terminal settings",
    "adapters models data",
    "formats",
    "training sampling",
    "eval",
    "toyworld",
    "app demo cli eval.compare eval.language train_dreambooth benchmarks",
)
"""The floors of the house, from the ground up. A file imports from its own floor and those below."""

LEVEL = {unit: number for number, units in enumerate(LEVELS) for unit in units.split()}

ONLY = {
    "singlora_diffusion.adapters": {
        "adapters",
        "models.attention_view",
        "models.cpu_layers",
        "models.linear_view",
        "models.network",
        "models.quantized",
    },
    "singlora_diffusion.adapters.budget": {"adapters", "models.families", "models.network"},
    "singlora_diffusion.models": {"models"},
    "eval": {"eval", "data", "sampling.manifest", "models.hub"},
    "eval.compare": {
        "eval",
        "adapters",
        "data",
        "formats",
        "models",
        "sampling",
        "training",
        "toyworld",
    },
    "eval.compare.__main__": {"cli"},
    "eval.language": {"eval", "adapters", "data.draws", "formats", "models", "training", "toyworld"},
}
"""What a room may import above the ground floor: adapters know no family (budgets ask the table of families),
models no adapter, scores neither; only a comparison, which trains and generates, knows all of them."""

ONLY_IN = {
    "gradio": ("singlora_diffusion.app.",),
    "peft": (
        "singlora_diffusion.adapters.peft_baselines",
        "singlora_diffusion.formats.peft_folder",
        "benchmarks.",  # measured as its users use it
    ),
    "open_clip": ("eval.encoder_models", "singlora_diffusion.toyworld.", "benchmarks."),
    "timm": ("eval.encoder_models", "singlora_diffusion.toyworld.", "benchmarks."),
}

HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip", "timm", "scipy"}


def sources() -> dict[str, Path]:
    """Module name -> file, of everything that ships, and the benchmarks."""
    files = [*ROOT.glob("*.py")]
    for folder in ("singlora_diffusion", "eval", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in sorted(parts.items())}


MODULES = sources()


@cache
def imports(module: str, *, at_start: bool = False) -> frozenset[str]:
    """Absolute names that a module imports, anywhere in it; `at_start`: those that run when it is imported."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in walk(ast.parse(file.read_text()), at_start):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else origin for name in names}
    return frozenset(found - {module})


def walk(node: ast.AST, at_start: bool) -> Iterator[ast.AST]:
    """`ast.walk`, without the insides of functions and of `if TYPE_CHECKING` where `at_start`.

    What a file does when it is run as a program is no import of its own: it stands on top then.
    """
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not (at_start and (is_function or is_typing)):
            yield from walk(child, at_start)


def unit(module: str) -> str:
    """What LEVELS calls it: the first name inside the package, or the name outside; some rooms stand alone."""
    for room in ("eval.compare", "eval.language"):
        if f"{module}.".startswith(f"{room}."):
            return room
    return module.removeprefix("singlora_diffusion.").partition(".")[0]


def ours(module: str) -> bool:
    return module in MODULES


def test_every_file_has_a_level() -> None:
    units = {unit(module) for module in MODULES} - {"singlora_diffusion"}
    assert units <= set(LEVEL), "give it a place in LEVELS"
    assert not [name for name in ONLY if name not in MODULES], "a rule about a file that is not there"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "singlora_diffusion"])
def test_imports_go_downwards(module: str) -> None:
    above = {name for name in imports(module) if ours(name) and LEVEL.get(unit(name), -1) > LEVEL[unit(module)]}
    assert not above, f"{module} is below {above}"


@pytest.mark.parametrize("room", ONLY)
def test_a_room_knows_only_what_it_may(room: str) -> None:
    for module in MODULES:
        rooms = [one for one in ONLY if f"{module}.".startswith(f"{one}.")]
        if rooms and room == max(rooms, key=len):  # the narrowest rule counts
            used = {name.removeprefix("singlora_diffusion.") for name in imports(module) if ours(name)}
            used = {name for name in used if LEVEL.get(name.partition(".")[0]) != 0 and name != "singlora_diffusion"}
            foreign = {name for name in used if not any(f"{name}.".startswith(f"{may}.") for may in ONLY[room])}
            assert not foreign, f"{module} imports {foreign}"


def test_no_two_files_import_each_other() -> None:
    """Counting what runs when a file is imported."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in sorted(imports(module, at_start=True) & set(MODULES)):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_file(library: str) -> None:
    users = {m for m in MODULES for name in imports(m) if name.partition(".")[0] == library}
    assert users <= {m for m in users if m.startswith(ONLY_IN[library])}, users


def test_flags_are_parsed_where_programs_begin() -> None:
    for module, file in MODULES.items():
        parses = "tyro.cli(" in file.read_text()
        assert not parses or module == "singlora_diffusion.settings" or '__name__ == "__main__"' in file.read_text(), (
            module
        )


def test_help_loads_nothing_heavy() -> None:
    """What stands behind `singlora COMMAND --help`: the command itself and every command's settings."""
    from singlora_diffusion.cli import COMMANDS

    todo = ["singlora_diffusion.cli", *(command.settings.partition(":")[0] for command in COMMANDS.values())]
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        heavy = {name for name in imports(module, at_start=True) if name.partition(".")[0] in HEAVY}
        assert not heavy, f"{module} imports {heavy}"
        todo += imports(module, at_start=True)
        todo += [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]  # packages run as well


def test_nothing_is_unpickled() -> None:
    for module, file in MODULES.items():
        assert not {name.partition(".")[0] for name in imports(module)} & {"pickle", "dill", "joblib", "shelve"}, module
        calls = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not calls & {"torch.load", "torch.save"}, module


def test_no_file_is_named_for_nothing() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    names = {part for file in files for part in file.relative_to(ROOT).parts}
    assert not {name.removesuffix(".py") for name in names} & {"utils", "util", "helpers", "helper", "common", "misc"}
