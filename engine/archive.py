"""Reading .pt files that may be hostile.

With `weights_only`, torch.load runs no code from a file. But a few bytes can still ask for all the memory
there is, or for years of work: bytearray(10**12); a tensor that shows one number as a billion; a list that
contains another one ten times, which contains another one ten times, and so on; such a tuple as the key of a
dictionary. So the container and the pickle are checked before torch.load builds anything, and the result is
checked before anyone iterates over it: it must look like what torch.save writes for training, and take no
more memory than a small multiple of the size of the file.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch

from common.errors import is_out_of_memory

MAX_RECORDS = 1 << 17  # a network of a thousand layers, with its optimizer state, has half as many
MAX_OPERATIONS = 1 << 22  # in a pickle; that network's has two million
MAX_DEPTH = 64  # of nested dictionaries and lists
FACTOR, ALLOWANCE = 4, 1 << 20  # a file of n bytes may take FACTOR * n + ALLOWANCE bytes of memory,
VALUE_COST = 8  # counting this many bytes per value, plus the content of strings and tensors


class Damaged(Exception):
    """The file is incomplete, or not a file of PyTorch at all."""


class Refused(Exception):
    """The file contains something that training does not write. The message says what."""

    def __init__(self, message: str = "nothing in it was run") -> None:
        super().__init__(message)


def read(path: str | os.PathLike[str], more: Collection[str] = ()) -> Any:
    """Load a file written by torch.save: tensors on the CPU, in dictionaries and lists of plain values.

    more: names ("module name") of other classes whose objects may occur, if torch considers them safe.
    Raises Damaged, Refused or PermissionError.
    """
    try:
        size = os.path.getsize(path)
        data, storages = _records(path, size)
    except (PermissionError, MemoryError):
        raise
    except Exception:  # of many types: a wrong checksum, a missing end, encryption
        raise Damaged(f"{os.path.basename(path)} is damaged") from None
    try:
        _check_pickle(data, storages, more)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Refused:
        raise
    except Exception as error:  # of many types again
        if is_out_of_memory(error):  # the file is simply large
            raise
        raise Refused from None
    if _cost_of(state, {}, 0, bool(more))[0] > FACTOR * size + ALLOWANCE:
        raise Refused("it would take far more memory than the file has bytes")
    return state


def _require(condition: object, *message: str) -> None:
    if not condition:
        raise Refused(*message)


# ---- the container ---------------------------------------------------------------------------------

END, LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")


def _records(path: str | os.PathLike[str], size: int) -> tuple[bytes, dict[str, int]]:
    """Check that the zip file is one that PyTorch writes. Returns (pickle, {key of a storage: its bytes}).

    Nothing may be compressed, no name may appear twice, and there may be only one directory: otherwise
    Python's zip library, which checks the file here, and PyTorch's, which reads it, could see different
    content. Raises BadZipFile.
    """
    with open(path, "rb") as file:
        file.seek(max(0, size - END64.size - LOCATOR.size - END.size))
        end64, locator, end = (file.read(part.size) for part in (END64, LOCATOR, END))
    mark, _, _, _, count, length, start, comment = END.unpack(end)
    directory_end = size - END.size
    if locator.startswith(b"PK\6\7"):
        directory_end -= LOCATOR.size + END64.size
        *_, count, length, start = END64.unpack(end64)
        mark = mark if LOCATOR.unpack(locator)[2] == directory_end else None
    if mark != b"PK\5\6" or comment or start + length != directory_end or not count <= MAX_RECORDS:
        raise zipfile.BadZipFile
    if length > 512 * count:  # far more than names and their headers need
        raise zipfile.BadZipFile
    with zipfile.ZipFile(path) as archive:
        entries = {entry.orig_filename: entry for entry in archive.infolist()}
        root = next(iter(entries)).partition("/")[0]
        is_sound = (
            archive.start_dir == start
            and len({name.lower() for name in entries}) == len(archive.infolist()) == count
            and all(re.fullmatch(rf"{re.escape(root)}/[\w./-]+", name, re.ASCII) for name in entries)
            and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.values())
            and all(entry.file_size == entry.compress_size for entry in entries.values())
            and sum(entry.file_size for entry in entries.values()) <= size
        )
        if not is_sound or archive.testzip() is not None:
            raise zipfile.BadZipFile
        sizes = {name.removeprefix(f"{root}/data/"): entry.file_size for name, entry in entries.items()}
        return archive.read(f"{root}/data.pkl"), sizes


# ---- the pickle ------------------------------------------------------------------------------------


class Placeholder:
    """Stands for an object that the pickle would build. count: of a storage, its number of elements."""

    def __init__(self, kind: str, count: int | None = None) -> None:
        self.kind, self.count = kind, count


VALUES = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TENSOR, TYPED_TENSOR = "torch._utils _rebuild_tensor_v2", "torch._tensor _rebuild_from_type_v2"
ORDERED_DICT = "collections OrderedDict"
SIZES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2, "Char": 1,
         "Byte": 1, "Bool": 1}  # fmt: skip
STORAGES = {f"torch {name}Storage": size for name, size in SIZES.items()}  # bytes per element


def _check_pickle(data: bytes, storages: dict[str, int], more: Collection[str]) -> None:
    """Dry-run the pickle: follow its operations without building anything.

    The stack holds plain values, tuples of them, and a Placeholder for everything else. Raises Refused if a
    call makes something that `read` does not promise, if a key is not a string or an integer, or if a tensor
    does not lie within its storage.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def require_kind(*kinds: str) -> None:
        _require(isinstance(stack[-1], Placeholder) and stack[-1].kind in kinds)

    argument: Any
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        _require(number < MAX_OPERATIONS)
        match operation.name:
            case "PROTO":
                pass
            case "STOP":
                return
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name in VALUES:
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(operation.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "EMPTY_LIST":
                stack.append(Placeholder("list"))
            case "APPEND":
                stack.pop()
                require_kind("list")
            case "APPENDS":
                pop_mark()
                require_kind("list")
            case "EMPTY_DICT":
                stack.append(Placeholder("dict"))
            case "SETITEM" | "SETITEMS":
                items = pop_mark() if operation.name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                _require(all(type(key) in (str, int) for key in items[::2]))
                require_kind("dict")
            case "GLOBAL":
                _require(argument in (TENSOR, ORDERED_DICT, *STORAGES, *more))
                stack.append(Placeholder(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storages))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function.kind, arguments, more))
            case "BUILD":
                require_kind("dict")
                stack.pop()
                require_kind("dict", "object")
            case _:
                raise Refused


def _storage(persistent_id: Any, storages: dict[str, int]) -> Placeholder:
    """The storage with this persistent ID; its size must be the one in the file."""
    tag, storage_type, key, location, count = persistent_id
    _require((tag, type(location), type(count)) == ("storage", str, int))
    _require(storages[key] == count * STORAGES[storage_type.kind])
    return Placeholder("storage", count)


def _call(function: str, arguments: Any, more: Collection[str]) -> Placeholder:
    """The result of a call in the pickle."""
    if function == ORDERED_DICT:
        _require(arguments == ())
        return Placeholder("dict")
    if function == TYPED_TENSOR:
        (inner, tensor_type, arguments, _), function = arguments, TENSOR
        _require((inner.kind, tensor_type.kind) == (TENSOR, "torch Tensor"))
    if function == TENSOR:
        storage, start, shape, strides, *_ = arguments
        last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        _require(min(start, *shape, *strides, 0) == 0 and (0 in shape or last < storage.count))
        return Placeholder("tensor")
    _require(function in more)
    return Placeholder("object")


# ---- the state -------------------------------------------------------------------------------------


def _cost_of(
    value: Any, known: dict[int, tuple[float, int]], depth: int, has_objects: bool
) -> tuple[float, int]:
    """Estimate the memory of a value with everything in it. Returns (bytes, levels of nesting).

    An object that occurs several times counts each time. known: {id of a container: its result}, filled here.
    has_objects: whether values of other types are allowed.
    """
    kind, cost = type(value), VALUE_COST
    if kind is torch.Tensor:
        cost += value.numel() * value.itemsize
    elif kind is str:
        cost += len(value)
    elif kind is int:
        _require(-(1 << 63) <= value < 1 << 64, "it contains an integer of more than 64 bits")
    elif kind in (dict, OrderedDict, list, tuple):
        if id(value) not in known:
            _require(depth < MAX_DEPTH, "its values are nested too deeply")
            known[id(value)] = math.inf, 0  # if it contains itself
            items = (part for pair in value.items() for part in pair) if hasattr(value, "items") else value
            costs = [_cost_of(item, known, depth + 1, has_objects) for item in items]
            levels = max((levels for _, levels in costs), default=0)
            known[id(value)] = VALUE_COST + sum(cost for cost, _ in costs), 1 + levels
        _require(known[id(value)][1] <= MAX_DEPTH, "its values are nested too deeply")
        return known[id(value)]
    else:
        _require(kind in (float, bool) or value is None or has_objects)
    return cost, 0
