"""The tables and the last line that the demonstration prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from examples.demo.proof import Session, Verdict


def show_sessions(sessions: Sequence[Session], twin: Session, seconds: Mapping[str, float], console: Console) -> None:
    """A line per session: where it began, where it ended, and the loss there beside the twin's."""
    table = _table("Sessions", "session", "ranks", "restored", "last step", "loss", "the twin's", "took")
    console.print()
    for column in table.columns:
        column.justify = "right"
    for number, session in enumerate(sessions, start=1):
        last = max(session.steps, default=0)
        losses = [f"{run.steps[last].loss:.6f}" if last in run.steps else "-" for run in (session, twin)]
        took = f"{seconds[str(number)]:.1f} s"
        restored = str(session.restored_step or "-")
        table.add_row(str(number), str(session.ranks), restored, str(last), *losses, took)
    console.print(table, "")


def show_proof(verdicts: Sequence[Verdict], console: Console) -> None:
    """A line per claim: what was measured, and whether it holds."""
    table = _table("Proof", "claim", "measured", "verdict")
    for verdict in verdicts:
        table.add_row(verdict.claim, verdict.detail, "[green]valid" if verdict.valid else "[red]INVALID")
    console.print(table, "")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        table.add_column(column)
    return table
