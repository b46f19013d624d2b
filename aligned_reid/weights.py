"""Weight files: ours, the reference's, bare state dicts and ResNet-50 trunks; untrusted, so read with weights_only."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import urllib.error
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from aligned_reid.errors import InputError

CHECKPOINT_NAME = "ckpt.pth"
PREVIOUS_NAME = "ckpt.previous.pth"  # the one that the newest took the place of
BEST_NAME = "best.pth"
SAFETENSORS_NAME = "model.safetensors"
IMAGENET_URL = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url


def read_weight_file(path: str | os.PathLike[str]) -> Any:
    """The content of a weight file, or of the ckpt.pth in a folder: tensors, numbers, strings and containers of them.

    Of a safetensors file it is {"model": tensors by name, "config": the settings in its metadata}. Raises InputError
    where there is no such file, or it is no weight file, damaged, cut off, or holds anything else.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CHECKPOINT_NAME
    if not file.is_file():
        raise InputError(f"no weight file at {file}")
    try:
        return read_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
    except InputError as error:
        former = file.with_name(PREVIOUS_NAME)
        if file.name != CHECKPOINT_NAME or not former.is_file():
            raise
        raise InputError(f"{error}; the one before it is {former}") from error


def read_torch_file(file: Path) -> Any:
    """What torch.save wrote, its checksums verified. Raises InputError as `read_weight_file` does."""
    if zipfile.is_zipfile(file):  # a cut-off one is none; what torch wrote before 1.6 has no checksums
        check_sums(file)
    try:
        with numpy_scalars_admitted():
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors, numbers and strings, or is cut off"
        if "numpy" in str(error) and not hasattr(torch.serialization, "safe_globals"):
            reason = f"its numpy numbers need torch 2.5 or newer, this is {torch.__version__}"
        raise InputError(f"{file} is no weight file that can be read: {reason}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{file} is no weight file, or it is cut off ({first_line(error)})") from error


def check_sums(path: str | os.PathLike[str]) -> None:
    """Compare every record of a torch file with its CRC-32, which torch.load does not do.

    Raises InputError where one differs, or the file is cut off.
    """
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is damaged or cut off ({first_line(error)})") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of {damaged} is not that of its bytes")


def read_safetensors(file: Path) -> dict[str, Any]:
    """Tensors and settings of a safetensors file. Raises InputError where it is none, or cut off."""
    safetensors = import_safetensors(file)
    try:
        with safetensors.safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            metadata = content.metadata() or {}
            settings = json.loads(metadata.get("config", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{file} is no safetensors file, or it is cut off ({first_line(error)})") from error
    if "digest" in metadata and metadata["digest"] != digest_of(tensors):  # the format has no checksum of its own
        raise InputError(f"{file} is damaged: its tensors are not those that were written; take another copy")
    return {"model": tensors, "config": settings}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write weights for everybody's readers, whole or not at all.

    `settings` go into the metadata as JSON, and with them a digest of the tensors.
    """
    import_safetensors(path)
    from safetensors.torch import save

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(dense, {"format": "pt", "config": json.dumps(settings), "digest": digest_of(dense)})
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def import_safetensors(file: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise InputError(f"{file} needs the package safetensors: pip install safetensors") from error
    return safetensors


@contextlib.contextmanager
def numpy_scalars_admitted() -> Iterator[None]:
    """Let torch.load(weights_only=True) read numpy numbers, which the reference's checkpoints keep their scores in."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch < 2.5
        yield
        return
    scalar = np.float64(0).__reduce__()[0]
    admitted: list[Any] = [
        np.dtype,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]
    admitted += [
        type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
    ]
    with torch.serialization.safe_globals(admitted):
        yield


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's tensors in a weight file, by name, without DDP's `module.` in front."""
    return find_state_dict(read_weight_file(path), str(path))


def settings_of(content: Any) -> dict[str, Any]:
    """The settings of the run that wrote a weight file; empty where it holds none."""
    settings = content.get("config") if isinstance(content, Mapping) else None
    return settings if isinstance(settings, dict) else {}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of a model's tensors by name: the same weights give the same one, whatever file they came from."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """The model's tensors in what a weight file holds.

    Known forms: our checkpoints (`model`), the reference's (`state_dicts`: model first), `state_dict` as others name
    it, and a bare state dict. Raises InputError where none of them is there.
    """
    if isinstance(content, Mapping) and isinstance(content.get("average"), Mapping):
        return dict(content["average"])  # what was tested, where a run keeps the moving average of its weights
    for key in ("model", "state_dict", "state_dicts"):
        if isinstance(content, Mapping) and key in content and not isinstance(content[key], Tensor):
            inner = content[key]
            content = inner[0] if isinstance(inner, (list, tuple)) and inner else inner
            break
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{source} holds no model weights (no tensors by name)")
    if all(name.startswith("module.") for name in tensors) and any(name.startswith("module.base.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def load_trunk(trunk: nn.Module, weights: Mapping[str, Tensor], source: str) -> str:
    """Copy the ResNet-50 in `weights` into `trunk`, whatever prefix its names have; returns a line that says so.

    Raises InputError where a tensor of the trunk is missing (num_batches_tracked aside) or has another shape.
    """
    own = trunk.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    prefixes = {name.removesuffix("conv1.weight") for name in weights if name.endswith("conv1.weight")}
    prefix = max(sorted(prefixes), key=lambda one: sum(one + name in weights for name in needed), default="")
    missing = [name for name in needed if prefix + name not in weights]
    if missing:
        raise InputError(
            f"{source} holds no whole ResNet-50: {len(missing)} of {len(needed)} tensors are missing, "
            f"the first is {prefix}{missing[0]}"
        )
    for name in needed:
        if weights[prefix + name].shape != own[name].shape:
            theirs, ours = tuple(weights[prefix + name].shape), tuple(own[name].shape)
            raise InputError(f"{source}: {prefix}{name} has shape {theirs}, the model's ResNet-50 has {ours}")
    trunk.load_state_dict({name: weights[prefix + name] for name in own if prefix + name in weights}, strict=False)
    loaded = f"{len(needed)} of {len(needed)} tensors loaded from {source}"
    return f"trunk: {loaded}" + (f" (names behind {prefix!r})" if prefix not in ("", "base.") else "")


def imagenet_file() -> Path:
    """Where torch.hub keeps torchvision's ImageNet weights of ResNet-50."""
    return Path(torch.hub.get_dir(), "checkpoints", IMAGENET_URL.rsplit("/", 1)[1])


def read_imagenet_weights() -> dict[str, Tensor]:
    """torchvision's ImageNet weights of ResNet-50, from torch.hub's folder, downloaded there when they are missing.

    Raises InputError where they can be neither found nor downloaded: it says which file to put where.
    """
    file = imagenet_file()
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET_URL, str(file), hash_prefix="0676ba61", progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"--pretrained imagenet: cannot download {IMAGENET_URL} ({first_line(error)}): put it at {file}, "
                "or use --pretrained <file with ResNet-50 weights> or --pretrained none"
            ) from error
    return read_state_dict(file)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
