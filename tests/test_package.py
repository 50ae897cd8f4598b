"""The rooms: linked into the package, imported by one name only, and only along design's arrows."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dovetail

ROOT = Path(__file__).resolve().parents[1]
FACE = "src/dovetail"

# Folder -> which of the other folders its modules may import.
ARROWS: dict[str, frozenset[str]] = {
    "ir": frozenset(),
    "solvers": frozenset(),
    "tuning_db": frozenset({"ir"}),
    "capture": frozenset({"ir"}),
    "passes": frozenset({"ir", "solvers", "tuning_db"}),
    "codegen": frozenset({"ir"}),
    "runtime": frozenset({"ir"}),
}
ROOMS = sorted(ARROWS)

# A plan is read, checked and solved for without a model library.
TORCH_FREE = ("ir", "solvers")
MODEL_LIBRARIES = frozenset({"accelerate", "torch", "transformers"})

# Loading one of these formats runs code that the file brings.
CODE_ON_LOAD = frozenset({"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"})


@dataclass(frozen=True, slots=True)
class Import:
    """One module that a source file names in an import, and the line."""

    module: str
    line: int


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Yield every import in `source`, wherever it stands; `package` resolves relative ones.

    `from a import b` yields `a.b`: whether b is a module or a name in one, its room is the same.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (Import(name.name, node.lineno) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield from (Import(f"{base}.{name.name}", node.lineno) for name in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield Import(module, node.lineno)


def room_of(module: str) -> str | None:
    """Name the folder of ours that holds `module`: a room, the face, or None for other code."""
    parts = module.split(".")
    if parts[0] != "dovetail":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ARROWS else FACE


def forbidden_arrow(room: str, found: Import) -> str | None:
    """Refuse an import from another room that the table lacks."""
    target = room_of(found.module)
    if target in (None, room) or target in ARROWS[room]:
        return None
    allowed = ", ".join(sorted(ARROWS[room])) or "nothing of ours"
    return f"imports {found.module} of {target}/; {room}/ may import {allowed}"


def forbidden_library(room: str, found: Import) -> str | None:
    """Refuse a model library in a room that works without one."""
    if room not in TORCH_FREE or found.module.split(".")[0] not in MODEL_LIBRARIES:
        return None
    return f"imports {found.module}; {room}/ works without torch and transformers"


def forbidden_format(folder: str, found: Import) -> str | None:
    """Refuse a serialiser whose files run code when they are loaded."""
    if found.module.split(".")[0] not in CODE_ON_LOAD:
        return None
    return f"imports {found.module}, whose files run code on load; {folder}/ writes plain data"


Rule = Callable[[str, Import], str | None]


def complaints(rule: Rule, folder: str) -> list[str]:
    """Apply `rule` to every import of every Python file below `folder`, links not followed."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        inside = path.parent.relative_to(ROOT).parts
        package = ".".join(("dovetail", *inside) if inside[0] in ARROWS else inside[1:])
        for each in imports_of(path.read_text(encoding="utf-8"), package):
            complaint = rule(folder, each)
            if complaint is not None:
                found.append(f"{path.relative_to(ROOT)}:{each.line} {complaint}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_along_the_arrows(room: str) -> None:
    assert complaints(forbidden_arrow, room) == []


@pytest.mark.parametrize("room", TORCH_FREE)
def test_torch_free_rooms_name_no_model_library(room: str) -> None:
    assert complaints(forbidden_library, room) == []


@pytest.mark.parametrize("folder", [*ROOMS, FACE, "bench", "examples", "tests"])
def test_nothing_uses_a_format_that_runs_code_on_load(folder: str) -> None:
    assert complaints(forbidden_format, folder) == []


@pytest.mark.parametrize(
    ("room", "package", "source", "complaint"),
    [
        (
            "ir",
            "dovetail.ir",
            "import dovetail.passes.lower",
            "imports dovetail.passes.lower of passes/; ir/ may import nothing of ours",
        ),
        (
            "runtime",
            "dovetail.runtime",
            "def late():\n    from dovetail import codegen",
            "imports dovetail.codegen of codegen/; runtime/ may import ir",
        ),
        (
            "passes",
            "dovetail.passes.policies",
            "from ...runtime.pool import Pool",
            "imports dovetail.runtime.pool.Pool of runtime/; "
            "passes/ may import ir, solvers, tuning_db",
        ),
        (
            "solvers",
            "dovetail.solvers",
            "import importlib\nimportlib.import_module('dovetail.ir')",
            "imports dovetail.ir of ir/; solvers/ may import nothing of ours",
        ),
        (
            "capture",
            "dovetail.capture",
            "from dovetail.cli import main",
            "imports dovetail.cli.main of src/dovetail/; capture/ may import ir",
        ),
    ],
)
def test_arrow_walk_refuses(room: str, package: str, source: str, complaint: str) -> None:
    found = [forbidden_arrow(room, each) for each in imports_of(source, package)]
    assert [each for each in found if each is not None] == [complaint]


def test_arrow_walk_accepts_the_room_itself_and_other_code() -> None:
    source = "from . import unit\nfrom ..ir.task import Task\nimport dovetail.ir.x\nimport numpy.ir"
    found = [forbidden_arrow("passes", each) for each in imports_of(source, "dovetail.passes")]
    assert found == [None] * 4


def test_library_walk_refuses_a_late_torch() -> None:
    (found,) = imports_of("def late():\n    import torch.nn", "dovetail.ir")
    assert forbidden_library("ir", found) == (
        "imports torch.nn; ir/ works without torch and transformers"
    )
    assert forbidden_library("runtime", found) is None


def test_format_walk_refuses_pickle() -> None:
    (found,) = imports_of("from pickle import loads", "")
    assert forbidden_format("tests", found) == (
        "imports pickle.loads, whose files run code on load; tests/ writes plain data"
    )


def test_links_are_the_rooms() -> None:
    links = {path.name: path.readlink() for path in (ROOT / FACE).iterdir() if path.is_symlink()}
    assert links == {room: Path("..", "..", room) for room in ROOMS}
    assert all((ROOT / FACE / room).resolve() == ROOT / room for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_every_folder_of_modules_is_a_package(room: str) -> None:
    folders = {path.parent for path in (ROOT / room).rglob("*.py")}
    missing = [
        str(each.relative_to(ROOT)) for each in folders if not (each / "__init__.py").exists()
    ]
    assert missing == [], "a folder without __init__.py is left out of the wheel"


@pytest.mark.parametrize("room", ROOMS)
def test_bare_import_is_refused(room: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"import of {room} halted"):
        importlib.import_module(room)


@pytest.mark.parametrize("room", TORCH_FREE)
def test_room_loads_where_torch_is_missing(room: str) -> None:
    script = (
        "import importlib, pkgutil, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"room = importlib.import_module('dovetail.{room}')\n"
        "for module in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    package_parent = Path(dovetail.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=package_parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
