"""Mutated GGUF headers: one field of a file is changed in place, as bad converters, bad downloads and bad people do it.

A case is a seed: `mutate(data, seed)` is the same bytes everywhere. Tensors keep their bytes.
"""

from __future__ import annotations

import math
import random
import struct
from dataclasses import dataclass

# enum gguf_type -> struct format
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
INTEGERS = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    10,
    13,
    14,
    16,
    17,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    100,
    127,
    128,
    255,
    256,
    512,
    1000,
    4096,
    8193,
    65535,
    65536,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
FLOATS = (0.0, -0.0, -1.0, 1e-30, 1.0, 1e30, float("inf"), float("-inf"), float("nan"))
MAX_BYTES = 2**26  # of a file that is made longer
TENSOR_TYPES = (*range(43), 100, 2**31)  # enum ggml_type, and beyond


@dataclass
class Field:
    """A key: where its name, the number of its type, and its value begin. kind: enum gguf_type; items: of an array,
    else None.
    """

    name: str
    name_at: int
    type_at: int
    value_at: int
    kind: int
    item_kind: int | None = None
    n: int = 1


@dataclass
class Tensor:
    name: str
    name_at: int
    n_dims: int
    dims_at: int
    dims: tuple[int, ...]
    kind: int

    @property
    def type_at(self) -> int:
        return self.dims_at + 8 * self.n_dims


@dataclass
class Header:
    fields: list[Field]
    tensors: list[Tensor]
    end: int


def parse(data: bytes) -> Header:
    """The header of a whole file."""
    at = 8
    n_tensors, n_fields = struct.unpack_from("<QQ", data, at)
    at += 16

    def string() -> tuple[str, int]:
        nonlocal at
        n = struct.unpack_from("<Q", data, at)[0]
        begin = at + 8
        at = begin + n
        return data[begin:at].decode("utf-8", "replace"), begin

    def skip(kind: int) -> None:
        nonlocal at
        if kind == STRING:
            string()
        else:
            at += struct.calcsize("<" + SCALARS[kind])

    fields, tensors = [], []
    for _ in range(n_fields):
        name, name_at = string()
        type_at, kind = at, struct.unpack_from("<I", data, at)[0]
        at += 4
        if kind == ARRAY:
            item_kind, n = struct.unpack_from("<IQ", data, at)
            at += 12
            fields.append(Field(name, name_at, type_at, at, kind, item_kind, n))
            for _ in range(n):
                skip(item_kind)
        else:
            fields.append(Field(name, name_at, type_at, at, kind))
            skip(kind)
    for _ in range(n_tensors):
        name, name_at = string()
        n_dims = struct.unpack_from("<I", data, at)[0]
        dims_at = at + 4
        dims = struct.unpack_from(f"<{n_dims}Q", data, dims_at)
        at = dims_at + 8 * n_dims
        tensors.append(Tensor(name, name_at, n_dims, dims_at, dims, struct.unpack_from("<I", data, at)[0]))
        at += 12
    return Header(fields, tensors, at)


def mutate(data: bytes, seed: int) -> tuple[bytes, str]:
    """The file with one to two fields changed, and a line that says how."""
    rng = random.Random(seed)
    header, out = parse(data), bytearray(data)
    said = []
    # The vocabulary is most of a header, and llama.cpp's alone: its arrays are mutated rarely.
    for _ in range(1 if rng.random() < 0.8 else 2):
        kind = rng.choices(
            (
                "value",
                "type",
                "rename key",
                "swap dims",
                "dim",
                "tensor type",
                "rename tensor",
                "offset",
                "truncate",
                "bytes",
            ),
            (45, 6, 8, 8, 10, 8, 8, 2, 2, 3),
        )[0]
        if kind in ("value", "type", "rename key"):
            fields = [f for f in header.fields if not f.name.startswith("tokenizer.ggml.t") or rng.random() < 0.05]
            field = rng.choice(fields)
            if kind == "value":
                said.append(_value(rng, out, field))
            elif kind == "type":
                # in place: a type of the same size, so that what follows is still read
                sizes = {k: struct.calcsize("<" + f) for k, f in SCALARS.items()}
                same = [k for k in sizes if k != field.kind and sizes[k] == sizes.get(field.kind)] or list(sizes)
                other = rng.choice(same)
                struct.pack_into("<I", out, field.type_at, other)
                said.append(f"{field.name} has type {other} in place of {field.kind}")
            else:
                out[field.name_at] ^= 1
                said.append(f"without {field.name}")
        elif kind == "truncate":
            n = rng.randrange(4, len(out))
            del out[n:]
            return bytes(out), f"cut to {n} bytes"
        elif kind == "bytes":
            at = rng.randrange(4, header.end)
            out[at] = rng.randrange(256)
            said.append(f"byte {at} is {out[at]}")
        else:
            tensor = rng.choice(header.tensors)
            said.append(_tensor(rng, out, header, tensor, kind))
    return bytes(out), "; ".join(said)


def _value(rng: random.Random, out: bytearray, field: Field) -> str:
    kind, at = field.kind, field.value_at
    if kind == ARRAY:
        if field.item_kind not in SCALARS or not field.n:
            return f"{field.name} as it was"
        kind = field.item_kind
        index = rng.randrange(field.n)
        at += index * struct.calcsize("<" + SCALARS[kind])
        name = f"{field.name}[{index}]"
    else:
        name = field.name
    if kind == STRING:
        n = struct.unpack_from("<Q", out, at)[0]
        if n:
            index = rng.randrange(min(n, 64))
            out[at + 8 + index] = rng.choice(b"\0x0\xff %{")
        return f"{name} with another character"
    form = "<" + SCALARS[kind]
    before = struct.unpack_from(form, out, at)[0]
    if kind == 7:
        value = not before
    elif kind in (6, 12):
        value = rng.choice(FLOATS)
    else:
        near = [before + d for d in (-1, 1)] + [before * 2, before // 2]
        bits = 8 * struct.calcsize(form)
        value = rng.choice(INTEGERS + tuple(near)) % 2**bits
        if SCALARS[kind].islower():
            value -= 2**bits if value >= 2 ** (bits - 1) else 0
    struct.pack_into(form, out, at, value)
    return f"{name} = {value} in place of {before}"


def _tensor(rng: random.Random, out: bytearray, header: Header, tensor: Tensor, kind: str) -> str:
    if kind == "rename tensor":
        out[tensor.name_at] ^= 1
        return f"without {tensor.name}"
    if kind == "swap dims" and tensor.n_dims > 1:
        # the number of bytes stays, so that no offset is wrong
        dims = list(tensor.dims)
        form = rng.randrange(3)
        if form == 0:
            rng.shuffle(dims)
        elif form == 1:
            dims[0], dims[1] = dims[0] * dims[1], 1
        else:
            i, j = rng.sample(range(len(dims)), 2)
            if dims[i] % 2 == 0:
                dims[i], dims[j] = dims[i] // 2, dims[j] * 2
        struct.pack_into(f"<{len(dims)}Q", out, tensor.dims_at, *dims)
        return f"{tensor.name} is {dims} in place of {list(tensor.dims)}"
    if kind == "tensor type":
        same = {0: (26, 30, 0), 1: (30, 25), 30: (1,)}.get(
            tensor.kind, ()
        )  # types of the same size leave the offsets right
        value = rng.choice(same if same and rng.random() < 0.5 else TENSOR_TYPES)
        struct.pack_into("<I", out, tensor.type_at, value)
        return f"{tensor.name} has type {value} in place of {tensor.kind}"
    if kind == "offset":
        struct.pack_into("<Q", out, tensor.type_at + 4, rng.choice((0, 32, 2**40, 2**63, 2**64 - 32)))
        return f"{tensor.name} has another offset"
    index = rng.randrange(max(1, tensor.n_dims))
    before = tensor.dims[index]
    value = rng.choice((0, 1, before - 1, before + 1, before * 2, before // 2, 2**31, 2**62, 2**63))
    # The tensors after it move along: what is wrong is its shape, not their offsets. The last tensor needs the bytes to
    # be there.
    struct.pack_into("<Q", out, tensor.dims_at + 8 * index, value)
    if 0 < value <= 4 * before and tensor.kind in (0, 1):
        _shift(out, header)
    return f"{tensor.name} has {value} in place of {before} in dimension {index}"


def _shift(out: bytearray, header: Header) -> None:
    """Offsets that fit the tensors' shapes, and bytes for them."""
    sizes = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}
    offsets, at = [], 0
    for tensor in header.tensors:
        offsets.append(at)
        n = math.prod(struct.unpack_from(f"<{tensor.n_dims}Q", out, tensor.dims_at))
        n_bytes = n * sizes[tensor.kind] if tensor.kind in sizes else n // 32 * 34  # Q8_0
        at += -(-n_bytes // 32) * 32
        if at > MAX_BYTES:
            return
    for tensor, offset in zip(header.tensors, offsets):
        struct.pack_into("<Q", out, tensor.type_at + 4, offset)
    data_at = -(-header.end // 32) * 32
    out.extend(bytes(max(0, data_at + at - len(out))))
