"""Small states, saved and read back through the writer and the reader alone (used by the tests of the data path)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resilient.checkpoint.format import Manifest, data_prefix, writer_name
from resilient.checkpoint.geometry import Box, whole
from resilient.checkpoint.items import ITEM_BYTES, Shard, Slot, TensorInfo
from resilient.checkpoint.plan_load import plan_load
from resilient.checkpoint.reader import element_type, open_checkpoint
from resilient.checkpoint.writer import WriteJob, persist, put_manifest

NONCE = "00000000000000a1"


@dataclass(frozen=True)
class Tensor:
    """A tensor's description and its elements as bits."""

    info: TensorInfo
    bits: np.ndarray


def tensor(name, dtype, array):
    """`array`'s bits as a tensor of `dtype`, shape as it is."""
    bits = np.ascontiguousarray(array).view(element_type(dtype)).reshape(array.shape)
    return Tensor(TensorInfo(name=name, dtype=dtype, shape=tuple(array.shape)), bits)


def trained(rng, shape, scale=0.02):
    """Weights as training leaves them: normal, every row at its own scale."""
    rows = np.exp(rng.normal(size=(shape[0],) + (1,) * (len(shape) - 1)) * 0.3)
    return (rng.standard_normal(shape) * rows * scale).astype(np.float32)


def bf16(array):
    """Rounded to bfloat16, as its bits."""
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def some_state(seed):
    """One tensor of every dtype, and of every shape that has ever been trouble."""
    rng = np.random.default_rng(seed)
    weights = trained(rng, (96, 65))
    tensors = [
        tensor("model/weight", "float32", weights),
        tensor("model/half", "bfloat16", bf16(weights)),
        tensor("optimizer/exp_avg_sq", "float32", weights**2),
        tensor("model/zero", "float32", np.zeros((64, 64), np.float32)),
        tensor("model/scalar", "float32", np.array(1.5 + seed, np.float32)),
        tensor("model/empty", "float32", np.zeros((0, 7), np.float32)),
        tensor("model/ids", "int64", np.arange(1000) + seed),
        tensor("model/mask", "bool", (rng.random((40, 41)) < 0.1)),
    ]
    for dtype, size in ITEM_BYTES.items():
        bits = (
            rng.integers(0, 256, (11, 3, size), np.uint8)
            if dtype != "bool"
            else rng.integers(0, 2, (11, 3, 1), np.uint8)
        )
        tensors.append(tensor(f"every/{dtype}", dtype, bits.view(element_type(dtype)).reshape(11, 3)))
    return tensors


VALUES = {
    ("step", None): b'{"$map":[[3,1]]}',
    ("rng", 0): b'"r\\u00e4nk 0"',
    ("rng", 1): '"ränk 1"'.encode(),
    ("long", None): b'"' + b"0123456789\\n" * 4000 + b'"',
}


def rows(tensors, writer, writers):
    """The boxes of dim 0 that one of several writers has: whole tensors where there are too few rows."""
    for number, item in enumerate(tensors):
        shape = item.info.shape
        if not shape or shape[0] < writers:
            if number % writers == writer:
                yield item, whole(shape)
        else:
            low, high = shape[0] * writer // writers, shape[0] * (writer + 1) // writers
            yield item, Box((low,) + (0,) * (len(shape) - 1), (high - low, *shape[1:]))


def snapshot(boxes):
    """A buffer as a worker would seal it, and what lies where in it."""
    data, slots = bytearray(), []
    for item, box in boxes:
        data += b"\xee" * (-len(data) % 64)
        slots.append(Slot(shard=Shard(tensor=item.info, box=box), offset=len(data)))
        data += np.ascontiguousarray(item.bits[box.slices()]).tobytes()
    return memoryview(data), slots


def save(store, tensors, *, values=VALUES, generation=1, step=10, writers=1, codec="fast", nonce=NONCE, threads=2):
    """Write a checkpoint by so many writers; the reference to its manifest."""
    prefix = data_prefix(generation, step, nonce)
    refs = []
    for writer in range(writers):
        job = WriteJob(
            prefix=prefix,
            writer=writer_name(writer),
            snapshots=[snapshot(rows(tensors, writer, writers))],
            values=[(*key, data) for number, (key, data) in enumerate(values.items()) if number % writers == writer],
            codec=codec,
        )
        refs.append(persist(store, job, threads=threads))
    manifest = Manifest(
        prefix=prefix,
        step=step,
        generation=generation,
        restore_step=0,
        layout={"shard": writers},
        world_size=writers,
        writers=tuple(refs),
        metrics={"loss": 0.5, "odd": float("nan")},
        torch="2.13.0",
        wall_ns=1,
    )
    return put_manifest(store, manifest)


def load(store, ref, *, threads=2):
    """Everything in the checkpoint: ({name: bits}, values)."""
    checkpoint = open_checkpoint(store, ref)
    stored = checkpoint.stored()
    wanted = [Shard(tensor=item.info, box=whole(item.info.shape)) for item in stored.values()]
    outputs = [np.empty(shard.box.shape, element_type(shard.tensor.dtype)) for shard in wanted]
    checkpoint.load(plan_load(stored, wanted), outputs, threads=threads)
    return {shard.tensor.name: output for shard, output in zip(wanted, outputs, strict=True)}, checkpoint.values()


def same(loaded, tensors):
    """Whether exactly these tensors were loaded, bit for bit."""
    return set(loaded) == {item.info.name for item in tensors} and all(
        loaded[item.info.name].shape == item.bits.shape and loaded[item.info.name].tobytes() == item.bits.tobytes()
        for item in tensors
    )
