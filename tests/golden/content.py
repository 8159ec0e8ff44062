"""What the golden checkpoints hold, from arithmetic alone, so that no library's random numbers can change it."""

from __future__ import annotations

import numpy as np

from resilient.checkpoint.items import ITEM_BYTES, TensorInfo
from resilient.checkpoint.reader import element_type
from tests.resilient.checkpoint.saved import Tensor

VALUES = {
    ("scheduler/milestones", None): b'{"$map":[[3,1],[30,2]]}',
    ("rng", 0): b'{"numbers":[1,2,3],"text":"\\u00e9"}',
    ("rng", 1): '{"text":"é"}'.encode(),
    ("long", None): b'"' + b'abcdefghij\\n\\"' * 2500 + b'"',
}


_ONES = np.array([min(number.bit_count(), 6) for number in range(256)], np.uint64)


def mixed(count, salt):
    """`count` 64-bit words without a pattern: the finaliser of MurmurHash3 over 0, 1, 2, ..."""
    words = np.arange(count, dtype=np.uint64) + np.uint64(salt * 1_000_003 + 1)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    return words ^ (words >> np.uint64(33))


def float_bits(count, salt, *, negative=True):
    """fp32 bits with the exponents of trained weights: few of them, small ones rarer."""
    words = mixed(count, salt)
    exponent = np.uint64(121) - _ONES[(words >> np.uint64(40)) & np.uint64(0xFF)]
    sign = ((words >> np.uint64(50)) & np.uint64(1)) * np.uint64(negative)
    return ((sign << np.uint64(31)) | (exponent << np.uint64(23)) | (words & np.uint64(0x7FFFFF))).astype(np.uint32)


def tensor(name, dtype, bits, shape):
    """A tensor of these bits."""
    info = TensorInfo(name=name, dtype=dtype, shape=shape)
    return Tensor(info, np.ascontiguousarray(bits).view(element_type(dtype)).reshape(shape))


def tensors():
    """Every dtype; every stored form and mode of a plane; no dims, no elements, many chunks."""
    weights = float_bits(96 * 65, 1)
    found = [
        tensor("model/weight", "float32", weights, (96, 65)),
        tensor("model/half", "bfloat16", (weights >> 16).astype(np.uint16), (96, 65)),
        tensor("model/noise", "float32", mixed(600, 2), (40, 30)),
        tensor("model/zero", "float32", np.zeros(4096, np.uint32), (64, 64)),
        tensor("model/scalar", "float64", np.array([0x400921FB54442D18], np.uint64), ()),
        tensor("model/empty", "int8", np.zeros(0, np.uint8), (0, 5)),
        tensor("model/special", "float32", np.array([0x7FC00001, 0x80000000, 0xFF800000, 1] * 80, np.uint32), (320,)),
        tensor("optimizer/exp_avg_sq", "float32", float_bits(96 * 65, 3, negative=False), (96, 65)),
        tensor("sampler/ids", "int64", np.arange(2000, dtype=np.uint64), (2000,)),
        tensor("ünïcode/name", "uint8", np.arange(7, dtype=np.uint8), (7,)),
    ]
    for number, (dtype, size) in enumerate(ITEM_BYTES.items()):
        bits = mixed(-(-33 * size // 8), 100 + number).view(np.uint8)[: 33 * size]
        found.append(tensor(f"every/{dtype}", dtype, bits & 1 if dtype == "bool" else bits, (11, 3)))
    return found
