"""The rules of the house: who imports whom, what lies where, and what is not written."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import machinery
from pathlib import Path
from typing import Any

import pytest

from domi_fast import _core
from domi_fast.channels import USER_FIRST, USER_LAST, LibraryChannel

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "domi_fast"
PARTS = sorted((PACKAGE / "_core_parts").glob("*.pxi"))
CORE = [PACKAGE / "_core.pyx", *sorted(PACKAGE.glob("*.pxd")), *PARTS]
# Above the storey of Node and Client. What is not there yet is subject to the rules from its first
# day. The gateway is the floor that two wings stand on.
WINGS = {"stateful", "discovery", "worker", "actor", "registry", "gateway", "admin"}
FLOORS = {"gateway"}
GENERATED = {"__pycache__", "build", "dist", "wheelhouse", "out"}


# ----------------------------------------------------------------------------------------- imports


def modules() -> dict[str, Path]:
    """Every Python module of the package, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """What a module imports, as absolute names, wherever in the file it does so."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            prefix = ".".join([*base, node.module or ""]).strip(".") if node.level else node.module
            assert prefix is not None
            # Of `from . import x` the x may be a module; the names are matched by prefix.
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def wing_of(name: str) -> str | None:
    part = name.removeprefix("domi_fast.").partition(".")[0]
    return part if within(name, "domi_fast") and part in WINGS else None


def test_what_a_module_imports_is_found() -> None:
    found = set(imports("domi_fast.mesh", PACKAGE / "mesh.py"))
    assert {"asyncio", "domi_fast.transport", "domi_fast._core.Session"} <= found
    inside = set(imports("domi_fast.registry", PACKAGE / "registry" / "__init__.py"))
    assert {"domi_fast.errors.RegistryError", "domi_fast.registry.sqlite.SqliteRegistry"} <= inside


def test_the_core_imports_no_module_of_the_package() -> None:
    wrong = re.compile(r"^\s*(?:c?import|from)\s+(?:\.|domi_fast\b)", re.MULTILINE)
    for path in CORE:
        assert not wrong.search(path.read_text()), path.name


def test_the_core_can_be_loaded_alone() -> None:
    """The extension module by its file: the package is not there, and nothing asks for it."""
    program = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('domi_fast._core', sys.argv[1])\n"
        "core = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(core)\n"
        "assert core.FrameReader().feed(core.encode_frame(50, b'x')) == [(50, b'x', b'')]\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('domi_fast')]))\n"
    )
    path = _core.__file__
    assert path is not None
    assert path.endswith(tuple(machinery.EXTENSION_SUFFIXES))
    assert set(run_alone(program, path)) <= {"domi_fast._core"}


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_wing_imports_neither_the_core_nor_another_wing(wing: str) -> None:
    for name, path in modules().items():
        if wing_of(name) != wing:
            continue
        for imported in imports(name, path):
            assert not within(imported, "domi_fast._core"), f"{name} imports {imported}"
            other = wing_of(imported)
            assert other in {None, wing} | FLOORS, f"{name} imports {imported}"


def test_the_registry_knows_nothing_of_sockets() -> None:
    found = {name: path for name, path in modules().items() if wing_of(name) == "registry"}
    assert len(found) >= 5
    for name, path in found.items():
        for imported in imports(name, path):
            assert imported.partition(".")[0] not in {"socket", "socketserver", "ssl"}, name
            if within(imported, "domi_fast") and not within(imported, "domi_fast.registry"):
                assert within(imported, "domi_fast.errors"), f"{name} imports {imported}"


def test_the_arrows_point_down() -> None:
    """No module imports, by whatever detour, one that imports it."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for imported in imports(name, path):
            parts = imported.split(".")
            while parts and ".".join(parts) not in known:
                parts.pop()
            target = ".".join(parts)
            if target and not within(name, target):
                graph[name].add(target)
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("domi_fast.errors") < order.index("domi_fast.mesh")
    assert order.index("domi_fast.mesh") < order.index("domi_fast.node")


def test_importing_the_package_imports_packaging_alone() -> None:
    program = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "import domi_fast\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new - set(sys.stdlib_module_names))))\n"
    )
    # Cython's own modules are inside the extension modules, not installed beside them.
    found = {
        name
        for name in run_alone(program)
        if not name.startswith("_cython_") and name != "cython_runtime"
    }
    assert found == {"domi_fast", "packaging"}


def test_a_start_imports_nothing_that_is_needed_sometimes_only() -> None:
    """A node that joins by a file that is there, and is asked by its address."""
    program = (
        "import asyncio, json, sqlite3, sys\n"
        "before = set(sys.modules)\n"
        "from domi_fast import Node\n"
        "async def main():\n"
        "    async with Node('node', registry=sys.argv[1]):\n"
        "        async with Node('other', registry=sys.argv[1]):\n"
        "            print(json.dumps(list(set(sys.modules) - before)))\n"
        "asyncio.run(main())\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite://{folder}/registry.db"
        run_alone(
            "import sys; from domi_fast.registry.sqlite_file import StoreFile\n"
            "StoreFile(sys.argv[1]).close(); print('0')",
            f"{folder}/registry.db",
        )
        loaded = set(run_alone(program, url))
    assert "domi_fast.registry.sqlite" in loaded
    assert not loaded & {"ctypes", "encodings.idna", "pathlib", "tempfile", "uuid"}


def run_alone(program: str, *arguments: str) -> Any:
    """What a program prints as JSON, in an interpreter that has imported nothing before."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths if path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name",
    [
        *("pyproject.toml", "setup.py", "Makefile", "MANIFEST.in", ".ci/run"),
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
        *("docs/protocol.md", "docs/guarantees.md", "docs/concepts.md", "docs/benchmarks.md"),
        "docs/scaling.md",
        *("src/domi_fast/_core.pyx", "src/domi_fast/_core.pxd", "src/domi_fast/_core.pyi"),
        *("src/domi_fast/__init__.py", "tests/reference.py", "bench/__main__.py"),
        *("examples/echo/server.py", "examples/echo/client.py", "bench/peers/epoll_echo.c"),
        "examples/pipeline/stages.py",
    ],
)
def test_what_a_reader_looks_for_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_it_is_typed_and_licensed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert re.search(r'^license = "MIT"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def files() -> Iterator[Path]:
    """Everything that was written by hand; what is built, and hidden folders, are left out."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in GENERATED
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name == ".ci")
        ]
        yield from (Path(folder, name) for name in names)


def test_nothing_is_left_over() -> None:
    left = re.compile(r"(~|\.(orig|rej|bak|old|tmp|swp|swo|log|prof|diff|patch)|^core\.\d+)$")
    found = [str(path.relative_to(ROOT)) for path in files() if left.search(path.name)]
    assert found == []


def test_no_module_is_for_what_fits_nowhere() -> None:
    """A name must say what is inside."""
    vague = {"ut" + "ils", "ut" + "il", "helpers", "misc", "common", "tools", "stuff", "shared"}
    found = {path.stem for path in PACKAGE.rglob("*") if path.suffix in {".py", ".pxi", ".pyx"}}
    assert not found & vague


def test_nothing_speaks_of_such_a_module() -> None:
    word = re.compile("ut" + r"ils\b")
    suffixes = {".py", ".pyx", ".pxd", ".pxi", ".pyi", ".h", ".c", ".md", ".toml", ""}
    found = [
        str(path.relative_to(ROOT))
        for path in files()
        if path.suffix in suffixes
        and not (path.parent == PACKAGE and path.name == "_core.c")
        and word.search(path.read_text(errors="ignore"))
    ]
    assert found == []


# -------------------------------------------------------------------------------------- the core


@pytest.mark.parametrize("part", PARTS, ids=lambda path: path.stem)
def test_a_part_opens_with_its_purpose(part: Path) -> None:
    opening = []
    for line in part.read_text().splitlines():
        if not line.startswith("#"):
            break
        opening.append(line)
    text = " ".join(opening)
    assert len(text) > 60
    assert f'include "_core_parts/{part.name}"' in (PACKAGE / "_core.pyx").read_text()


def test_what_is_not_written_in_the_core() -> None:
    for path in CORE:
        text = path.read_text()
        assert not re.search(r"^\s*except\s*:", text, re.MULTILINE), path.name
        assert not re.search(r"^\s*(DEF|IF|ELIF|ELSE)\b", text, re.MULTILINE), path.name


def test_the_table_of_the_librarys_channels_is_the_cores() -> None:
    text = (PACKAGE / "_core_parts" / "constants.pxi").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"^    (\w+) = (\d+)\b", text, re.M)}
    channels = {name[3:]: value for name, value in numbers.items() if name.startswith("CH_")}
    routed = {LibraryChannel.ZONE, LibraryChannel.GATEWAY}  # as those of users: it knows no name
    assert channels == {channel.name: channel.value for channel in set(LibraryChannel) - routed}
    assert (numbers["USER_FIRST"], numbers["USER_LAST"]) == (USER_FIRST, USER_LAST) == (50, 65499)
