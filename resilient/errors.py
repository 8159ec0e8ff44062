"""Typed errors of the resilient layer; the root and the stores' errors are in storage.errors."""

from __future__ import annotations

from storage.errors import ResilientError

__all__ = ["ResilientError"]


# ---- state and planning
class StateInvalid(ResilientError):
    """`state` holds something that cannot be saved or restored; the message names its path."""


class DtypeUnknown(StateInvalid):
    """A tensor's dtype is not one that checkpoints hold."""


class ShardInvalid(ResilientError):
    """A box or shard that cannot exist: negative, wrong number of dims, outside its tensor."""


class ShardsDisagree(ResilientError):
    """Ranks describe the same tensor differently, or leave a part of it without a holder."""


class ValuesDiffer(ResilientError):
    """A plain value that must be equal on all ranks is not."""


class RanksDisagree(ResilientError):
    """Ranks called a collective operation with different arguments (another step, another state)."""


class PeerLost(ResilientError):
    """Another rank died, hangs, or does not take part in a collective operation."""


# ---- format and reading
class CheckpointDamaged(ResilientError):
    """Stored bytes are missing, cut or changed. The message names the object."""


class FormatUnsupported(ResilientError):
    """Written by a newer version of the format than this reader knows."""


class StateMismatch(ResilientError):
    """The checkpoint and the live state do not fit: missing, unexpected, or of another shape or dtype."""


class NoCheckpoint(ResilientError):
    """There is no committed step (or not the one asked for)."""


# ---- the log
class LogDamaged(ResilientError):
    """An entry of the run's log cannot be read."""


class Fenced(ResilientError):
    """Someone else leads this run now: this writer must not write any more."""


class EpochUncertain(Fenced):
    """A damaged entry may hide a newer epoch: claim a new one (`RunLog.lead`) before writing again."""


class Overtaken(Fenced):
    """Others have committed steps since this process restored: leading now would leave theirs behind."""


class OffLine(ResilientError):
    """A state that the run no longer descends from: a later generation went on from an earlier step."""


class EntryInvalid(ResilientError):
    """A log entry that must not be written: a field out of its range, or a reference to something dropped."""


class StepExists(ResilientError):
    """This step is committed already."""


class EntryTooLarge(ResilientError):
    """A log entry would exceed its 4 KB."""


# ---- saving
class SaveFailed(ResilientError):
    """A save did not become a commit; nothing of it is visible."""


class SaveCancelled(SaveFailed):
    """The save was given up before its manifest was written."""


class SaveSkipped(SaveFailed):
    """No free buffer: the previous save was still being written, and the policy was to skip."""


class SaveUnknown(SaveFailed):
    """The store did not answer: the save may or may not have been committed."""


class SnapshotTorn(SaveFailed):
    """The snapshot was not of one moment; it was discarded."""


class KeeperLost(SaveFailed):
    """The keeper process died or does not answer; it is started again at the next save."""


class WireError(ResilientError):
    """A peer sent something that is not the protocol, or is not who it claims to be."""


class TimedOut(ResilientError):
    """A wait passed its deadline."""


# ---- the loop
class SamplerStale(ResilientError):
    """An iterator made before the restore was used after it."""


class LoopMisused(ResilientError):
    """The run's methods were called in an order that cannot be right."""


class SettingInvalid(ResilientError):
    """A setting (Every, Keep, ...) that cannot be right; the message shows it."""


class Preempted(SystemExit):
    """Raised by `steps` after a stop was agreed on and saved; exit code 75 (EX_TEMPFAIL), so a scheduler requeues."""

    def __init__(self, step: int) -> None:
        super().__init__(75)
        self.step = step

    def __str__(self) -> str:
        return f"stopped on request after {self.step} completed steps, saved. Next: start the same command again"
