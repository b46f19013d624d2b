"""Read plain data from an untrusted pickle; nothing that the pickle names is imported or called.

The base class is pickle's Python unpickler: the C one allocates its memo by the largest index in the file.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_BYTES = 2**28  # enough for the partitions of three million images


class RefusedPickleError(ValueError):
    """The pickle contains something other than plain data; the message says what, in one short printable line."""

    def __init__(self, what: str) -> None:
        super().__init__(ascii(what)[1:-1][:80])  # the text is from the file: no line breaks, no terminal codes


def load_plain(content: bytes) -> Any:
    """The value in a pickle of any protocol: containers, numbers, strings, and numpy arrays and scalars as these.

    Tuples and numpy arrays (of 0 or 1 dimension) become lists; Python 2's strings and numpy's byte strings become str.
    Raises RefusedPickleError if the pickle names anything else, ValueError if it is too large, cut off or not a pickle.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**20} MB")
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except RefusedPickleError:
        raise
    except Exception as error:  # damaged pickles fail in many ways
        raise ValueError("cut off, or not a pickle") from error


class _Array(list[Any]):
    """A numpy array as a list; it is empty until the pickle sets its state."""

    def set_state(self, _: Any, shape: Any, element_type: Any, __: Any, data: Any) -> None:
        self[:] = _elements(element_type, shape, data)


class _ElementType:
    """A numpy dtype: its code ("i8", "S26", "U26", "O8") and, once the pickle sets its state, its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.byte_order = code, "|"

    def set_state(self, _: Any, byte_order: Any, *__: Any) -> None:
        self.byte_order = byte_order


def _elements(element_type: _ElementType, shape: list[int], data: Any) -> list[Any]:
    """The elements of an array; their number must be that in the data, so that no shape allocates memory."""
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
    if [len(elements)] != (shape or [1]):
        raise ValueError("not an array of 0 or 1 dimension, or of another length than its data")
    return elements


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError(f"the encoding {encoding}")
    return text.encode("latin1")


# Stand-ins for the names in pickles of plain data, called with the arguments in the file.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,  # only as an argument of _reconstruct
    "numpy.dtype": _ElementType,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": lambda element_type, data: _elements(element_type, [1], data)[0],
    "numpy.core.numeric._frombuffer": lambda data, element_type, shape, *_: _elements(element_type, shape, data),
    "_codecs.encode": _encode,  # protocol 2 writes Python 3's bytes with it
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "collections.OrderedDict": dict,
}
_Unpickler: Any = pickle._Unpickler


def _load_list(length: int) -> Callable[[Any], None]:
    """The method of an opcode that replaces the last values on the stack with a list of them."""

    def load(unpickler: Any) -> None:
        unpickler.stack[-length:] = [unpickler.stack[-length:]]

    return load


def _load_build(unpickler: Any) -> None:
    """Set the state of an array or an element type; nothing else has the method."""
    state = unpickler.stack.pop()
    unpickler.stack[-1].set_state(*state)


class _PlainUnpickler(_Unpickler):
    dispatch = {  # noqa: RUF012  # opcode -> method
        **_Unpickler.dispatch,
        # Lists in place of tuples, as a key of nested tuples can take forever to hash.
        pickle.EMPTY_TUPLE[0]: _Unpickler.load_empty_list,
        pickle.TUPLE[0]: _Unpickler.load_list,
        pickle.TUPLE1[0]: _load_list(1),
        pickle.TUPLE2[0]: _load_list(2),
        pickle.TUPLE3[0]: _load_list(3),
        pickle.BUILD[0]: _load_build,
        pickle.BYTEARRAY8[0]: _Unpickler.load_binbytes8,  # a bytearray would be allocated at the length declared
    }

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module.replace("numpy._core.", "numpy.core."))
        if f"{module}.{name}" not in _STAND_INS:
            raise RefusedPickleError(f"{module}.{name}")
        return _STAND_INS[f"{module}.{name}"]
