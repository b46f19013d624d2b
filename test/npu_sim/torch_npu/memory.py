"""One piece of host memory seen as a CPU tensor or as an npu tensor.

A DLPack capsule carries a tensor's address, shape, strides and device. Changing the device in it before it is read back
gives a tensor of the other device on the same memory: nothing is copied, no C++ is needed.
"""

import ctypes

import torch

from torch_npu.npu import index_of

KDL_CPU, KDL_EXT_DEV = 1, 12  # DLPack's names of a CPU, and of what torch calls PrivateUse1
DEVICE_OFFSET = ctypes.sizeof(ctypes.c_void_p)  # DLTensor { void* data; { int32 type, int32 index } device; ... }

_address_in = ctypes.pythonapi.PyCapsule_GetPointer
_address_in.restype, _address_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor on an npu tensor's memory."""
    return _relabelled(tensor.detach() if tensor.requires_grad else tensor, KDL_CPU, 0)


def to_device(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """The npu tensor on a CPU tensor's memory."""
    return _relabelled(tensor, KDL_EXT_DEV, index)


def storage_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage's memory as a uint8 CPU tensor, which keeps the storage alive."""
    if storage.nbytes() == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    memory.owner = storage
    return torch.frombuffer(memory, dtype=torch.uint8)


def _relabelled(tensor: torch.Tensor, kind: int, index: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor)
    device = (ctypes.c_int32 * 2).from_address(_address_in(capsule, b"dltensor") + DEVICE_OFFSET)
    device[:] = [kind, index]
    return torch._C._from_dlpack(capsule)


# ---- checkpoints: torch.save and torch.load of npu storages, and their copies


def register() -> None:
    torch.serialization.register_package(1, _tag, _restore)
    torch.storage._StorageBase.clone = _clone  # type: ignore[method-assign]


def _tag(storage: torch.UntypedStorage) -> str | None:
    return f"npu:{storage.device.index or 0}" if storage.device.type == "npu" else None


def _restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    if not location.startswith("npu"):
        return None
    return to_device(storage_bytes(storage).clone(), index_of(location)).untyped_storage()


_host_clone = torch.storage._StorageBase.clone


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage | None:
    """torch's own makes an UntypedStorage(n, device="npu"), for which there is no allocator."""
    return _restore(storage, _tag(storage) or "") if storage.device.type == "npu" else _host_clone(storage)
