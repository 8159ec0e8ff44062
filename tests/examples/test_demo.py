"""The demonstration: it passes, a broken product makes it fail, and it leaves no process behind however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.demo.__main__ import main
from examples.demo.marked import RUN, kill_marked, marked, state
from tests.processes import descendants

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("storage", "resilient", "runtime", "examples")
LIMIT_S = 280.0

KEPT, TENSORS, LOSSES, SAMPLES = "nothing committed lost", "tensors bit for bit", "losses", "every sample exactly once"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One line of the product, broken, and what the demonstration must say of it."""

    path: str
    line: str  # must be there exactly once
    broken: str
    invalid: frozenset[str]  # claims, by a part of their text

    def apply(self, root: Path) -> None:
        text = (root / self.path).read_text()
        assert text.count(self.line) == 1, f"{self.line!r} is in {self.path} {text.count(self.line)} times"
        (root / self.path).write_text(text.replace(self.line, self.broken))


SAMPLER_ONE_BATCH_BACK = Mutant(
    path="resilient/sampler.py",
    line="self._ledger.restore(consumed)",
    broken="self._ledger.restore(consumed - self.global_batch)",
    invalid=frozenset({LOSSES, SAMPLES}),
)
MOMENTUM_FORGOTTEN = Mutant(
    path="resilient/checkpoint/optimizer.py",
    line="optimizer.state[parameter] = slots",
    broken='optimizer.state[parameter] = slots | {"exp_avg": torch.zeros_like(slots["exp_avg"])}',
    invalid=frozenset({LOSSES, TENSORS}),
)


def run_demo(root: Path, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it from `root`, whose packages come before any that are installed."""
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", "--quick", "--dir", str(directory), *words],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def invalid_claims(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The claims that its JSON line calls not valid, by their known part."""
    outcome = json.loads(done.stdout.splitlines()[-1])
    claims = [verdict["claim"] for verdict in outcome["verdicts"] if not verdict["valid"]]
    assert outcome["valid"] == (not claims)
    return {next(part for part in (KEPT, TENSORS, LOSSES, SAMPLES) if part in claim) for claim in claims}


@pytest.mark.timeout(300)
def test_the_demonstration_proves_its_claims(tmp_path):
    done = run_demo(ROOT, tmp_path / "demo", "--json")
    assert done.returncode == 0, done.stderr
    assert invalid_claims(done) == set()
    verdicts = json.loads(done.stdout)["verdicts"]
    claims = [verdict["claim"] for verdict in verdicts]
    assert [sum(part in claim for claim in claims) for part in (KEPT, TENSORS, LOSSES, SAMPLES)] == [2, 2, 1, 1]
    lines = done.stderr.splitlines()
    assert lines[-1].endswith("valid")
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80, "wider than a terminal"
    assert [line.split()[1] for line in lines if line.startswith("done")] == ["twin", "1", "2", "3"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(SAMPLER_ONE_BATCH_BACK, id="the sampler goes back one batch too far"),
        pytest.param(MOMENTUM_FORGOTTEN, id="the momentum is not restored", marks=pytest.mark.long),
    ],
)
def test_a_broken_product_fails_the_demonstration(mutant, tmp_path):
    root = tmp_path / "broken"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    mutant.apply(root)
    done = run_demo(root, tmp_path / "demo", "--json")
    assert done.returncode == 1, done.stderr
    assert invalid_claims(done) == mutant.invalid


@pytest.mark.timeout(120)
def test_a_session_that_fails_shows_the_log_of_the_rank_that_failed(tmp_path):
    root = tmp_path / "broken"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    Mutant(
        path="runtime/trainer.py",
        line="        for step in run.steps(config.train.steps):\n",
        broken="        for step in run.steps(config.train.steps):\n"
        "            if mesh.rank == 2:\n"
        "                raise RuntimeError('[red]the third rank is out of order')\n",
        invalid=frozenset(),
    ).apply(root)
    done = run_demo(root, tmp_path / "demo")
    assert done.returncode == 1
    assert "session twin: rank 2 ended first, exit code 1" in done.stdout
    assert "RuntimeError: [red]the third rank is out of order" in done.stdout


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(SystemExit, match="2"):
        main(["--dir", str(tmp_path)])
    assert (tmp_path / "thesis.tex").read_text() == "ten years"
    assert "would be lost" in capsys.readouterr().err


class Interrupted:
    """A demonstration that is under way, to be ended from outside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.demo", "--quick", "--dir", str(directory)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.mark = ""

    def mark_known(self) -> bool:
        for pid in descendants(self.process.pid):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(f"{RUN}=".encode()):
                    self.mark = entry.decode().partition("=")[2]
        return bool(self.mark)

    def keeper(self) -> int | None:
        """The process id of a running keeper."""
        for pid in marked(RUN, self.mark):
            if b"resilient.node.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def await_that(self, what: str, happened: Callable[[], object]) -> None:
        until = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < until, f"waited 60 s in vain: {what}"
            time.sleep(0.02)  # other people's children: looked at, not awaited


@pytest.fixture
def interrupted(tmp_path) -> Iterator[Interrupted]:
    demo = Interrupted(tmp_path / "demo")
    yield demo
    demo.process.kill()
    demo.process.wait()
    if demo.mark:
        kill_marked(RUN, demo.mark)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(signal.SIGKILL, -9, id="SIGKILL"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.long),
    ],
)
def test_nothing_is_left_of_a_demonstration_that_is_ended_in_the_middle(interrupted, signum, code):
    interrupted.await_that("its processes carry a mark", interrupted.mark_known)
    interrupted.await_that("a keeper runs", interrupted.keeper)
    keeper = interrupted.keeper()
    os.kill(keeper, signal.SIGSTOP)
    interrupted.await_that("the keeper is stopped", lambda: state(keeper) == "T")
    assert len(marked(RUN, interrupted.mark)) >= 6, "a template, four ranks and a keeper"
    interrupted.process.send_signal(signum)
    assert interrupted.process.wait(60) == code
    if signum != signal.SIGKILL:
        assert marked(RUN, interrupted.mark) == [], "it cleans up before it ends"
    interrupted.await_that("no process is left", lambda: not marked(RUN, interrupted.mark))
