"""One actor of the model check, stepped by the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resilient.log.protocol import Get, Put, PutIfAbsent
from storage.errors import ResilientError
from tests.resilient.log.model_words import Steps, Violation
from tests.resilient.log.model_world import World


@dataclass
class Process:
    """An actor and where it stands."""

    name: str
    steps: Steps
    dies: bool  # whether it may crash
    paused_until: int = 0
    ended: bool = False
    answer: Any = None
    error: ResilientError | None = None
    started: bool = False
    op: Any = None
    half: dict[str, bytes | None] = field(default_factory=dict)

    def step(self, world: World) -> None:
        """One operation, or one half of a parallel reading."""
        if self.started and not self._carry_out(world):
            return
        try:
            if not self.started:
                self.started = True
                self.op = next(self.steps)
            elif self.error is not None:
                self.op = self.steps.throw(self.error)
            else:
                self.op = self.steps.send(self.answer)
        except StopIteration:
            self.ended = True
        if self.name == "reader" and isinstance(self.op, (Put, PutIfAbsent)):
            raise Violation("WROTE a reader wrote to the store")

    def _carry_out(self, world: World) -> bool:
        op, self.answer, self.error = self.op, None, None
        try:
            if isinstance(op, Get) and len(op.keys) > 1:
                left = [key for key in op.keys if key not in self.half]
                now = left if world.rng.random() < 0.5 else world.rng.sample(left, (len(left) + 1) // 2)
                answers = world.perform(Get(keys=tuple(now), max_bytes=op.max_bytes))
                self.half.update(zip(now, answers, strict=True))
                if len(self.half) < len(op.keys):
                    return False
                self.answer = tuple(self.half[key] for key in op.keys)
            else:
                self.answer = world.perform(op)
        except ResilientError as error:
            self.error = error
        self.half = {}
        return True
