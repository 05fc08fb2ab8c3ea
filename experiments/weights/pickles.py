"""A pickle machine for dicts of tensors.

Python's own unpickler, restricted as it may be, crashes on some pickles (a tuple in a tuple in a
tuple, ..., as a key, overflows the C stack) and takes any memory. This one knows the operations
that such dicts consist of, makes nothing but plain containers, and counts what it does.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from experiments.weights.tree import WeightsError

MAX_OPERATIONS = 2**22  # some 30 make a tensor
_MARK = object()
_KEYS = (str, int, float, bool, bytes, type(None))

Find = Callable[[str, str], Any]
Refer = Callable[[Any], Any]

_PLAIN = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES UNICODE SHORT_BINUNICODE BINUNICODE FLOAT BINFLOAT
"""
_PUSHED = frozenset(_PLAIN.split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SKIPPED = frozenset({"PROTO", "FRAME"})


class Function:
    """What a pickle may call; made by `find` alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


def ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    """`collections.OrderedDict`, with keys that are plain."""
    found: OrderedDict[Any, Any] = OrderedDict()
    for pair in arguments[0] if arguments else ():
        key, value = pair
        _set(found, key, value)
    return found


def load(stream: BinaryIO, find: Find, refer: Refer) -> Any:
    """The value that the pickle at the place of a stream describes.

    Args:
      stream: is left behind the pickle.
      find: gives what a name, (module, attribute), stands for: a `Function` or a plain value.
      refer: gives what a persistent id stands for.

    Raises:
      WeightsError: the pickle asks for what no dict of tensors has.
      ValueError, LookupError, TypeError: it is damaged.
    """
    machine = _Machine(find, refer)
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_OPERATIONS:
            raise WeightsError(f"the pickle has more than {MAX_OPERATIONS} operations")
        machine.step(operation.name, argument)
    (value,) = machine.stack
    return value


class _Machine:
    def __init__(self, find: Find, refer: Refer) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._find, self._refer = find, refer

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _SKIPPED or name == "STOP":
            pass
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        else:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(self._last(count))]
        elif name == "TUPLE":
            items = self._marked()
            stack.append(tuple(items))
        elif name == "LIST":
            stack.append(self._marked())
        elif name == "DICT":
            items = self._marked()
            stack.append({})
            self._set_items(items)
        elif name == "APPEND":
            value = self._pop()
            self._target(list).append(value)
        elif name == "APPENDS":
            items = self._marked()
            self._target(list).extend(items)
        elif name == "SETITEM":
            value, key = self._pop(), self._pop()
            self._set_items([key, value])
        elif name == "SETITEMS":
            self._set_items(self._marked())
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(self._find(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            stack.append(self._find(str(module), str(attribute)))
        elif name == "BINPERSID":
            stack.append(self._refer(self._pop()))
        elif name == "REDUCE":
            arguments, called = self._pop(), self._pop()
            if not isinstance(called, Function) or type(arguments) is not tuple:
                raise WeightsError("the pickle calls what is no part of a dict of tensors")
            stack.append(called.function(*arguments))
        elif name == "BUILD":
            self._pop()  # the versions of modules, an attribute of PyTorch's state dicts
            self._target(dict)
        else:
            raise WeightsError(f"the pickle has {name!r}, which no dict of tensors needs")

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the pickle's stack is empty")
        return self.stack.pop()

    def _last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or _MARK in items:
            raise ValueError("the pickle's stack is empty")
        return items

    def _marked(self) -> list[Any]:
        """What is on the stack behind the last mark; both are taken from it."""
        place = len(self.stack) - 1
        while place >= 0 and self.stack[place] is not _MARK:
            place -= 1
        if place < 0:
            raise ValueError("the pickle lacks a mark")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _target(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"the pickle adds to what is no {kind.__name__}")
        return self.stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._target(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(target, key, value)


def _set(target: Any, key: Any, value: Any) -> None:
    if type(key) not in _KEYS:  # to hash nested tuples overflows the C stack
        raise WeightsError(f"the pickle has a {type(key).__name__} as a key")
    target[key] = value
