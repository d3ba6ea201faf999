"""What the folders promise: links, arrows, sizes, and what the package never does."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dsl", "compiler", "passes", "runtime")
ARROWS = {
    "dsl": set(),
    "compiler": {"dsl"},
    "passes": {"compiler", "dsl"},
    "runtime": {"compiler", "dsl"},
}
FLOORS = (
    {"errors", "garbage", "kernels", "solving"},
    {"layout"},
    {"graph"},
    {"costs"},
    {"placing", "stages"},
    {"composites", "schedules"},
    {"autodiff", "codegen"},
    {"capture"},
    {"program"},
    {"report"},
    {"public"},
)
"""The rooms of `compiler/`, lowest first: each imports from those below alone."""
LONGEST_FUNCTION, LONGEST_FILE = 48, 490
"""Lines of the longest function with its docstring, and of the longest file without comments."""
EXECUTES = {"eval", "exec", "compile", "__import__"}
PICKLES = {
    *("pickle", "_pickle", "pickletools", "copyreg", "marshal", "shelve", "multiprocessing"),
    *("dill", "cloudpickle", "joblib", "jsonpickle", "torch.load", "torch.save"),
    *("torch.serialization", "torch.package", "torch.jit.load", "torch.distributed.checkpoint"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"),
}
"""Modules and functions that execute what they read, by dotted name."""
OBJECT_COLLECTIVE = re.compile(r"_object(_list)?$")
"""`all_gather_object`, `broadcast_object_list`, `send_object_list` and so on: they pickle."""


def sources() -> list[Path]:
    """The product's files, each once."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    own = ROOT / "src" / "meshwright"
    return found + sorted(own.rglob("*.py"))  # which does not follow the links


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import; `from a import b` gives both `a` and `a.b`."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def place(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def wrong_arrow(folder: str, name: str) -> bool:
    """Whether a file in `folder` may not import `name`."""
    parts = name.split(".")
    if parts[0] in FOLDERS or parts[0] == "":
        return True  # a second copy of every class, or a relative import
    if parts[0] != "meshwright":
        return False
    target = parts[1] if len(parts) > 1 else "meshwright"
    return target not in ARROWS[folder] | {folder} and name != "meshwright"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_link_resolves_to_the_root_folder(folder: str) -> None:
    link = ROOT / "src" / "meshwright" / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / folder
    assert importlib.import_module(f"meshwright.{folder}").__name__ == f"meshwright.{folder}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_importing_a_root_folder_by_its_bare_name_says_what_to_import(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"ImportError: `{folder}` is a folder of meshwright's sources" in done.stderr
    assert f"import `meshwright.{folder}`" in done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_arrows_between_the_folders(folder: str) -> None:
    wrong = [
        f"{place(path, line)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imported(path)
        if wrong_arrow(folder, name)
    ]
    assert wrong == []


def test_an_arrow_against_the_order_is_seen() -> None:
    assert wrong_arrow("dsl", "meshwright.compiler.layout.mesh")
    assert wrong_arrow("compiler", "meshwright.passes")
    assert wrong_arrow("passes", "runtime.executor")
    assert not wrong_arrow("runtime", "meshwright.compiler.graph.ir.Node")


def test_the_plan_language_does_not_import_torch() -> None:
    wrong = [
        place(path, line)
        for path in sorted((ROOT / "dsl").rglob("*.py"))
        for line, name in imported(path)
        if name.split(".")[0] == "torch"
    ]
    assert wrong == []


def executions(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of each use of what makes code of text: calls, and any other mention."""
    return [
        (node.lineno, node.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in EXECUTES
    ] + [
        (node.lineno, name)
        for node in ast.walk(tree)
        for name in names_of(node)
        if name.startswith("builtins.") and name.removeprefix("builtins.") in EXECUTES
    ]


def unpickling(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of each import or mention of what pickles, or executes what it reads."""
    return [
        (getattr(node, "lineno", 0), name)
        for node in ast.walk(tree)
        for name in names_of(node)
        if OBJECT_COLLECTIVE.search(name)
        or any(name == each or name.startswith(f"{each}.") for each in PICKLES)
    ]


def names_of(node: ast.AST) -> list[str]:
    """The dotted names that a node imports, reads or, for `import_module`, spells."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "getattr")):
        return [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
    return []


def test_code_is_executed_where_it_is_generated_and_where_a_rank_runs_its_script() -> None:
    """The first is made of a graph in memory, and the other is named on the command line."""
    found = {
        place(path): sorted(name for _, name in uses)
        for path in sources()
        if (uses := executions(ast.parse(path.read_text(encoding="utf-8"))))
    }
    one = ["compile", "exec"]
    assert found == {"compiler/codegen/printing.py": one, "src/meshwright/launcher/rank.py": one}


def test_nothing_pickles_or_executes_what_it_reads() -> None:
    found = [
        f"{place(path, line)}: {name}"
        for path in sources()
        for line, name in unpickling(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        *(
            "import pickle",
            "import pickle as p",
            "from marshal import loads",
            "import torch.package",
        ),
        *("x = torch.load(path)", "load = torch.load", "from torch import save", "import shelve"),
        *("torch.serialization.load(file)", "import_module('dill')", "import multiprocessing.pool"),
        *("yaml.load(text)", "from yaml import unsafe_load", "numpy.load(path)"),
        *("dist.all_gather_object(a, b)", "from torch.distributed import broadcast_object_list"),
        *("dist.send_object_list(a)", "getattr(dist, 'gather_object')", "d.scatter_object_list(a)"),
    ],
)
def test_whatever_pickles_is_seen(text: str) -> None:
    assert unpickling(ast.parse(text))


@pytest.mark.parametrize(
    "text", ["eval(x)", "f = exec", "map(eval, x)", "compile(x, y, z)", "builtins.exec(x)"]
)
def test_whatever_executes_is_seen(text: str) -> None:
    assert executions(ast.parse(text))


def test_what_only_looks_alike_is_allowed() -> None:
    for text in (
        "model.eval()",
        "re.compile(x)",
        "torch.compile(x)",
        "json.load(file)",
        "yaml.safe_load",
    ):
        tree = ast.parse(text)
        assert not executions(tree)
        assert not unpickling(tree)


def swallows_everything(node: ast.AST) -> bool:
    """Whether this is a handler of any exception that does not end by raising one."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    any_type = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
    return any_type and not isinstance(node.body[-1], ast.Raise)


def test_no_handler_swallows_every_exception() -> None:
    found = [
        place(path, getattr(node, "lineno", 0))
        for path in sources()
        for node in nodes(path)
        if swallows_everything(node)
    ]
    assert found == []


def test_no_name_of_the_package_is_also_that_of_another_module() -> None:
    """Importing the module would put it in the name's place."""
    package = importlib.import_module("meshwright")
    folder = ROOT / "src" / "meshwright"
    modules = {path.stem for path in folder.iterdir() if path.suffix in (".py", "")}
    for name in sorted(modules & vars(package).keys() - {"__init__", "__main__", "__pycache__"}):
        assert vars(package)[name] is sys.modules.get(f"meshwright.{name}"), name


def module_of(path: Path) -> str:
    """The dotted name that a file of the product is imported by."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[:1] = [] if parts[0] == "src" else ["meshwright", parts[0]]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """By module of the product: those that it imports anywhere, lazily and for types too."""
    names = {module_of(path): path for path in sources()}
    return {name: set(_imports(path, names)) - {name} for name, path in names.items()}


def _imports(path: Path, names: Container[str]) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield from [module] if module in names else [node.module or ""]


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of names that reach one another, each sorted."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen, left = set[str](), list(arrows[start])
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += arrows.get(name, set())
        reached[start] = seen
    found = {
        tuple(sorted(other for other in reached[name] if name in reached.get(other, ())))
        for name in arrows
        if name in reached[name]
    }
    return [list(circle) for circle in sorted(found)]


def test_no_modules_import_each_other_but_a_plan_and_its_builder() -> None:
    """`Plan.build` returns a builder, whose `plan` returns a `Plan`: one thing in two files."""
    assert circles(imports()) == [["meshwright.dsl.builder", "meshwright.dsl.plan"]]


def test_a_circle_is_seen() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set[str](), "e": {"e2"}, "e2": {"e"}}
    assert circles(arrows) == [["a", "b", "c"], ["e", "e2"]]


def floor_of(module: str) -> int | None:
    """The floor of `compiler/` that a module is on; nothing outside of it."""
    parts = module.split(".")
    if parts[:2] != ["meshwright", "compiler"] or len(parts) < 3:
        return None
    return next(i for i, rooms in enumerate(FLOORS) if parts[2] in rooms)


def test_rooms_of_the_compiler_stand_on_those_below() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if (own := floor_of(name)) is not None
        and (below := floor_of(other)) is not None
        and name.split(".")[2] != other.split(".")[2]
        and own <= below
    ]
    assert wrong == []


def function_lengths() -> dict[str, int]:
    return {
        f"{place(path)} {node.name}, line {node.lineno}": node.end_lineno - node.lineno + 1
        for path in sources()
        for node in nodes(path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    }


def code_lines(path: Path) -> int:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def beyond(sizes: Mapping[str, int], most: int) -> list[str]:
    """What is longer than `most`, the longest first."""
    longest = sorted(sizes.items(), key=lambda item: -item[1])
    return [f"{name}: {size}" for name, size in longest if size > most]


def test_no_function_is_longer_than_the_longest_and_nine_in_ten_fit_in_twenty_five() -> None:
    sizes = function_lengths()
    assert beyond(sizes, LONGEST_FUNCTION) == []
    assert len(beyond(sizes, 25)) <= 0.1 * len(sizes), beyond(sizes, 25)


def test_no_file_is_longer_than_the_longest() -> None:
    assert beyond({place(path): code_lines(path) for path in sources()}, LONGEST_FILE) == []


def test_file_names_say_what_is_inside() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [place(path) for path in sources() if path.name in vague] == []
