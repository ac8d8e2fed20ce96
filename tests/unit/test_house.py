"""The rules of the house, read off the source: who imports whom, and what no module may do.

Each rule is a function from one module's source to a list of complaints, so that it can be shown
both to hold for the product and to catch what it is there for.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "morph_runtime": ROOT / "morph_runtime",
    "morph_backend": ROOT / "backend" / "morph_backend",
    "morph_client": ROOT / "client" / "morph_client",
}
MAX_LINES = 400  # split where a file passes about 300

# What each package may import besides the standard library and itself. A new third-party name
# belongs into pyproject.toml too; the three packages' own names say which way imports go.
CLIENT_BASE = {"click", "google", "grpc", "numpy", "rich", "tritonclient", "typer"}
SERVER = {
    "jinja2",
    "llguidance",
    "msgspec",
    "numpy",
    "psutil",
    "pynvml",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
}
MAY_IMPORT = {
    "morph_runtime": SERVER,
    "morph_backend": SERVER | {"morph_runtime", "pytriton", "triton_python_backend_utils"} | CLIENT_BASE,
    "morph_client": CLIENT_BASE | {"matplotlib"},
}
# Rooms that may import more than their package does, at the top: nothing outside imports them but in a function.
MAY_ALSO_IMPORT = {"morph_client/openai": {"fastapi", "pydantic", "starlette", "uvicorn"}}
# `morph serve` may look for the server that stands beside it, but only when it is called; `morph chat` loads the
# optional libraries of chat templates. AutoAWQ's worker is a script for an environment of its own; nothing imports it.
MAY_IMPORT_IN_FUNCTIONS = {
    "morph_client/cli": {"morph_backend"},
    "morph_client/chat_template": {"jinja2", "tokenizers", "transformers"},
    "morph_client/awq/worker": {"awq", "tokenizers"},
    # What only a GPU needs is imported when there is one.
    "morph_runtime/memory/cuda": {"cuda"},
}
# Only modules of the CUDA kernels are written in Triton's language; nothing on the CPU path imports them.
MAY_IMPORT_TRITON = "morph_runtime/kernels/cuda/"
# Rooms that must not know of a thing (the table in the design).
MUST_NOT_KNOW = {"morph_runtime/scheduler": {"torch"}, "morph_runtime/simulate": {"torch"}}

# Modules that may call time.sleep, each with its reason. Elsewhere wait on what is waited for:
# a condition, an event, a selector, a process.
MAY_SLEEP: dict[str, str] = {}

PICKLES = {"_pickle", "cPickle", "cloudpickle", "dill", "joblib", "pickle", "shelve"}
BLIND = {"BaseException", "Exception"}

# Spelt in two parts so that this file does not complain about itself.
LEFTOVER = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")
MACHINE_PATH = re.compile(r"(?<![\w.-])/(wo" + r"rk|ro" + r"ot)/")
REGISTRY_HOST = re.compile(r"\b(py" + r"pi\.org|python" + r"hosted\.org)")


class Module(NamedTuple):
    """One source file: where it stands in its package, and its text."""

    place: str  # "morph_runtime/kv/pool.py"
    source: str

    @property
    def package(self) -> str:
        return self.place.split("/", 1)[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.place)


Rule = Callable[[Module], "list[str]"]


def modules() -> Iterator[Module]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield Module(f"{package}/{path.relative_to(folder).as_posix()}", path.read_text(encoding="utf-8"))


def applies(table: dict[str, set[str]], place: str) -> set[str]:
    """The names a table gives for a place: those of the module itself and of the folders around it."""
    stem = place.removesuffix(".py")
    return set().union(*(names for key, names in table.items() if stem == key or stem.startswith(key + "/")))


def imports(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Each imported top-level name with its line, and whether it is imported inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno, in_function
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno, in_function
        else:
            yield from imports(node, in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def imports_go_one_way(module: Module) -> list[str]:
    allowed = MAY_IMPORT[module.package] | {module.package} | applies(MAY_ALSO_IMPORT, module.place)
    if module.place.startswith(MAY_IMPORT_TRITON):
        allowed = allowed | {"triton"}
    complaints = []
    for name, line, in_function in imports(module.tree):
        known = allowed | (applies(MAY_IMPORT_IN_FUNCTIONS, module.place) if in_function else set())
        if name in applies(MUST_NOT_KNOW, module.place) or (name not in known and name not in sys.stdlib_module_names):
            complaints.append(f"line {line}: imports {name}")
    return complaints


def modules_are_small(module: Module) -> list[str]:
    lines = len(module.source.splitlines())
    return [f"{lines} lines, more than {MAX_LINES}"] if lines > MAX_LINES else []


def _names(node: ast.expr | None) -> set[str]:
    if isinstance(node, ast.Tuple):
        return set().union(*(_names(element) for element in node.elts))
    return {node.id} if isinstance(node, ast.Name) else set()


def _does_nothing(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(statement, (ast.Pass, ast.Continue))
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in body
    )


def no_error_is_swallowed(module: Module) -> list[str]:
    complaints = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                complaints.append(f"line {node.lineno}: a bare except")
            elif _names(node.type) & BLIND and _does_nothing(node.body):
                complaints.append(f"line {node.lineno}: a blind except that does nothing")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("contextlib.suppress", "suppress"):
            suppressed = set().union(*(_names(argument) for argument in node.args))
            if suppressed & BLIND:
                complaints.append(f"line {node.lineno}: suppresses every exception")
    return complaints


def nothing_is_pickled(module: Module) -> list[str]:
    return [f"line {line}: imports {name}" for name, line, _ in imports(module.tree) if name in PICKLES]


def nothing_sleeps(module: Module) -> list[str]:
    if module.place in MAY_SLEEP:
        return []
    complaints = []
    for node in ast.walk(module.tree):
        attribute = isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep"
        name = isinstance(node, ast.ImportFrom) and node.module == "time" and any(a.name == "sleep" for a in node.names)
        if attribute or name:
            complaints.append(f"line {getattr(node, 'lineno', 0)}: time.sleep")
    return complaints


def nothing_is_left_over(module: Module) -> list[str]:
    return matches(LEFTOVER, module.source)


def matches(pattern: re.Pattern[str], text: str) -> list[str]:
    return [f"line {n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


RULES: list[Rule] = [
    imports_go_one_way,
    modules_are_small,
    no_error_is_swallowed,
    nothing_is_pickled,
    nothing_sleeps,
    nothing_is_left_over,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    complaints = [f"{module.place}: {complaint}" for module in modules() for complaint in rule(module)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    "rule, place, source",
    [
        (imports_go_one_way, "morph_runtime/engine/loop.py", "import morph_backend"),
        (imports_go_one_way, "morph_runtime/engine/loop.py", "from morph_client.types import Reply"),
        (imports_go_one_way, "morph_runtime/engine/loop.py", "def f():\n    import tritonclient.grpc"),
        (imports_go_one_way, "morph_runtime/engine/loop.py", "if True:\n    import triton_python_backend_utils"),
        (imports_go_one_way, "morph_runtime/scheduler/batch.py", "import torch"),
        (imports_go_one_way, "morph_runtime/scheduler.py", "import torch"),
        (imports_go_one_way, "morph_runtime/simulate/engine.py", "def f():\n    import torch"),
        (imports_go_one_way, "morph_backend/model.py", "import morph_client"),
        (imports_go_one_way, "morph_client/sync.py", "import torch"),
        (imports_go_one_way, "morph_client/sync.py", "def f():\n    import morph_backend"),
        (imports_go_one_way, "morph_client/cli/serve.py", "import morph_backend"),
        (imports_go_one_way, "morph_client/cli/serve.py", "def f():\n    import morph_runtime"),
        (imports_go_one_way, "morph_client/sync.py", "import fastapi"),
        (imports_go_one_way, "morph_client/cli/openai.py", "def f():\n    import fastapi"),
        (imports_go_one_way, "morph_client/openai/app.py", "import torch"),
        (imports_go_one_way, "morph_client/sync.py", "import a_package_nobody_declared"),
        (modules_are_small, "morph_runtime/kv/pool.py", "x = 1\n" * (MAX_LINES + 1)),
        (no_error_is_swallowed, "morph_runtime/kv/pool.py", "try:\n    f()\nexcept:\n    pass"),
        (no_error_is_swallowed, "morph_runtime/kv/pool.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (no_error_is_swallowed, "morph_runtime/kv/pool.py", "try:\n    f()\nexcept (OSError, BaseException):\n    ..."),
        (no_error_is_swallowed, "morph_runtime/kv/pool.py", "with contextlib.suppress(Exception):\n    f()"),
        (nothing_is_pickled, "morph_backend/ipc.py", "import pickle"),
        (nothing_is_pickled, "morph_backend/ipc.py", "def f():\n    from dill import loads"),
        (nothing_sleeps, "morph_backend/ipc.py", "import time\ntime.sleep(1)"),
        (nothing_sleeps, "morph_backend/ipc.py", "from time import sleep"),
        (nothing_sleeps, "morph_backend/ipc.py", "import time\nf(wait=time.sleep)"),
        (nothing_is_left_over, "morph_backend/ipc.py", "# TO" + "DO: later"),
    ],
)
def test_the_rule_catches_a_breach(rule: Rule, place: str, source: str) -> None:
    assert rule(Module(place, source))


@pytest.mark.parametrize(
    "rule, place, source",
    [
        (imports_go_one_way, "morph_runtime/kv/pool.py", "import os, torch\nfrom morph_runtime import config"),
        (imports_go_one_way, "morph_runtime/kv/pool.py", "from . import blocks\nfrom ..config import Settings"),
        (imports_go_one_way, "morph_runtime/schedulers.py", "import torch"),
        (imports_go_one_way, "morph_backend/model.py", "from morph_runtime.config import Settings"),
        (imports_go_one_way, "morph_client/cli/serve.py", "def f():\n    import morph_backend.launcher"),
        (imports_go_one_way, "morph_client/openai/app.py", "import fastapi, tritonclient"),
        (no_error_is_swallowed, "morph_runtime/kv/pool.py", "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
        (no_error_is_swallowed, "morph_runtime/kv/pool.py", "try:\n    f()\nexcept Exception as e:\n    log(e)"),
        (nothing_sleeps, "morph_client/aio.py", "import asyncio\nasync def f():\n    await asyncio.sleep(1)"),
    ],
)
def test_the_rule_lets_good_code_pass(rule: Rule, place: str, source: str) -> None:
    assert rule(Module(place, source)) == []


def test_every_folder_with_modules_is_a_package() -> None:
    """Else the wheel would leave it out while a checkout still works."""
    folders = {path.parent for root in PACKAGES.values() for path in root.rglob("*.py")}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_modules_allowed_to_sleep_exist_and_do() -> None:
    sleepers = {module.place for module in modules() if "sleep" in module.source}
    assert set(MAY_SLEEP) <= sleepers, "take it off the list"


def test_importing_the_client_loads_neither_torch_nor_the_server() -> None:
    code = "import sys, morph_client.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "fastapi", "morph_runtime", "morph_backend"} & set(done.stdout.split())


def repository_texts() -> Iterator[tuple[str, str]]:
    """Every text file that belongs to the repository: what git tracks, or would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= 1 << 20 else b"\0"
        if b"\0" not in data:
            yield name, data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine paths", "registry hosts"])
def test_no_file_names_a_place_that_users_lack(pattern: re.Pattern[str]) -> None:
    complaints = [f"{name}: {found}" for name, text in repository_texts() for found in matches(pattern, text)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    "text, found",
    [
        ("cd /wo" + "rk/main", True),
        ('open("/ro' + 'ot/.cache/x")', True),
        ("a frame/wo" + "rk/flow", False),
        ("/workspace/x", False),
    ],
)
def test_a_machine_path_is_told_from_other_words(text: str, found: bool) -> None:
    assert bool(matches(MACHINE_PATH, text)) is found
