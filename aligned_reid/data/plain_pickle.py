"""Read the plain data in a pickle without running anything that the pickle names.

A pickle is a small program, and the ordinary unpickler calls whatever it names. A partition file comes from anywhere,
so this reader is an interpreter of its own that has no way to call: containers, numbers and strings are built, the few
numpy names are recognised and their bytes decoded here, every other name is refused. numpy itself only sees
`np.frombuffer` on bytes whose type is checked, so no shape or item size in the file can make it allocate.
"""

import codecs
import io
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np


class RefusedPickleError(ValueError):
    """The pickle names something that is not plain data. `what` says what, in one short printable line."""

    def __init__(self, what: str) -> None:
        self.what = ascii(what)[1:-1][:80]  # the name is the file's: no line breaks, no terminal codes
        super().__init__(self.what)


class _Name(NamedTuple):
    """A recognised name: a token on the stack, never called or imported."""

    name: str


class _ElementType(NamedTuple):
    """A numpy dtype by its code ("i8", "S26", "U26", "O8") and byte order."""

    code: str
    byte_order: list[str]  # a list of one, for BUILD sets it after the memo holds the tuple


class _Array(list[Any]):
    """A one-dimensional numpy array, as a list; BUILD fills it after the memo holds it."""


_NAMES = {
    **dict.fromkeys([("numpy", "ndarray")], "ndarray"),
    **dict.fromkeys([("numpy", "dtype")], "dtype"),
    **dict.fromkeys([(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")], "array"),
    **dict.fromkeys([(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")], "scalar"),
    **dict.fromkeys([(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")], "from_buffer"),
    **dict.fromkeys([("_codecs", "encode")], "encode"),  # how protocol 2 writes the bytes of Python 3
    **dict.fromkeys([(module, "set") for module in ("__builtin__", "builtins")], "set"),
    **dict.fromkeys([(module, "frozenset") for module in ("__builtin__", "builtins")], "frozenset"),
    **dict.fromkeys([("collections", "OrderedDict")], "dict"),
}


def load_plain(content: bytes) -> Any:
    """The value in a pickle of any protocol: containers, numbers, strings, and numpy arrays and scalars as these.

    Byte strings that Python 2 wrote, and numpy byte strings, become `str`; numpy arrays (0 or 1 dimension) lists.
    Raises RefusedPickleError when it names anything else, ValueError when it is cut off or no pickle. Nothing runs.
    """
    machine = _Machine()
    file = io.BytesIO(content)
    try:
        while (instruction := _next_instruction(file))[0] != "STOP":
            machine.step(*instruction)
        return machine.stack.pop()
    except RefusedPickleError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError("cut off, or no pickle") from error


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


def _next_instruction(file: io.BytesIO) -> tuple[str, Any]:
    """The next (opcode name, argument); ValueError at the end of the file."""
    opcode = _OPCODES.get(file.read(1).decode("latin-1"))
    if opcode is None:
        raise ValueError("no pickle instruction")
    if opcode.name == "STRING":  # pickletools takes ASCII only; the arrays of protocol 0 are any bytes
        return opcode.name, _quoted_line(file.readline())
    return opcode.name, opcode.arg.reader(file) if opcode.arg else None


def _quoted_line(line: bytes) -> str:
    if len(line) < 3 or line[-1:] != b"\n" or line[:1] not in (b"'", b'"') or line[:1] != line[-2:-1]:
        raise ValueError("no quoted string")
    return codecs.escape_decode(line[1:-2])[0].decode("latin-1")


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack machine of a pickle, without its calls. Wrong programs end in LookupError, TypeError or ValueError."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _NEW:
            self.stack.append(_NEW[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self.pop(_TUPLES[name])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "INST"):  # INST would also call it; no recognised name is written so
            self.push_name(*argument.split(" ", 1))
            if name == "INST":
                raise RefusedPickleError("the instruction INST")
        elif name not in ("PROTO", "FRAME"):
            handler = _HANDLERS.get(name)
            if handler is None:
                raise RefusedPickleError(f"the instruction {name}")
            handler(self)

    def pop(self, count: int) -> list[Any]:
        """The last `count` values, taken off the stack."""
        if count > len(self.stack):
            raise IndexError("stack underflow")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def push_name(self, module: str, name: str) -> None:
        if (module, name) not in _NAMES:
            raise RefusedPickleError(f"{module}.{name}")
        self.stack.append(_Name(_NAMES[module, name]))

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def stack_global(self) -> None:
        self.push_name(*self.pop(2))

    def append(self) -> None:
        self.extend_list(self.pop(1))

    def appends(self) -> None:
        self.extend_list(self.pop_to_mark())

    def extend_list(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("no list to append to")
        self.stack[-1].extend(values)

    def set_item(self) -> None:
        self.update_dict(self.pop(2))

    def set_items(self) -> None:
        self.update_dict(self.pop_to_mark())

    def update_dict(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("no dict to set items of")
        self.stack[-1].update(zip(_keys(values[0::2]), values[1::2], strict=True))

    def add_items(self) -> None:
        values = self.pop_to_mark()
        if not isinstance(self.stack[-1], set):
            raise TypeError("no set to add to")
        self.stack[-1].update(_keys(values))

    def list_from_mark(self) -> None:
        self.stack.append(self.pop_to_mark())

    def tuple_from_mark(self) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def dict_from_mark(self) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.update_dict(values)

    def frozenset_from_mark(self) -> None:
        self.stack.append(frozenset(_keys(self.pop_to_mark())))

    def reduce(self) -> None:
        maker, arguments = self.pop(2)
        if not isinstance(maker, _Name) or maker.name not in _MAKERS:
            raise RefusedPickleError("the instruction REDUCE on a value")
        self.stack.append(_MAKERS[maker.name](*arguments))

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, _ElementType):
            target.byte_order[0] = state[1]
        elif isinstance(target, _Array):
            _, shape, element_type, _, data = state
            target[:] = _elements(element_type, shape, data)
        else:
            raise RefusedPickleError("the instruction BUILD on a value")


_HANDLERS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "POP": lambda machine: machine.stack.pop(),
    "POP_MARK": lambda machine: machine.pop_to_mark().clear(),
    "DUP": _Machine.duplicate,
    "MEMOIZE": _Machine.memoize,
    "STACK_GLOBAL": _Machine.stack_global,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "LIST": _Machine.list_from_mark,
    "TUPLE": _Machine.tuple_from_mark,
    "DICT": _Machine.dict_from_mark,
    "FROZENSET": _Machine.frozenset_from_mark,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _keys(values: Iterable[Any]) -> list[Any]:
    """The values, when all are hashable at once; hashing tuples of tuples of one tuple can take for ever."""
    keys = list(values)
    if not all(value is None or isinstance(value, str | bytes | int | float) for value in keys):
        raise TypeError("a key is no number or string")
    return keys


def _new_array(*_: Any) -> _Array:
    return _Array()


def _new_element_type(code: Any, *_: Any) -> _ElementType:
    if not isinstance(code, str):
        raise TypeError("no type code")
    return _ElementType(code, ["|"])


def _scalar(element_type: Any, data: Any) -> Any:
    if isinstance(data, str | bytes):
        return _elements(element_type, (1,), data)[0]
    raise TypeError("a numpy scalar without its bytes")


def _from_buffer(data: Any, element_type: Any, shape: Any, *_: Any) -> _Array:
    return _Array(_elements(element_type, shape, data))


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError(f"the encoding {encoding}" if isinstance(encoding, str) else "an encoding")
    return text.encode("latin-1")


_MAKERS: dict[str, Callable[..., Any]] = {
    "array": _new_array,
    "dtype": _new_element_type,
    "scalar": _scalar,
    "from_buffer": _from_buffer,
    "encode": _encode,
    "set": lambda values=(): set(_keys(values)),
    "frozenset": lambda values=(): frozenset(_keys(values)),
    "dict": lambda pairs=(): {_keys([key])[0]: value for key, value in pairs},
}


def _elements(element_type: Any, shape: Any, data: Any) -> list[Any]:
    """The elements of a numpy array from its parts in a pickle; their number must be what the data holds."""
    if not isinstance(element_type, _ElementType) or not isinstance(shape, tuple) or len(shape) > 1:
        raise TypeError("no array of 0 or 1 dimension")
    count = shape[0] if shape else 1
    if re.fullmatch("O[48]?", element_type.code):
        elements = list(data) if isinstance(data, list) else []
    else:
        content = data.encode("latin-1") if isinstance(data, str) else bytes(memoryview(data))
        elements = _decode_elements(element_type, content)
    if len(elements) != count:
        raise ValueError("an array of another length than its data")
    return elements


def _decode_elements(element_type: _ElementType, content: bytes) -> list[Any]:
    code, byte_order = element_type.code, element_type.byte_order[0]
    if not re.fullmatch("b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,3}", code):
        raise RefusedPickleError(f"numpy elements of type {code}")
    if byte_order not in ("<", ">", "|", "="):
        raise ValueError("no byte order")
    swapped_or_not = "" if byte_order in ("|", "=") else byte_order
    elements: list[Any] = np.frombuffer(content, dtype=np.dtype(swapped_or_not + code)).tolist()
    return [element.decode("latin-1") for element in elements] if code[0] == "S" else elements
