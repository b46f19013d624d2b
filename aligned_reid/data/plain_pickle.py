"""Read the plain data in a pickle from an untrusted source; nothing that the pickle names is imported or called.

The base class is pickle's Python unpickler. The C one would allocate its memo by the largest index in the file, and
hash any key: the hash of nested tuples can take forever.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

MAX_BYTES = 2**28  # partitions of three million images take about this much


class RefusedPickleError(ValueError):
    """The pickle contains something other than plain data; the message says what, in one short printable line."""

    def __init__(self, what: str) -> None:
        super().__init__(ascii(what)[1:-1][:80])  # the text is from the file: no line breaks, no terminal codes


def load_plain(content: bytes) -> Any:
    """The value in a pickle of any protocol: containers, numbers, strings, and numpy arrays and scalars as these.

    Python 2's strings and numpy's byte strings become `str`; numpy arrays (0 or 1 dimension) become lists. Raises
    RefusedPickleError if the pickle names anything else, ValueError if it is too large, cut off or not a pickle.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**20} MB")
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except RefusedPickleError:
        raise
    except Exception as error:  # damaged pickles fail in many ways
        raise ValueError("cut off, or not a pickle") from error


_Unpickler: Any = pickle._Unpickler


def _checking_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """The method of an opcode, after a check of the values on the stack (since the last mark) that it will hash."""

    def load(unpickler: Any) -> None:
        _check_keys(unpickler.stack[keys])
        _Unpickler.dispatch[opcode[0]](unpickler)

    return load


class _PlainUnpickler(_Unpickler):
    """Builds containers, numbers and strings; names become stand-ins."""

    dispatch = {  # noqa: RUF012  # opcode -> method
        **_Unpickler.dispatch,
        pickle.SETITEM[0]: _checking_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _checking_keys(pickle.SETITEMS, slice(0, None, 2)),
        pickle.DICT[0]: _checking_keys(pickle.DICT, slice(0, None, 2)),
        pickle.ADDITEMS[0]: _checking_keys(pickle.ADDITEMS, slice(None)),
        pickle.FROZENSET[0]: _checking_keys(pickle.FROZENSET, slice(None)),
        pickle.BYTEARRAY8[0]: _Unpickler.load_binbytes8,  # a bytearray would be allocated at the length declared
    }

    def find_class(self, module: str, name: str) -> Any:
        maker = _MAKERS.get((re.sub(r"^numpy\._core\b", "numpy.core", module), name))
        if maker is None:
            raise RefusedPickleError(f"{module}.{name}")
        return _StandIn(maker)


def _check_keys(keys: Iterable[Any]) -> list[Any]:
    """The keys, if each is a number, a string or None."""
    keys = list(keys)
    if not all(key is None or isinstance(key, str | bytes | int | float) for key in keys):
        raise TypeError("a key is not a number or string")
    return keys


class _StandIn:
    """What a name becomes: a call of it builds plain data, and nothing in the file can change it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickleError("a change to a name")


class _Array(list[Any]):
    """A numpy array as a list; it is empty until the pickle sets its state."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, element_type, _, data = state
        self[:] = _elements(element_type, shape, data)


class _ElementType:
    """A numpy dtype: its code ("i8", "S26", "U26", "O8") and, once the pickle sets its state, its byte order."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.byte_order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.byte_order = state[1]


def _elements(element_type: Any, shape: Any, data: Any) -> list[Any]:
    """The elements of an array; their number must be what the data holds, so no shape can allocate memory."""
    if not isinstance(element_type, _ElementType) or not isinstance(shape, tuple) or len(shape) > 1:
        raise TypeError("not an array of 0 or 1 dimension")
    code, byte_order = element_type.code, element_type.byte_order
    if re.fullmatch("O[48]?", code):
        elements = list(data) if isinstance(data, list) else []
    elif not re.fullmatch("b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,3}", code):
        raise RefusedPickleError(f"numpy elements of type {code}")
    elif byte_order not in ("<", ">", "|", "="):
        raise ValueError("not a byte order")
    else:
        content = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
        elements = np.frombuffer(content, dtype=np.dtype(byte_order.replace("|", "=") + code)).tolist()
        if code[0] == "S":
            elements = [element.decode("latin1") for element in elements]
    if len(elements) != (shape[0] if shape else 1):
        raise ValueError("the length of an array is not that of its data")
    return elements


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError(f"the encoding {encoding}")
    return text.encode("latin1")


_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,  # only named, as an argument of _reconstruct
    ("numpy", "dtype"): _ElementType,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): lambda element_type, data: _elements(element_type, (1,), data)[0],
    ("numpy.core.numeric", "_frombuffer"): lambda data, element_type, shape, *_: _Array(
        _elements(element_type, shape, data)
    ),
    ("_codecs", "encode"): _encode,  # protocol 2 writes Python 3's bytes with it
    ("collections", "OrderedDict"): lambda pairs=(): {_check_keys([key])[0]: value for key, value in pairs},
}
for _module in ("builtins", "__builtin__"):
    _MAKERS[_module, "set"] = lambda values=(): set(_check_keys(values))
    _MAKERS[_module, "frozenset"] = lambda values=(): frozenset(_check_keys(values))
