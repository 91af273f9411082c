"""A pickle, looked at and never run.

    opcodes --load--> {"state_dict": {"weight": ...}, "message_hub": {"lr": Inert(Name("mmengine...", "...Buffer"))}}

Containers, numbers and texts are themselves. A class or function that the file names is a `Name`, and what it would
have been called to make an `Inert`, with its arguments and state. Nothing of that name is imported, looked up or
called; the few makers that a caller knows are functions of the caller's.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

MAX_OPCODES = 4_000_000
"""A checkpoint of a model with its optimizer has a tenth of it."""
MAX_DEPTH = 200
MAX_VALUES = 50_000_000
"""Of the structure walked as a tree: references to one list, nested, grow without bound in a small file."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Inert:
    """What a call in a pickle would have made, had it been run. Compared by identity."""

    of: Any
    """What would be called: a Name, as a rule."""
    args: Any = ()
    kwargs: Any = None
    state: Any = None
    items: list[Any] = field(default_factory=list)
    """What would be appended, or set as pairs of key and value."""


Makers = Mapping[str, Callable[..., Any]]
"""Path of a function in a pickle -> what is called in its place, with what the pickle gives it.

A maker checks its arguments, which may be anything: ValueError refuses the file, NotImplemented leaves an Inert.
"""


def load(file: IO[bytes], *, makers: Makers, persistent: Callable[[Any], Any]) -> Any:
    """Return what the pickle at a file's position holds, and leave the position behind it.

    `persistent` returns what stands for a persistent id. The structure has no cycles, is at most MAX_DEPTH deep, and
    its keys are plain values, so it may be walked. Raises ValueError.
    """
    machine = _Machine(makers, persistent)
    opcodes = 0
    try:
        for opcode, argument, _ in pickletools.genops(file):
            opcodes += 1
            if opcodes > MAX_OPCODES:
                raise ValueError(f"its pickle has more than {MAX_OPCODES:,} opcodes")
            machine.step(opcode.name, argument)
        value = machine.stack.pop()
    except (IndexError, KeyError) as error:  # an empty stack, a memo that was never written
        raise ValueError("its pickle is damaged") from error
    _check(value)
    return value


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Opcodes whose argument is the value."""
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MAKES = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


class _Machine:
    """The stack machine of pickle (Lib/pickletools.py describes it), without what reaches out of it."""

    def __init__(self, makers: Makers, persistent: Callable[[Any], Any]) -> None:
        self.makers = makers
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _VALUES:
            stack.append(argument)
            return
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
            return
        if opcode in _MAKES:
            stack.append(_MAKES[opcode]())
            return
        match opcode:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "TUPLE":
                items = self.since_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(opcode[-1]))))
            case "SETITEM":
                items = self.pop(2)
                _set_items(stack[-1], items)
            case "SETITEMS":
                items = self.since_mark()
                _set_items(self.stack[-1], items)
            case "APPEND":
                items = self.pop(1)
                _append(stack[-1], items)
            case "APPENDS" | "ADDITEMS":
                items = self.since_mark()
                _append(self.stack[-1], items)
            case "LIST" | "DICT" | "FROZENSET":
                items = self.since_mark()
                made: Any = {"LIST": list, "DICT": dict, "FROZENSET": set}[opcode]()
                (_set_items if opcode == "DICT" else _append)(made, items)
                self.stack.append(made)
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "PERSID":
                stack.append(self.persistent(argument))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*self.pop(2)))
            case "REDUCE":
                stack.append(self.make(*self.pop(2)))
            case "NEWOBJ" | "NEWOBJ_EX":
                stack.append(Inert(*self.pop(3 if opcode == "NEWOBJ_EX" else 2)))
            case "INST":
                items = self.since_mark()
                self.stack.append(Inert(_name(*argument.split(" ", 1)), tuple(items)))
            case "OBJ":
                items = self.since_mark()
                self.stack.append(Inert(items[0], tuple(items[1:])))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict):  # of a dict it is attributes beside its items
                    raise ValueError(f"its pickle gives a state to a {type(stack[-1]).__name__}")
            case "DUP":
                stack.append(stack[-1])
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self.since_mark()
            case "POP_MARK":
                self.since_mark()
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise ValueError(f"its pickle has the opcode {opcode}, which no checkpoint needs")

    def make(self, function: Any, args: Any) -> Any:
        """Return what a call would give: the caller's maker of that name decides, or nobody."""
        maker = self.makers.get(function.path) if isinstance(function, Name) else None
        if maker is not None and isinstance(args, tuple):
            made = maker(*args)
            if made is not NotImplemented:
                return made
        return Inert(function, args)

    def pop(self, number: int) -> list[Any]:
        """Take the topmost values off, the deepest first; IndexError when there are fewer."""
        if len(self.stack) < number:
            raise IndexError
        values = self.stack[-number:]
        del self.stack[-number:]
        return values

    def since_mark(self) -> list[Any]:
        """Take off what lies above the topmost mark, and the mark."""
        values = self.stack
        self.stack = self.marks.pop()
        return values


def _name(module: Any, name: Any = "") -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("its pickle names something that is no text")
    return Name(module, name)


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise IndexError
    pairs = list(zip(items[::2], items[1::2], strict=True))
    if isinstance(target, Inert):
        target.items += pairs
    elif isinstance(target, dict):
        target.update((_key(key), value) for key, value in pairs)
    else:
        raise ValueError(f"its pickle sets items of a {type(target).__name__}")


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, Inert):
        target.items += items
    elif isinstance(target, list):
        target += items
    elif isinstance(target, set):
        target.update(map(_key, items))
    else:
        raise ValueError(f"its pickle appends to a {type(target).__name__}")


_PLAIN = (str, bytes, int, float, type(None), Name, Inert)


def _key(value: Any) -> Any:
    """Return a value that can be hashed in a moment, which nested tuples cannot; ValueError for others."""
    flat = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(one, _PLAIN) for one in flat):
        raise ValueError(f"its pickle has a {type(value).__name__} for a key")
    return value


def _check(value: Any) -> None:
    """Raise ValueError when the structure holds itself, or is too deep or too large to be walked."""
    known: dict[int, tuple[int, int]] = {}  # of every container: its depth, and its values counted as in a tree
    inside: set[int] = set()
    todo = [(value, False)]
    while todo:
        node, seen = todo.pop()
        parts = _parts(node)
        if parts is None or id(node) in known:
            continue
        if not seen:
            if id(node) in inside:
                raise ValueError("its pickle holds a value that contains itself")
            inside.add(id(node))
            todo.append((node, True))
            todo.extend((part, False) for part in parts)
            continue
        inside.remove(id(node))
        found = [known.get(id(part), (0, 1)) for part in parts]
        depth = 1 + max((depth for depth, _ in found), default=0)
        number = 1 + sum(number for _, number in found)
        if depth > MAX_DEPTH or number > MAX_VALUES:
            raise ValueError(f"its pickle is nested more than {MAX_DEPTH} deep, or holds too many values")
        known[id(node)] = (depth, number)


def _parts(node: Any) -> Iterable[Any] | None:
    """Return what a container holds, None for any other value."""
    match node:
        case list() | tuple() | set():
            return node
        case dict():
            return [*node.keys(), *node.values()]
        case Inert():
            return [node.of, node.args, node.kwargs, node.state, *node.items]
    return None
