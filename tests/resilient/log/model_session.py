"""A session of the model check: restores, leads, saves, cleans up, until it is fenced, done or dead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from resilient.errors import EntryInvalid, EpochUncertain, Fenced, OffLine
from resilient.log.entries import Ref, State
from resilient.log.envelope import digest
from resilient.log.protocol import Get, PutIfAbsent
from resilient.log.view import Committed, LogView
from resilient.log.writer import Writer
from storage.errors import KeyExists, OutcomeUnknown, StoreUnavailable
from tests.resilient.log.model_actors import TRIES, GaveUp, checked_read, delete_all, deleter, persistent
from tests.resilient.log.model_words import Ack, Choice, List, Steps, Tick, Violation, parts_of
from tests.resilient.log.model_world import World

BASE_EVERY = 9


class Again(Exception):
    """The session must choose anew what to go on from."""


def choose(world: World, view: LogView) -> tuple[State | None, bool]:
    """The newest state that there is, in memory or committed, and whether it is in memory."""
    newest = view.newest.state if view.newest else None
    kept = [state for state in world.memory if view.snapshot_counts(state)]
    best = max(kept, key=lambda state: (state.step, state.generation), default=None)
    if best is not None and (newest is None or best.step > newest.step):
        return best, True
    return newest, False


class Session:
    """One process that restores, leads and saves until it is fenced, done or dead."""

    def __init__(self, world: World, who: int, spawn: Callable[[str, Steps], None], saves: int) -> None:
        self.world, self.who, self.spawn, self.saves = world, who, spawn, saves
        self.writer = Writer(LogView(), nonce=world.nonce, clock_ns=world.clock_ns)
        self.generation = -1
        self.step = 0
        self.late: list[State] = []  # snapshots of this process that are not persisted yet
        self.unknown: list[tuple[State, Ref, tuple[Ref, ...], str]] = []  # saves that may or may not be committed

    def run(self) -> Steps:
        """The life of the process."""
        for _ in range(TRIES):
            try:
                yield from self._lead()
            except Again:
                continue
            except (GaveUp, OutcomeUnknown):
                self.world.counts["sessions that gave up"] += 1
                return
            except Fenced:
                self.world.counts["fenced"] += 1
                return
            return

    def _read(self) -> Steps:
        return (yield from persistent(lambda: checked_read(self.world)))

    def _lead(self) -> Steps:
        world = self.world
        view = yield from self._read()
        choice = yield from self._choose(view)
        self.writer = Writer(view, nonce=world.nonce, clock_ns=world.clock_ns)
        yield from persistent(lambda: self.writer.claim("model", choice.at))
        world.check_append(self.writer.epoch, self.writer.epoch, self.who)
        yield from self._open(choice)
        while self.saves > 0:
            self.saves -= 1
            yield from self._work()

    def _choose(self, view: LogView) -> Steps:
        """The choice of one rank, for all."""
        world = self.world
        if world.rng.random() < 0.15:
            return Choice(at=None, state=None, from_memory=False)
        if len(view.commits) > 1 and world.rng.random() < 0.1:  # the user goes back
            return Choice(at=view.next_slot, state=view.commits[-2].state, from_memory=False, goes_back=True)
        state, from_memory = choose(world, view)
        if "chosen once for all ranks" in world.without:
            yield Tick()
            other, _ = choose(world, (yield from self._read()))
            if other != state:
                raise Violation(f"RANKS of one generation go on from {state} and {other}")
        if state is not None and not from_memory:
            yield from self._load(view)
        return Choice(at=view.next_slot, state=state, from_memory=from_memory)

    def _load(self, view: LogView) -> Steps:
        commit = view.newest
        assert commit is not None
        keys = tuple(key for ref in (commit.manifest, *commit.entry.uses) for key in parts_of(ref))
        found = yield from persistent(lambda: (yield Get(keys=keys, max_bytes=100)))
        if None in found:
            again = yield from self._read()
            explained = commit.slot not in {known.slot for known in again.live} or commit.slot in self.world.damaged
            if not explained and not self.world.damaged:
                raise Violation(f"MISSING data of slot {commit.slot}, and no drop explains it")
            raise Again

    def _open(self, choice: Choice) -> Steps:
        world = self.world
        world.choices.append(choice)
        source = str(len(world.choices) - 1)
        opening = lambda: self.writer.open_generation(  # noqa: E731
            members=2, layout={"shard": 2}, restored=choice.state, source=source
        )
        try:
            self.generation = yield from persistent(opening)
        except OffLine:
            world.counts["restores refused"] += 1
            raise Again from None
        except EpochUncertain:
            raise Again from None
        world.check_append(self.generation, self.writer.epoch, self.who)
        world.counts["generations"] += 1
        parent = world.parents.get(self.generation)
        self.step = parent.step if parent is not None else 0

    def _work(self) -> Steps:
        world, rng = self.world, self.world.rng
        self.step += rng.randint(1, 3)
        state = State(generation=self.generation, step=self.step)
        if rng.random() < 0.6:
            world.memory.append(state)
        if world.memory and rng.random() < 0.4:  # nodes leave, and their memory with them
            world.away.append(world.memory.pop(rng.randrange(len(world.memory))))
        if world.away and rng.random() < 0.3:  # and some return
            world.memory.append(world.away.pop(rng.randrange(len(world.away))))
        yield Tick()
        draw = rng.random()
        if draw < 0.25:
            self.late.append(state)
        else:
            yield from self._save(state)
        if 0.2 < draw < 0.3:
            yield from self._save(state)  # once more, replacing it
        if draw > 0.8 or draw < 0.1:
            yield from self._restart()
        if self.unknown and rng.random() < 0.5:
            yield from self._settle()
        if self.late and rng.random() < 0.4:
            yield from self._save(self.late.pop())
        if rng.random() < 0.5:
            yield from self._retain()
        if rng.random() < 0.2:
            yield from self._collect()
        yield from self._sum_up()

    def _restart(self) -> Steps:
        """A worker died: a new generation under the same leader."""
        state, from_memory = choose(self.world, self.writer.view)
        yield from self._open(Choice(at=None, state=state, from_memory=from_memory))

    def _save(self, state: State) -> Steps:
        world = self.world
        before = self.writer.view.find(state.step)
        if before is not None and world.rng.random() < 0.5:
            return
        nonce = world.nonce()
        attempt = "0" if "data keys carry a nonce" in world.without else nonce
        # Under a generation of one's own epoch: collectors of other epochs leave it alone.
        prefix = f"data/{self.generation:08d}/{state.step:012d}/{attempt}"
        if "data keys carry a nonce" in world.without:
            prefix = f"data/{state.step:012d}/0/{attempt}"
        manifest = Ref(key=f"{prefix}/manifest", hash=digest(prefix.encode()), size=len(prefix))
        uses = tuple(known.manifest for known in self.writer.view.live if world.rng.random() < 0.2)[:3]
        if before is not None and "replace commits before it drops" in world.without:
            yield from self._drop([before])
        try:
            for key in parts_of(manifest):
                yield from persistent(lambda key=key: self._put_data(key, prefix))
        except (GaveUp, OutcomeUnknown):
            yield from delete_all(parts_of(manifest))  # no entry was tried
            raise
        done = yield from self._commit_or_clean_up(state, manifest, uses, nonce)
        if before is not None and done:
            yield from self._drop([before])

    def _settle(self) -> Steps:
        """Ask again what became of a save."""
        yield from self._commit_or_clean_up(*self.unknown.pop())

    def _commit_or_clean_up(self, state: State, manifest: Ref, uses: tuple[Ref, ...], nonce: str) -> Steps:
        try:
            return (yield from self._commit(state, manifest, uses, nonce))
        except EpochUncertain:
            raise Again from None  # the damaged entry may be this commit's: its data stay
        except (Fenced, OffLine, EntryInvalid) as error:
            self.world.counts[f"refused: {type(error).__name__}"] += 1
            if isinstance(error, OffLine):  # perhaps it was in the log before it was left behind
                yield from self._condemn([manifest])
            elif not self.writer.view.in_use(manifest):
                yield from delete_all(parts_of(manifest))  # it can never be committed any more
            if isinstance(error, Fenced):
                raise
            return False

    def _put_data(self, key: str, text: str) -> Steps:
        with suppress(KeyExists):
            yield PutIfAbsent(key=key, data=text.encode())

    def _commit(self, state: State, manifest: Ref, uses: tuple[Ref, ...], nonce: str) -> Steps:
        world = self.world
        committing = lambda: self.writer.commit(  # noqa: E731
            generation=state.generation, step=state.step, tier="disk", manifest=manifest, uses=uses, nonce=nonce
        )
        try:
            slot: int = yield from persistent(committing, tries=world.rng.choice([1, TRIES]))
        except GaveUp:
            yield from delete_all(parts_of(manifest))  # no put can have been carried out
            return False
        except OutcomeUnknown:
            world.counts["saves unknown"] += 1
            self.unknown.append((state, manifest, uses, nonce))
            if "unknown is not done" in world.without:
                world.acks.append(Ack(slot=self.writer.view.next_slot, step=state.step, at=world.now))
            if "unknown data are not touched" in world.without:
                yield from delete_all(parts_of(manifest))
            return False
        world.check_append(slot, self.writer.epoch, self.who)
        world.counts["commits"] += 1
        world.acks.append(Ack(slot=slot, step=state.step, at=world.now))
        world.check()
        return True

    def _retain(self) -> Steps:
        view = self.writer.view
        old = [*view.commits[: -world_keep(self.world)], *view.replaced, *view.off_line]
        if old:
            yield from self._drop(old)

    def _drop(self, commits: list[Committed]) -> Steps:
        yield from self._condemn([commit.manifest for commit in commits])

    def _condemn(self, refs: list[Ref]) -> Steps:
        world = self.world
        if "deleted only after the drop" in world.without:
            yield from delete_all(key for ref in refs for key in parts_of(ref))
        try:
            slot = yield from persistent(lambda: self.writer.drop(refs))
        except (GaveUp, EntryInvalid):
            return
        except OutcomeUnknown:
            return  # nothing is deleted: the drop may or may not be there
        except EpochUncertain:
            raise Again from None
        world.check_append(slot, self.writer.epoch, self.who)
        world.counts["drops"] += 1
        keys = [key for ref in refs if self.writer.view.may_delete(ref) for key in parts_of(ref)]
        self.spawn("deleter", deleter(keys))

    def _collect(self) -> Steps:
        """Delete what attempts of older epochs left behind."""
        view, epoch = self.writer.view, self.writer.epoch
        keys = yield List("data/")
        prefixes = sorted({key.rsplit("/", 1)[0] for key in keys})
        orphans = [prefix for prefix in prefixes if view.is_orphan(prefix, epoch)]
        if orphans:
            self.world.counts["orphans"] += len(orphans)
            self.spawn("collector", deleter([key for key in keys if key.rsplit("/", 1)[0] in orphans]))

    def _sum_up(self) -> Steps:
        world = self.world
        try:
            if (yield from self.writer.sum_up(BASE_EVERY)):
                world.counts["bases"] += 1
                if "no slot is ever deleted" in world.without:
                    base = self.writer.view.last_base or 0
                    yield from delete_all(f"log/{slot:020d}" for slot in range(base))
        except StoreUnavailable:
            pass
        except EpochUncertain:
            raise Again from None


def world_keep(world: World) -> int:
    """How many commits retention leaves."""
    return 1 if world.rng.random() < 0.3 else 3
