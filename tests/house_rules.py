"""The rules of the house as functions of a file's text: each returns what breaks it, as lines to read (pure)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import TypeGuard

PACKAGES = ("storage", "resilient", "runtime", "chaos")
"""In order: each may import those before it, and itself."""

MOST_LINES = 400
LONG_LINES = 300

PURE = (
    "storage/errors.py", "storage/store.py",
    "resilient/errors.py", "resilient/cadence.py",
    "resilient/checkpoint/geometry.py", "resilient/checkpoint/items.py", "resilient/checkpoint/stored.py",
    "resilient/checkpoint/plan*.py", "resilient/checkpoint/retention.py", "resilient/checkpoint/describe.py",
    "resilient/log/entries.py", "resilient/log/envelope.py", "resilient/log/summary.py",
    "resilient/log/validity.py", "resilient/log/view.py",
    "resilient/detect/decide.py", "resilient/node/coordinate.py", "resilient/node/messages.py",
)  # fmt: skip
"""Data in, data out: these import no I/O, no clock, no randomness, no threads, and nothing that is not here."""

TORCH_FREE = (
    "storage/*.py", "resilient/__init__.py", "resilient/cadence.py", "resilient/errors.py",
    "resilient/log/*.py", "resilient/node/*.py", "resilient/detect/*.py", "resilient/cli/*.py",
    *(f"resilient/checkpoint/{name}.py" for name in (
        "__init__", "codec", "describe", "format", "geometry", "index", "index_file", "items", "plan*", "reader",
        "retention", "stored", "values", "verify", "writer",
    )),
)  # fmt: skip
"""What the keeper and the commands load: importing torch would cost them over a second."""

_EFFECTS = {
    "asyncio", "concurrent", "datetime", "fcntl", "ftplib", "fsspec", "glob", "http", "io", "logging", "mmap",
    "multiprocessing", "os", "pathlib", "queue", "random", "requests", "s3fs", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "socketserver", "ssl", "subprocess", "tempfile", "threading", "time", "torch",
    "urllib", "uuid",
}  # fmt: skip
_EFFECTFUL_CALLS = {"open", "print", "input", "exec", "eval", "__import__"}

_PICKLING_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_PICKLING_CALLS = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip

Problems = Iterator[str]
Rule = Callable[[str, str], Problems]


def imports_go_one_way(path: str, text: str) -> Problems:
    """chaos -> runtime -> resilient -> storage, also inside functions and by name."""
    package = path.split("/")[0]
    if package not in PACKAGES:
        return
    above = set(PACKAGES[PACKAGES.index(package) + 1 :])
    for line, module in _imports(path, text):
        if module.split(".")[0] in above:
            yield f"{path}:{line}: {package} must not import {module}"


def pure_files_have_no_effects(path: str, text: str) -> Problems:
    """Pure files import no I/O and no file of ours that is not pure."""
    if not matches(path, PURE):
        return
    for line, module in _imports(path, text):
        top = module.split(".")[0]
        if top in _EFFECTS:
            yield f"{path}:{line}: a pure file must not import {module}"
        elif top in PACKAGES and not _is_pure_module(module):
            yield f"{path}:{line}: a pure file must not import {module}, which is not in the list of pure files"
    for call in _calls(text):
        if isinstance(call.func, ast.Name) and call.func.id in _EFFECTFUL_CALLS:
            yield f"{path}:{call.lineno}: a pure file must not call {call.func.id}()"


def nothing_is_pickled(path: str, text: str) -> Problems:
    """No pickle and its like, no torch.load that would unpickle, no collective or array that pickles."""
    if path.split("/")[0] not in PACKAGES:
        return
    for line, module in _imports(path, text):
        if module.split(".")[0] in _PICKLING_MODULES:
            yield f"{path}:{line}: {module} pickles"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in _PICKLING_CALLS:
            yield f"{path}:{node.lineno}: {node.attr} pickles"
        elif isinstance(node, ast.alias) and node.name in _PICKLING_CALLS:
            yield f"{path}:{node.lineno}: {node.name} pickles"
    for call in _calls(text):
        keywords = {k.arg: k.value for k in call.keywords}
        if ast.unparse(call.func) in ("torch.load", "torch.serialization.load") and not _true(
            keywords.get("weights_only")
        ):
            yield f"{path}:{call.lineno}: torch.load without weights_only=True unpickles"
        if "allow_pickle" in keywords and not _false(keywords["allow_pickle"]):
            yield f"{path}:{call.lineno}: allow_pickle"


def errors_are_not_swallowed(path: str, text: str) -> Problems:
    """No bare `except:`, no `except Exception` that does nothing."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{path}:{node.lineno}: bare except"
            elif _names_everything(node.type) and all(map(_does_nothing, node.body)):
                yield f"{path}:{node.lineno}: except {ast.unparse(node.type)} that does nothing"
        elif _is_call_of(node, "suppress") and any(map(_names_everything, node.args)):
            yield f"{path}:{node.lineno}: suppress of everything"


def files_are_short(path: str, text: str) -> Problems:
    """A file is read in one sitting."""
    lines = text.count("\n")
    if lines > MOST_LINES:
        yield f"{path}: {lines} lines, at most {MOST_LINES}; split it by purpose"


def public_names_are_explained(path: str, text: str) -> Problems:
    """Modules, public functions, classes and methods of the packages have a docstring."""
    if path.split("/")[0] not in PACKAGES:
        return
    tree = ast.parse(text)
    if tree.body and ast.get_docstring(tree) is None:
        yield f"{path}:1: the module has no docstring"
    yield from _unexplained(path, tree.body, "")


def no_paths_of_this_machine(path: str, text: str) -> Problems:
    """Nothing that exists on one machine only."""
    for number, line in enumerate(text.splitlines(), 1):
        found = re.search(r"(?<![\w.:/-])/(?:work|root)\b", line)
        if found:
            yield f"{path}:{number}: names a path of one machine: {line.strip()[:80]}"


OF_PYTHON: tuple[Rule, ...] = (
    imports_go_one_way, pure_files_have_no_effects, nothing_is_pickled, errors_are_not_swallowed, files_are_short,
    public_names_are_explained,
)  # fmt: skip


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether the path is one of the patterns; `*` does not cross a folder."""
    return any(fnmatch(path, p) and path.count("/") == p.count("/") for p in patterns)


def _imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import: lazy ones, relative ones, and those by a name in quotes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*path.split("/")[: -node.level], *([base] if base else [])])
            # `from a.b import c` may import the module a.b.c; only then does it exist as a pure file.
            yield from ((node.lineno, _deepest(base, alias.name)) for alias in node.names)
        elif _is_call_of(node, "import_module", "__import__"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _deepest(base: str, name: str) -> str:
    return f"{base}.{name}" if _is_pure_module(f"{base}.{name}") else base


def _is_pure_module(module: str) -> bool:
    return matches(module.replace(".", "/") + ".py", PURE)


def _calls(text: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))


def _is_call_of(node: ast.AST, *names: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names


def _true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def _names_everything(kind: ast.expr) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(k, ast.Name) and k.id in ("Exception", "BaseException") for k in kinds)


def _does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass | ast.Continue) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _unexplained(path: str, body: list[ast.stmt], inside: str) -> Problems:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            given = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
            if node.name.startswith("_") or given & {"overload", "override", "setter"}:
                continue
            if ast.get_docstring(node) is None:
                yield f"{path}:{node.lineno}: {inside}{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from _unexplained(path, node.body, f"{node.name}.")
