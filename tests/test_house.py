"""The house rules hold in every tracked file; and each rule does find what it forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import house_rules as rules

ROOT = Path(__file__).resolve().parents[1]

LONG_FILES = {
    "resilient/checkpoint/values.py",
}
"""Files of the packages longer than 300 lines: split one by purpose, and take it off. The list only shrinks."""


@cache
def tracked() -> dict[str, str]:
    """Text files by path from the root: what git tracks, or in an unpacked archive every file but the hidden ones."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0:
        names = [name for name in listed.stdout.decode().split("\0") if name]
    else:
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [str(p) for p in found if not any(part.startswith(".") or "egg-info" in part for part in p.parts)]
    texts = {}
    for name in sorted(names):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            texts[name] = data.decode(errors="replace")
    return texts


def python() -> dict[str, str]:
    return {name: text for name, text in tracked().items() if name.endswith(".py")}


def test_there_are_files_to_judge():
    assert {"storage/store.py", "resilient/checkpoint/geometry.py", "tests/test_house.py"} <= set(python())
    for pattern in (*rules.PURE, *rules.TORCH_FREE):
        assert any(ROOT.glob(pattern)), f"{pattern} names no file"


@pytest.mark.parametrize("rule", rules.OF_PYTHON, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    problems = [problem for name, text in python().items() for problem in rule(name, text)]
    assert not problems, "\n".join(["", *problems])


def test_no_tracked_file_names_a_path_of_one_machine():
    problems = [problem for name, text in tracked().items() for problem in rules.no_paths_of_this_machine(name, text)]
    assert not problems, "\n".join(["", *problems])


def test_the_list_of_long_files_only_shrinks():
    house = {name: text for name, text in python().items() if name.split("/")[0] in rules.PACKAGES}
    long = {name for name, text in house.items() if text.count("\n") > rules.LONG_LINES}
    assert long - LONG_FILES == set(), f"longer than {rules.LONG_LINES} lines: split by purpose"
    assert LONG_FILES - long == set(), "short by now: take it off LONG_FILES"


def modules_loaded_by(*modules: str) -> set[str]:
    """The names in sys.modules of a fresh interpreter after importing these."""
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_resilient_loads_neither_torch_nor_numpy():
    assert not modules_loaded_by("resilient") & {"torch", "numpy"}


def test_what_the_keeper_and_the_commands_import_is_free_of_torch():
    files = [name for name in python() if rules.matches(name, rules.TORCH_FREE) and not name.endswith("__main__.py")]
    modules = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in files]
    guilty = []
    if "torch" in modules_loaded_by(*modules):
        guilty = [module for module in modules if "torch" in modules_loaded_by(module)]
    assert not guilty, f"import torch, at once or through others: {guilty}"


PURE_FILE, FILE = "resilient/checkpoint/geometry.py", "resilient/checkpoint/writer.py"

FORBIDDEN = [
    (rules.imports_go_one_way, "storage/local.py", "def f():\n    from resilient import errors"),
    (rules.imports_go_one_way, "resilient/run.py", "import runtime.trainer"),
    (rules.imports_go_one_way, "runtime/step.py", "import importlib\nimportlib.import_module('chaos.sweep')"),
    (
        rules.imports_go_one_way,
        "resilient/run.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import chaos",
    ),
    (rules.pure_files_have_no_effects, PURE_FILE, "def f():\n    import time"),
    (rules.pure_files_have_no_effects, PURE_FILE, "from os.path import join"),
    (rules.pure_files_have_no_effects, PURE_FILE, "from resilient.checkpoint.writer import persist"),
    (rules.pure_files_have_no_effects, PURE_FILE, "from resilient.checkpoint import writer"),
    (rules.pure_files_have_no_effects, PURE_FILE, "from .writer import persist"),
    (rules.pure_files_have_no_effects, PURE_FILE, "print(1)"),
    (rules.nothing_is_pickled, FILE, "import pickle"),
    (rules.nothing_is_pickled, FILE, "def f():\n    from marshal import loads"),
    (rules.nothing_is_pickled, FILE, "torch.load(path)"),
    (rules.nothing_is_pickled, FILE, "torch.load(path, weights_only=False)"),
    (rules.nothing_is_pickled, FILE, "dist.all_gather_object(out, x)"),
    (rules.nothing_is_pickled, FILE, "from torch.distributed import broadcast_object_list as b"),
    (rules.nothing_is_pickled, FILE, "np.load(path, allow_pickle=True)"),
    (rules.errors_are_not_swallowed, FILE, "try:\n    f()\nexcept:\n    raise"),
    (rules.errors_are_not_swallowed, FILE, "try:\n    f()\nexcept Exception:\n    pass"),
    (
        rules.errors_are_not_swallowed,
        FILE,
        "while 1:\n  try:\n    f()\n  except (OSError, BaseException):\n    continue",
    ),
    (rules.errors_are_not_swallowed, FILE, "try:\n    f()\nexcept Exception:\n    '''why'''"),
    (rules.errors_are_not_swallowed, FILE, "with contextlib.suppress(Exception):\n    f()"),
    (rules.files_are_short, FILE, "x = 1\n" * 401),
    (rules.public_names_are_explained, FILE, "x = 1"),
    (rules.public_names_are_explained, FILE, "'''m'''\ndef f(): ..."),
    (rules.public_names_are_explained, FILE, "'''m'''\nclass A:\n    '''a'''\n    def f(self): ..."),
    (rules.no_paths_of_this_machine, "README.md", "see " + "/wo" + "rk/notes"),
    (rules.no_paths_of_this_machine, "a.py", "open('" + "/ro" + "ot/.netrc')"),
]

ALLOWED = [
    (rules.imports_go_one_way, "chaos/sweep.py", "import runtime, resilient, storage"),
    (rules.pure_files_have_no_effects, PURE_FILE, "import math\nfrom resilient.errors import ShardInvalid"),
    (rules.pure_files_have_no_effects, PURE_FILE, "from resilient.checkpoint import items"),
    (rules.pure_files_have_no_effects, FILE, "import os"),
    (rules.nothing_is_pickled, FILE, "torch.load(path, weights_only=True)\nx = 'pickle'"),
    (rules.errors_are_not_swallowed, FILE, "try:\n    f()\nexcept Exception as error:\n    log(error)"),
    (rules.errors_are_not_swallowed, FILE, "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
    (rules.public_names_are_explained, FILE, "'''m'''\nclass A:\n    '''a'''\n    def _f(self): ..."),
    (rules.no_paths_of_this_machine, "README.md", "the work/root of it, s3://bucket/work/run, a/work"),
]


@pytest.mark.parametrize(("rule", "path", "text"), FORBIDDEN)
def test_each_rule_finds_what_it_forbids(rule, path, text):
    assert list(rule(path, text))


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_each_rule_leaves_the_rest_alone(rule, path, text):
    assert not list(rule(path, text))
