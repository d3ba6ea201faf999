"""Changes to the tensors of one shard, as safetensors describes them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.runtime.checkpoint.shard_bytes import ShardBytes

TensorChange = Callable[[ShardBytes, random.Random], str]
"""Changes a shard, and gives the name of the tensor that it is about, or ''."""
TENSOR_CHANGES: dict[str, TensorChange] = {}


def change(function: TensorChange) -> TensorChange:
    TENSOR_CHANGES[function.__name__.replace("_", " ")] = function
    return function


def _row(found: ShardBytes, dice: random.Random) -> tuple[str, dict[str, Any]]:
    name = dice.choice(list(found.tensors))
    return name, found.header[name]


@change
def a_tensor_missing(found: ShardBytes, dice: random.Random) -> str:
    name, _ = _row(found, dice)
    found.remove(name)
    return name


@change
def a_tensor_of_the_optimizer_missing(found: ShardBytes, dice: random.Random) -> str:
    name = dice.choice([name for name in found.tensors if "exp_avg" in name])
    found.remove(name)
    return name


@change
def a_tensor_more(found: ShardBytes, dice: random.Random) -> str:
    like, _ = _row(found, dice)
    name = dice.choice(["unknown", like + " ", "optimizer/exp_avg/unknown", ""])
    found.add(name, like=like)
    return name


@change
def a_tensor_renamed(found: ShardBytes, dice: random.Random) -> str:
    name, _ = _row(found, dice)
    found.header[name + "s"] = found.header.pop(name)
    return name


@change
def another_dtype_with_the_same_bytes(found: ShardBytes, dice: random.Random) -> str:
    name, row = _row(found, dice)
    kinds = [["F64", "I64", "U64", "C64"], ["F32", "I32", "U32"]]
    same = next(kinds for kinds in kinds if row["dtype"] in kinds)
    row["dtype"] = dice.choice([kind for kind in same if kind != row["dtype"]])
    return name


@change
def another_shape_with_the_same_bytes(found: ShardBytes, dice: random.Random) -> str:
    name = dice.choice([name for name in found.tensors if found.header[name]["shape"]])
    row = found.header[name]
    *first, last = row["shape"]
    row["shape"] = [*first, *dice.choice([[last, 1], [1, last]])]
    return name


@change
def a_shape_turned_with_the_same_bytes(found: ShardBytes, dice: random.Random) -> str:
    matrices = [n for n, row in found.tensors.items() if len(set(row["shape"])) == 2]
    name = dice.choice(matrices)
    found.header[name]["shape"].reverse()
    return name


@change
def two_tensors_under_each_other_s_name(found: ShardBytes, dice: random.Random) -> str:
    names = list(found.tensors)
    one, other = dice.choice(
        [
            (one, other)
            for one in names
            for other in names
            if len(found.bytes_of(one)) == len(found.bytes_of(other))
            and found.bytes_of(one) != found.bytes_of(other)
        ]
    )
    found.header[one], found.header[other] = found.header[other], found.header[one]
    return ""


@change
def offsets_of_another_tensor(found: ShardBytes, dice: random.Random) -> str:
    one, row = _row(found, dice)
    other = dice.choice([name for name in found.tensors if name != one])
    row["data_offsets"] = list(found.header[other]["data_offsets"])
    return ""


@change
def a_wrong_value_in_a_header(found: ShardBytes, dice: random.Random) -> str:
    _, row = _row(found, dice)
    key = dice.choice(["dtype", "shape", "data_offsets"])
    wrong = [
        None,
        -1,
        "F64",
        "text",
        [],
        {},
        [[1]],
        [-8, 8],
        [2**62, 2**62],
        [0, 2**63],
        [0.5],
        True,
    ]
    row[key] = dice.choice([value for value in wrong if value != row[key]])
    return ""


@change
def a_key_missing_in_a_header(found: ShardBytes, dice: random.Random) -> str:
    _, row = _row(found, dice)
    del row[dice.choice(list(row))]
    return ""


@change
def metadata_missing(found: ShardBytes, dice: random.Random) -> str:
    if dice.random() < 0.3:
        found.header.pop("__metadata__", None)
    elif metadata := found.header.get("__metadata__"):
        del metadata[dice.choice(list(metadata))]
    return ""


@change
def metadata_of_another_kind(found: ShardBytes, dice: random.Random) -> str:
    if dice.random() < 0.3 or "__metadata__" not in found.header:
        found.header["__metadata__"] = dice.choice(
            [None, 3, "text", [], {}, {"a": 1}, {"save": {}}]
        )
    else:
        metadata = found.header["__metadata__"]
        metadata[dice.choice(list(metadata))] = dice.choice([None, 3, "text", "", [], {}, "0" * 64])
    return ""


@change
def a_hundred_thousand_tensors_more(found: ShardBytes, dice: random.Random) -> str:
    row = {"dtype": "F64", "shape": [0], "data_offsets": [len(found.data), len(found.data)]}
    found.header |= {f"t{number}": row for number in range(100_000)}
    return ""
