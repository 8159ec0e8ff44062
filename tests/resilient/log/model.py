"""Model check of the log: the real code under random schedules, faults and damage, with invariants after each event.

    python -m tests.resilient.log.model --seeds 5000
    python -m tests.resilient.log.model --seeds 200 --without "put if absent"

Exit status: 0 no violation, 1 a violation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from resilient.log.entries import Epoch, Generation
from storage.errors import ResilientError
from tests.resilient.log.model_actors import checked_read, foreign_collector, reader
from tests.resilient.log.model_process import Process
from tests.resilient.log.model_rules import FOCUS, RULES, left_out
from tests.resilient.log.model_session import Session
from tests.resilient.log.model_words import Faults, Steps, Violation, understood
from tests.resilient.log.model_world import World

EVENTS = 500
MOST_EVENTS = 20_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One seed's run."""

    seed: int
    violation: str | None
    counts: Counter[str]


def draw_faults(rng: Random, focus: str | None = None) -> Faults:
    """Calm, a bad network, dying processes, damage, or all of them; `focus` says which, else it is drawn."""
    kind = rng.choice(["calm", "network", "death", "damage", "all"])
    kind = focus or kind
    network, death, damage = (kind in (name, "all") for name in ("network", "death", "damage"))
    return Faults(
        reply_lost=rng.choice([0.05, 0.2]) if network else 0.01,
        delayed=rng.choice([0.05, 0.3]) if network else 0.01,
        repeated=0.1 if network else 0.0,
        refused=rng.choice([0.02, 0.15]) if network else 0.0,
        give_up=rng.choice([0.1, 0.5]),
        crash=rng.choice([0.002, 0.02]) if death else 0.0,
        pause=rng.choice([0.01, 0.05]),
        damage=rng.choice([0.004, 0.02]) if damage else 0.0,
        hint_damage=0.01 if damage else 0.002,
    )


class Scheduler:
    """Who acts next: everything is drawn from the seed."""

    def __init__(self, world: World) -> None:
        self.world, self.processes, self.sessions = world, list[Process](), 0

    def spawn(self, name: str, steps: Steps) -> None:
        """Add an actor."""
        self.processes.append(Process(name=name, steps=steps, dies=name != "reader"))

    def session(self, saves: int) -> Session:
        """Add a session."""
        self.sessions += 1
        session = Session(self.world, self.sessions, self.spawn, saves)
        self.spawn("session", session.run())
        return session

    def event(self) -> None:
        """One thing happens."""
        world, rng = self.world, self.world.rng
        world.now += 1
        if world.late and rng.random() < 0.06:
            world.carry_out(world.late.pop(rng.randrange(len(world.late))))
        if world.original and world.faults.damage and len(world.damaged) < 3:
            # The newest entries matter most: those that some have read whole and others have not read yet.
            telling = isinstance(understood(world.original[-1]), (Epoch, Generation))
            if rng.random() < world.faults.damage * (5 if telling else 1):
                self._damage()
        if rng.random() < world.faults.hint_damage:
            world.damage_hint()
        running = [process for process in self.processes if process.name == "session"]
        if rng.random() < (0.02 if running else 0.3) and len(running) < 4:
            self.session(saves=rng.randint(1, 12))
        ready = [process for process in self.processes if process.paused_until <= world.now]
        if ready:
            self._step(rng.choice(ready))

    def _damage(self) -> None:
        slots = len(self.world.original)
        near = max(0, slots - self.world.rng.choice([1, 1, 3, slots]))
        slot = self.world.rng.randrange(near, slots)
        if slot not in self.world.damaged:
            self.world.damage_slot(slot)

    def _step(self, process: Process) -> None:
        rng, faults = self.world.rng, self.world.faults
        if process.dies and rng.random() < faults.crash:
            self.world.counts["deaths"] += 1
            process.ended = True
        elif rng.random() < faults.pause:
            process.paused_until = self.world.now + rng.randint(5, 120)
        else:
            process.step(self.world)
        if process.ended:
            self.processes.remove(process)

    def finish(self) -> None:
        """The faults end; what is under way arrives; the run must be able to go on."""
        world = self.world
        world.faults = Faults(give_up=0.0)
        world.rng.shuffle(world.late)
        while world.late:
            world.carry_out(world.late.pop())
        self._until_all_have_ended()
        before = world.counts["commits"]
        self.session(saves=8)
        self._until_all_have_ended()
        if world.counts["commits"] == before:
            raise Violation("STUCK without any fault a new session cannot commit")
        world.now += 1
        last = Process(name="reader", steps=checked_read(world), dies=False)
        while not last.ended:
            last.step(world)

    def _until_all_have_ended(self) -> None:
        begun = self.world.now
        while self.processes:
            self.world.now += 1
            self._step(self.world.rng.choice(self.processes))
            if self.world.now > begun + MOST_EVENTS:
                raise Violation(f"STUCK {MOST_EVENTS} events without any fault were not enough to end")


def run(seed: int, without: str | None = None) -> Outcome:
    """One seed, with all rules or without one."""
    rng = Random(seed)
    world = World(
        rng=rng, faults=draw_faults(rng, FOCUS.get(without or "")), without=frozenset([without] if without else [])
    )
    scheduler = Scheduler(world)
    violation = None
    with left_out(without):
        try:
            for _ in range(rng.randint(1, 2)):
                scheduler.spawn("reader", reader(world, readings=25))
            if without == "only the leader collects":
                scheduler.spawn("collector", foreign_collector(world))
            for _ in range(EVENTS):
                scheduler.event()
            scheduler.finish()
        except Violation as error:
            violation = str(error)
        except (ResilientError, ValueError, KeyError) as error:
            violation = f"RAISED {type(error).__name__}: {error}"
    return Outcome(seed=seed, violation=violation, counts=world.counts)


def sweep(
    seeds: int, first: int = 0, without: str | None = None, progress: Callable[[int], None] | None = None
) -> tuple[Outcome | None, Counter[str]]:
    """The first violation of `seeds` seeds, and what happened in all of them."""
    total: Counter[str] = Counter()
    for seed in range(first, first + seeds):
        outcome = run(seed, without)
        total += outcome.counts
        if outcome.violation is not None:
            return outcome, total
        if progress is not None:
            progress(seed - first + 1)
    return None, total


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.resilient.log.model", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--without", choices=sorted(RULES), metavar="RULE", help="leave out one rule")
    parser.add_argument("--each", action="store_true", help="leave out each rule in turn, up to --seeds seeds each")
    arguments = parser.parse_args()
    if arguments.each:
        return _each(arguments.seeds, arguments.seed)
    began_s = time.monotonic()

    def progress(done: int) -> None:
        if done % 50 == 0 and sys.stderr.isatty():
            print(f"\r{done}/{arguments.seeds} seeds  {time.monotonic() - began_s:.0f} s", end="", file=sys.stderr)

    found, total = sweep(arguments.seeds, arguments.seed, arguments.without, progress)
    print("  ".join(f"{name} {count}" for name, count in sorted(total.items())))
    took_s = time.monotonic() - began_s
    if found is None:
        print(f"seeds {arguments.seeds} from {arguments.seed}  {took_s:.1f} s  no violation")
        return 0
    rule = f" --without {arguments.without!r}" if arguments.without else ""
    print(f"violation  {found.violation}")
    print(f"replay: python -m tests.resilient.log.model --seeds 1 --seed {found.seed}{rule}")
    return 1


def _each(seeds: int, first: int) -> int:
    missed = 0
    for rule in RULES:
        found, _ = sweep(seeds, first, rule)
        missed += found is None
        print(f"{rule:50} " + (f"seed {found.seed:5}  {found.violation}" if found else "NOT FOUND"), flush=True)
    print(f"rules {len(RULES)}  caught {len(RULES) - missed}  missed {missed}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
