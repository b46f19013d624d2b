"""Read plain data from an untrusted pickle; nothing that the pickle names is imported or called.

The base class is pickle's Python unpickler: the C one allocates its memo by the largest index in the file.
"""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aligned_reid.errors import InputError

MAX_BYTES = 2**28  # enough for the partitions of three million images


def load_plain(path: str | Path) -> Any:
    """The value in a pickle of any protocol: containers, numbers, strings, and numpy arrays and scalars as these.

    Tuples and numpy arrays become lists, arrays without their shape; Python 2's strings become str. Raises InputError
    if the file cannot be read, is too large, cut off or not a pickle, or names anything else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES // 2**20} MB; prepare the data again")
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except InputError as error:
        raise InputError(f"{path} contains {error}") from error
    except Exception as error:  # damaged pickles fail in many ways
        raise InputError(f"{path} is cut off, or not a pickle of plain data; prepare the data again") from error


class _Array(list[Any]):
    """A numpy array as a flat list, which is empty until the pickle sets its state."""

    def set_state(self, _version: Any, _shape: Any, element_type: Any, _is_fortran: Any, data: Any) -> None:
        self[:] = _elements(element_type, data)


class _ElementType:
    """A numpy dtype: its code ("i8", "S26", "U26", "O8") and, once the pickle sets its state, its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "<"

    def set_state(self, _version: Any, order: Any, *_: Any) -> None:
        self.order = ">" if order == ">" else "<"


def _elements(element_type: _ElementType, data: Any) -> list[Any]:
    """The elements of an array; only its data decide how many, so that no shape allocates memory."""
    if element_type.code.startswith("O") and isinstance(data, list):
        return data
    if not re.fullmatch("b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,3}", element_type.code):
        raise ValueError("not a type of plain elements")
    content = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(content, element_type.order + element_type.code).tolist()


# Stand-ins for the names in pickles of plain data, called with the arguments in the file.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,  # only as an argument of _reconstruct
    "numpy.dtype": _ElementType,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": lambda element_type, data: _elements(element_type, data)[0],
    "numpy.core.numeric._frombuffer": lambda data, element_type, *_: _elements(element_type, data),
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # Python 3's bytes in protocol 2
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
            name = ascii(f"{module}.{name}")[1:-1][:80]  # from the file: no line breaks, no terminal codes
            raise InputError(f"{name}, which is not plain data: nothing in it was run; use a file that you trust")
        return _STAND_INS[f"{module}.{name}"]
