"""A file of PyTorch's, read without trust.

With `weights_only`, torch.load runs nothing that a file brings along. But a few bytes may still ask for all
memory there is, or for years: bytearray(10**12); one number seen as a billion; a list that holds another one
ten times, which holds another one ten times, and so on; such a tuple as the key of a dictionary. So a file is
looked at before anything of it is built, and what was built before anybody walks through it: it is made as
torch.save makes a state, and takes as much memory as it has bytes, but for a small factor.
"""

import math
import os
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict

import torch

from common.errors import is_out_of_memory

MOST_RECORDS = 1 << 17  # a network of a thousand layers, with its moments, has half as many
MOST_OPERATIONS = 1 << 22  # of a pickle; that network's has two million
DEEPEST = 64  # dictionaries and lists within each other
FACTOR, ROOM = 4, 1 << 20  # a file of n bytes becomes FACTOR * n + ROOM bytes at most,
VALUE = 8  # of which each value has so many, beside those of a text or a tensor


class Damaged(Exception):
    """The file is not whole, or no such file."""


class Refused(Exception):
    """It holds what training does not write: the message says what, or what was done about it."""

    def __init__(self, what="nothing in it was run"):
        super().__init__(what)


def read(path, more=()):
    """What torch.save has written to `path`: tensors in dictionaries and lists of plain values, on the CPU.

    more: names ("module name") of classes whose objects may be there as well, if torch knows them as safe.
    Raises Damaged, Refused, or PermissionError.
    """
    try:
        size = os.path.getsize(path)
        data, storages = _records(path, size)
    except (PermissionError, MemoryError):
        raise
    except Exception:  # one of many kinds: a wrong checksum, a lost end, a lock
        raise Damaged(f"{os.path.basename(path)} is damaged") from None
    try:
        _check_pickle(data, storages, more)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Refused:
        raise
    except Exception as error:  # also one of many
        if is_out_of_memory(error):  # of so large a file
            raise
        raise Refused from None
    if _cost_of(state, {}, 0, bool(more))[0] > FACTOR * size + ROOM:
        raise Refused("it would take far more memory than it has bytes")
    return state


def _require(condition, *what):
    if not condition:
        raise Refused(*what)


# ---- the container ---------------------------------------------------------------------------------

END, LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")


def _records(path, size):
    """(the pickle, {key of a storage: its bytes}) of a zip file; BadZipFile if PyTorch would not write it so.

    Nothing is compressed, no name is there twice, and there is no second list of what there is: Python's
    library, which looks here, and PyTorch's, which reads, might each take another one.
    """
    with open(path, "rb") as file:
        file.seek(max(0, size - END64.size - LOCATOR.size - END.size))
        end64, locator, end = (file.read(part.size) for part in (END64, LOCATOR, END))
    mark, _, _, _, count, length, start, comment = END.unpack(end)
    place = size - END.size
    if locator.startswith(b"PK\6\7"):
        place -= LOCATOR.size + END64.size
        *_, count, length, start = END64.unpack(end64)
        mark = mark if LOCATOR.unpack(locator)[2] == place else None
    if mark != b"PK\5\6" or comment or start + length != place or not count <= MOST_RECORDS:
        raise zipfile.BadZipFile
    if length > 512 * count:  # of a name each
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


class Thing:
    """What a pickle makes, of which only the kind counts; of a storage also how many numbers it has."""

    def __init__(self, kind, count=None):
        self.kind, self.count = kind, count


VALUES = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TENSOR, TYPED_TENSOR = "torch._utils _rebuild_tensor_v2", "torch._tensor _rebuild_from_type_v2"
ORDERED_DICT = "collections OrderedDict"
SIZES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2, "Char": 1,
         "Byte": 1, "Bool": 1}  # fmt: skip
STORAGES = {f"torch {name}Storage": size for name, size in SIZES.items()}  # bytes of a number


def _check_pickle(data, storages, more):
    """Refused unless all calls make what `read` tells of, keys are texts or numbers, and tensors lie within
    what the file holds of them.

    It follows the operations as the machine does that they are for, with plain values, tuples of these, and a
    Thing in place of all else.
    """
    stack, marks, memo = [], [], {}

    def since_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def require_kind(*kinds):
        _require(isinstance(stack[-1], Thing) and stack[-1].kind in kinds)

    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        _require(number < MOST_OPERATIONS)
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
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append(Thing("list"))
            case "APPEND":
                stack.pop()
                require_kind("list")
            case "APPENDS":
                since_mark()
                require_kind("list")
            case "EMPTY_DICT":
                stack.append(Thing("dict"))
            case "SETITEM" | "SETITEMS":
                items = since_mark() if operation.name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                _require(all(type(key) in (str, int) for key in items[::2]))
                require_kind("dict")
            case "GLOBAL":
                _require(argument in (TENSOR, ORDERED_DICT, *STORAGES, *more))
                stack.append(Thing(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storages))
            case "REDUCE" | "NEWOBJ":
                arguments, maker = stack.pop(), stack.pop()
                stack.append(_made(maker.kind, arguments, more))
            case "BUILD":
                require_kind("dict")
                stack.pop()
                require_kind("dict", "object")
            case _:
                raise Refused


def _storage(identity, storages):
    """Of the identity that a pickle gives a storage."""
    what, maker, key, place, count = identity
    _require((what, type(place), type(count)) == ("storage", str, int))
    _require(storages[key] == count * STORAGES[maker.kind])
    return Thing("storage", count)


def _made(maker, arguments, more):
    """What a call makes."""
    if maker == ORDERED_DICT:
        _require(arguments == ())
        return Thing("dict")
    if maker == TYPED_TENSOR:
        (function, kind, arguments, _), maker = arguments, TENSOR
        _require((function.kind, kind.kind) == (TENSOR, "torch Tensor"))
    if maker == TENSOR:
        storage, start, shape, strides, *_ = arguments
        last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        _require(min(start, *shape, *strides, 0) == 0 and (0 in shape or last < storage.count))
        return Thing("tensor")
    _require(maker in more)
    return Thing("object")


# ---- the state -------------------------------------------------------------------------------------


def _cost_of(value, known, depth, has_objects):
    """(about as many bytes as it takes to write a value with all within, how deep it is).

    What is there several times counts as often. known: {id of a container: its cost}, filled here.
    """
    kind, cost = type(value), VALUE
    if kind is torch.Tensor:
        cost += value.numel() * value.itemsize
    elif kind is str:
        cost += len(value)
    elif kind is int:
        _require(-(1 << 63) <= value < 1 << 64, "it holds a number beyond all limits")
    elif kind in (dict, OrderedDict, list, tuple):
        if id(value) not in known:
            _require(depth < DEEPEST, "its values are nested too deeply")
            known[id(value)] = math.inf, 0  # of one that holds itself
            items = (part for pair in value.items() for part in pair) if hasattr(value, "items") else value
            costs = [_cost_of(item, known, depth + 1, has_objects) for item in items]
            deep = max((deep for _, deep in costs), default=0)
            known[id(value)] = VALUE + sum(cost for cost, _ in costs), 1 + deep
        _require(known[id(value)][1] <= DEEPEST, "its values are nested too deeply")
        return known[id(value)]
    else:
        _require(kind in (float, bool) or value is None or has_objects)
    return cost, 0
