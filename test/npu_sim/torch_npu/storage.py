"""Checkpoints: torch.save and torch.load of npu storages, and their copies."""

import torch

from torch_npu.memory import storage_bytes, to_device
from torch_npu.npu import index_of


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
