"""Weight files, our own and those of other projects; untrusted, so read with weights_only (docs/weights.md)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.error
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from aligned_reid.errors import InputError

CHECKPOINT_NAME = "ckpt.pth"
PREVIOUS_NAME = "ckpt.previous.pth"  # the one that the newest took the place of
BEST_NAME = "best.pth"
SAFETENSORS_NAME = "model.safetensors"
IMAGENET_URL = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url

STATE_DICT_KEYS = ("model", "state_dict", "state_dicts", "model_state_dict", "net")
# Files that people take for weight files, by their first bytes: what they are, and what to do.
OTHER_FORMATS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository",
    b"<": "is a web page, not the weights: open the link in a browser and download the file itself",
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!"), "is compressed: unpack it first"),
    b"\x89HDF": "is an HDF5 file, not one of torch: convert it in the project that wrote it",
    b"\x08": "looks like an ONNX graph: give the weight file that it was exported from",
}
# Classes that checkpoints keep settings and scores in. They are not needed, and nothing of theirs is called.
UNREAD_CLASSES = (
    *("argparse.Namespace", "numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "numpy._core.numeric._frombuffer"),
)
TRUNK_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # torchvision's, in order
# The layers of a residual network by the blocks of its stages; with two convolutions in a block, 50 is 34.
DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def read_weight_file(path: str | os.PathLike[str]) -> Any:
    """The content of a weight file, or of the ckpt.pth in a folder: tensors, numbers, strings and containers of them.

    Of a safetensors file it is {"model": tensors by name}, with "config" and "trained_on" from its metadata. The
    content tells the format, not the file's name. Raises InputError if the file is missing, damaged, cut off, or
    something else.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CHECKPOINT_NAME
    if not file.is_file():
        raise InputError(f"no weight file at {file}: give a weight file, or a folder that holds {CHECKPOINT_NAME}")
    try:
        head = first_bytes(file)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:  # the length of the JSON that follows
            return read_safetensors(file)
        if other := other_format(head):
            raise InputError(f"{file} {other}")
        if head.startswith(b"PK"):  # what torch wrote before 1.6 is no zip and has no checksums
            check_zip(file)
        return read_torch_file(file)
    except InputError as error:
        former = file.with_name(PREVIOUS_NAME)
        if file.name != CHECKPOINT_NAME or not former.is_file():
            raise
        raise InputError(f"{error}; the one before it is {former}") from error


def first_bytes(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(512)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def other_format(head: bytes) -> str:
    """What a file is that begins with `head`, and what to do about it; empty if it may be one of torch."""
    if not head:
        return "is empty: download or copy it again"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first; if torch 0.1 wrote it, save its tensors again with a newer torch"
    visible = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    return next((what for start, what in OTHER_FORMATS.items() if visible.startswith(start)), "")


def read_torch_file(file: Path) -> Any:
    """What torch.save wrote, under Python 3 or 2. Raises InputError as `read_weight_file` does."""
    try:
        with classes_left_unread(), open(file, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, which says that it ignores `encoding`, and does not
            return torch.load(opened, map_location="cpu", weights_only=True, encoding="latin1")
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__
        if "numpy" in reason and not hasattr(torch.serialization, "safe_globals"):
            raise InputError(f"{file} holds numpy values: it needs torch 2.5, this is {torch.__version__}") from error
        if found := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", reason):
            raise InputError(
                f"{file} holds an object of {printable(found[1])}, which cannot be read without running code: "
                "in the project that wrote it, save the tensors alone, by torch.save(model.state_dict(), ...)"
            ) from error
        raise InputError(f"{file} is not a weight file, or it is damaged or cut off ({first_line(reason)})") from error


def check_zip(path: str | os.PathLike[str]) -> None:
    """Compare every record of a torch file with its CRC-32, which torch.load does not do.

    Raises InputError if one differs, if the file is cut off, or if torch.save did not write it.
    """
    try:
        with zipfile.ZipFile(path) as records:
            names = {name.rpartition("/")[2] for name in records.namelist()}
            damaged = records.testzip()
    except Exception as error:  # so can a damaged zip
        raise InputError(f"{path} is damaged or cut off ({first_line(error)})") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of {printable(damaged)} does not match its bytes")
    if "constants.pkl" in names:
        raise InputError(f"{path} is a TorchScript program: save its tensors by torch.save(model.state_dict(), ...)")
    if "data.pkl" not in names:
        raise InputError(f"{path} is a zip archive that torch.save did not write: unpack it and give the file within")


def read_safetensors(file: Path) -> dict[str, Any]:
    """Tensors and settings of a safetensors file. Raises InputError if it is damaged or cut off."""
    safetensors = import_safetensors(file)
    try:
        with safetensors.safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            metadata = content.metadata() or {}
            settings, trained_on = (json.loads(metadata.get(name, "{}")) for name in ("config", "trained_on"))
    except Exception as error:  # SafetensorError, and what a damaged header leads torch and json to
        raise InputError(f"{file} is a damaged or cut off safetensors file ({first_line(error)})") from error
    if "digest" in metadata and metadata["digest"] != digest_of(tensors):  # the format has no checksum of its own
        raise InputError(f"{file} is damaged: its tensors are not those that were written; take another copy")
    return {"model": tensors, "config": settings, "trained_on": trained_on}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    trained_on: Mapping[str, list[str]] | None = None,
) -> None:
    """Write weights for everybody's readers, whole or not at all.

    The metadata hold `settings` and `trained_on` (see data.identities) as JSON, and a digest of the tensors.
    """
    import_safetensors(path)
    from safetensors.torch import save

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"config": json.dumps(settings), "trained_on": json.dumps(trained_on or {})}
    content = save(dense, {"format": "pt", **metadata, "digest": digest_of(dense)})
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


class Unread:
    """Stands for an object in a weight file that is not needed: takes what it is made from and keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@contextlib.contextmanager
def classes_left_unread() -> Iterator[None]:
    """Let torch.load(weights_only=True) read files with objects of UNREAD_CLASSES, each an `Unread` in their place."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch < 2.5
        yield
        return
    names = [name.rpartition(".") for name in UNREAD_CLASSES]
    with torch.serialization.safe_globals([type(name, (Unread,), {"__module__": module}) for module, _, name in names]):
        yield


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's tensors in a weight file, as `find_state_dict` names them."""
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
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """The model's tensors in what a weight file holds, named as `plain_names` does.

    Known forms: the moving average that a run tested, our checkpoints (`model`), the reference's (`state_dicts`: model
    first), the keys that other projects use, and a bare state dict. Raises InputError, which lists the file's keys, if
    none of them is there.
    """
    if isinstance(content, Mapping):
        for key in ("average", *STATE_DICT_KEYS):
            inner = content.get(key)
            if tensors := tensors_of(inner[0] if isinstance(inner, (list, tuple)) and inner else inner):
                return plain_names(tensors)
        if tensors := tensors_of(content):
            return plain_names(tensors)
        keys = ", ".join(printable(str(key)) for key in list(content)[:8]) or "none"
        found = f"its keys are: {keys}; save the state dict alone, or under one of: {', '.join(STATE_DICT_KEYS)}"
    else:
        found = f"it holds an object of type {type(content).__name__}"
    raise InputError(f"{source} holds no model weights: {found}")


def tensors_of(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names: without what wrappers put in front of `base.` (`module.`, `_orig_mod.`, `model.`).

    The parts of a trunk that was taken as a sequence, without names, get theirs: `base.4.` is `base.layer1.`.
    """
    block = "4.0.conv1.weight"
    sequences = {name.removesuffix(block) for name in tensors if name.endswith(block)}
    for sequence in sequences:
        for position, part in enumerate(TRUNK_PARTS if sequence + "0.weight" in tensors else ()):
            start = f"{sequence}{position}."
            tensors = {
                f"{sequence}{part}.{name.removeprefix(start)}" if name.startswith(start) else name: value
                for name, value in tensors.items()
            }
    outers = [found[1] for name in tensors if (found := re.fullmatch(r"(|.*\.)base\.conv1\.weight", name))]
    outer = min(outers, default="")
    return {name.removeprefix(outer): value for name, value in tensors.items()}


def load_trunk(trunk: nn.Module, weights: Mapping[str, Tensor], source: str) -> str:
    """Copy the ResNet-50 in `weights` into `trunk`, whatever prefix its names have.

    Returns a line that says so, and which tensors of `weights` were not loaded. Raises InputError, which names the
    network in the file, if a tensor of the trunk is missing (num_batches_tracked aside) or has another shape, or if the
    file's trunk has tensors that a ResNet-50 does not have.
    """
    own = trunk.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    prefix = find_trunk(weights, needed)
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if misfit := find_misfit(found, own, needed, prefix):
        network = network_of(found)
        held = f"{network}, not ResNet-50" if network not in ("", "ResNet-50") else "no whole ResNet-50"
        others = f"; it has {list_parts(weights)}" if not any(name in found for name in needed) else ""
        raise InputError(f"{source} holds {held}: {misfit}{others}")
    trunk.load_state_dict({name: found[name] for name in own if name in found}, strict=False)
    taken = {prefix + name for name in own}
    others = list_parts([name for name in weights if name not in taken], prefix)
    return (
        f"trunk: {len(needed)} of {len(needed)} tensors loaded from {source}"
        + (f" (names behind {prefix!r})" if prefix not in ("", "base.") else "")
        + (f", not loaded: {others}" if others else "")
    )


def find_trunk(weights: Mapping[str, Tensor], needed: list[str]) -> str:
    """What stands in front of the trunk's names in a file: the prefix that finds most of the `needed`."""
    ends = ("layer1.0.conv1.weight", "conv1.weight")
    prefixes = {name.removesuffix(end) for end in ends for name in weights if name.endswith(end)}
    return max(sorted(prefixes), key=lambda prefix: sum(prefix + name in weights for name in needed), default="")


def find_misfit(found: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: list[str], prefix: str) -> str:
    """Why the tensors `found` behind `prefix` are not those of the trunk; empty if they are."""
    missing = [name for name in needed if name not in found]
    if missing:
        return f"{len(missing)} of {len(needed)} tensors are missing, the first is {printable(prefix + missing[0])}"
    for name in (name for name in own if name in found and not fits(found[name], own[name])):
        theirs, ours = tuple(found[name].shape), tuple(own[name].shape)
        return f"{printable(prefix + name)} has shape {theirs} ({found[name].type()}), the trunk's has {ours}"
    parts = {name.split(".")[0] for name in own}  # a head may stand beside them, behind the same prefix
    surplus = [name for name in found if name.split(".")[0] in parts and name not in own]
    if surplus:
        return f"tensors that ResNet-50 does not have: {len(surplus)}, the first is {printable(prefix + surplus[0])}"
    return ""


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a file's tensor can take the place of a model's: same shape, numbers of the same kind, dense."""
    same_kind = tensor.is_floating_point() == own.is_floating_point()
    return tensor.shape == own.shape and same_kind and tensor.layout == torch.strided and not tensor.is_meta


def network_of(tensors: Mapping[str, Tensor]) -> str:
    """The residual network that tensors of torchvision's names belong to, as "SE-ResNet-101"; empty if unknown."""
    stages = [{name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    depth = DEPTHS.get(tuple(len(blocks) for blocks in stages))
    middle = tensors.get("layer1.0.conv2.weight")
    if depth is None or middle is None or middle.dim() != 4:
        return ""
    if depth == 50 and "layer1.0.conv3.weight" not in tensors:
        depth = 34
    family = "ResNet"
    if middle.shape[0] != middle.shape[1]:
        family = "ResNeXt"  # convolutions in groups
    elif middle.shape[0] != 64:
        family = "Wide ResNet"
    squeezed = any(".se_module." in name or ".se." in name for name in tensors)
    normed = any(".IN." in name for name in tensors)
    return f"{'SE-' if squeezed else ''}{family}-{depth}{'-IBN' if normed else ''}"


def list_parts(names: Iterable[str], prefix: str = "") -> str:
    """The parts of a network that tensors belong to, as "neck, fc.bias", at most 8; they are named beside `prefix`."""
    trunk = prefix.split(".")[:-1]
    members: dict[str, list[str]] = {}
    for name in names:
        path = name.split(".")
        members.setdefault(".".join(path[: len(os.path.commonprefix([path, trunk])) + 1]), []).append(name)
    parts = [printable(part if len(inside) > 1 else inside[0]) for part, inside in members.items()]
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")


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


def first_line(error: BaseException | str) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 160)


def printable(text: str, length: int = 80) -> str:
    """Text that a file chose, short and without line breaks and terminal codes."""
    return ascii(text)[1:-1][:length]
