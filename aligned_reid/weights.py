"""Weight files, our own and those of other projects: untrusted, so read with weights_only (docs/weights.md)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.error
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from aligned_reid.errors import InputError
from aligned_reid.files import replacing

CHECKPOINT_NAME = "ckpt.pth"
PREVIOUS_NAME = "ckpt.previous.pth"  # the checkpoint that the newest one replaced
BEST_NAME = "best.pth"
SAFETENSORS_NAME = "model.safetensors"
RESULTS_NAME = "results.json"
METADATA = ("config", "trained_on", "verification")  # what a safetensors file of ours holds besides tensors, as JSON
IMAGENET_URL = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url

STATE_DICT_KEYS = ("model", "state_dict", "state_dicts", "model_state_dict", "net")
ARCHIVE = "is an archive, not the weights: unpack it and use the file inside"
# First bytes of files that users mistake for weight files: what the file is, and what to do.
OTHER_FORMATS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository",
    b"<": "is a web page, not the weights: open the link in a browser and download the file itself",
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!"), ARCHIVE),
    b"\x08": "looks like an ONNX graph: use the weight file that it was exported from",
}
# Classes of settings and scores in checkpoints of other projects; skipped when reading, without calling their code.
SKIPPED_CLASSES = (
    *("argparse.Namespace", "numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "numpy._core.numeric._frombuffer"),
)
TRUNK_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # torchvision's, in order
# Depth by the number of blocks in each stage; with two convolutions per block, 50 means 34.
DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def read_weight_file(path: str | os.PathLike[str]) -> Any:
    """Read a weight file, or the ckpt.pth in a folder: tensors, numbers, strings and containers of them.

    The content determines the format, not the name. A safetensors file gives {"model": tensors by name} with "config",
    "trained_on" and "verification" from its metadata, empty if it has none. Raises InputError if the file is missing,
    damaged or in another format.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CHECKPOINT_NAME
    if not file.is_file():
        raise InputError(f"no weight file at {file}: give a weight file or a folder with {CHECKPOINT_NAME}")
    try:
        with open(file, "rb") as opened:
            head = opened.read(512)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:  # the size of the JSON header
            content: Any = read_safetensors(file)
        else:
            check_torch_file(file, head)
            content = read_torch_file(file)
    except (InputError, OSError) as error:
        message = f"cannot read {file}: {error.strerror}" if isinstance(error, OSError) else str(error)
        previous = file.with_name(PREVIOUS_NAME)
        if file.name == CHECKPOINT_NAME and previous.is_file():
            message += f"; the one before it is {previous}"
        raise InputError(message) from error
    if isinstance(content, dict):  # other projects may use the same names
        for name in METADATA:
            if not isinstance(content.get(name, {}), dict):
                del content[name]
    return content


def check_torch_file(file: Path, head: bytes) -> None:
    """Raise InputError if a file, which starts with `head`, is in another format, cut off, or has a wrong checksum.

    torch.load does not compare checksums. Files written by torch before 1.6 are not zip archives and have none.
    """
    if head[257:262] == b"ustar":
        raise InputError(f"{file} {ARCHIVE}")
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    for start, description in OTHER_FORMATS.items():
        if text.startswith(start):
            raise InputError(f"{file} {description}")
    if not head.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(file) as records:
            names = {name.rpartition("/")[2] for name in records.namelist()}
            damaged = records.testzip()
    except Exception as error:  # a damaged zip archive can raise anything
        raise InputError(f"{file} is damaged or cut off ({first_line(error)})") from error
    if damaged is not None:
        raise InputError(f"{file} is damaged: the checksum of {printable(damaged)} does not match")
    if "constants.pkl" in names:
        raise InputError(f"{file} is a TorchScript program: save its tensors by torch.save(model.state_dict(), ...)")
    if "data.pkl" not in names:
        raise InputError(f"{file} {ARCHIVE}")


def read_torch_file(file: Path) -> Any:
    """Read a file written by torch.save under Python 3 or 2. Raises InputError as `read_weight_file` does."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # new in torch 2.5
    try:
        with open(file, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wrongly warns that it ignores `encoding`
            with safe_globals(skipped_classes()) if safe_globals else contextlib.nullcontext():
                return torch.load(opened, map_location="cpu", weights_only=True, encoding="latin1")
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__
        if "numpy" in reason and safe_globals is None:
            raise InputError(f"{file} holds numpy values: it needs torch 2.5, this is {torch.__version__}") from error
        if found := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", reason):
            raise InputError(
                f"{file} holds an object of {printable(found[1])}, which cannot be read without running code: "
                "in the project that wrote it, save only the tensors, by torch.save(model.state_dict(), ...)"
            ) from error
        raise InputError(f"{file} is not a weight file, or it is damaged or cut off ({first_line(reason)})") from error


def skipped_classes() -> list[type]:
    """Stand-ins for SKIPPED_CLASSES, which ignore their arguments and state."""

    def ignore(*_: Any) -> None:
        pass

    names = (name.rpartition(".") for name in SKIPPED_CLASSES)
    members = {"__init__": ignore, "__setstate__": ignore}
    return [type(name, (), {"__module__": module, **members}) for module, _, name in names]


def read_safetensors(file: Path) -> dict[str, Any]:
    """Read tensors and settings of a safetensors file. Raises InputError if it is damaged or cut off."""
    try:
        with safetensors.safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
            metadata = content.metadata() or {}
            entries = {name: json.loads(metadata.get(name, "{}")) for name in METADATA}
    except Exception as error:  # SafetensorError, or what torch and json raise for a damaged header
        raise InputError(f"{file} is a damaged or cut off safetensors file ({first_line(error)})") from error
    if "digest" in metadata and metadata["digest"] != digest_of(tensors):  # the format itself has no checksum
        raise InputError(f"{file} is damaged: the checksum of its tensors does not match; use another copy")
    return {"model": tensors, **entries}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    trained_on: Mapping[str, list[str]] | None = None,
    verification: Mapping[str, Any] | None = None,
) -> None:
    """Write weights as safetensors; the file is complete or not written at all.

    Stores `settings`, `trained_on` (see data.identities) and `verification` (see evaluation.verification) as JSON in
    the metadata, and a digest of the tensors.
    """
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = (settings, trained_on or {}, verification or {})
    metadata = {name: json.dumps(entry) for name, entry in zip(METADATA, entries, strict=True)}
    content = safetensors.torch.save(dense, {"format": "pt", **metadata, "digest": digest_of(dense)})
    with replacing(path, durable=True) as file:
        file.write(content)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the model's tensors from a weight file, named as by `find_state_dict`."""
    return find_state_dict(read_weight_file(path), str(path))


def settings_of(content: Any) -> dict[str, Any]:
    """The settings of the run that wrote a weight file; empty if this library did not write it."""
    settings = content.get("config") if isinstance(content, Mapping) else None
    return settings if isinstance(settings, dict) and "ims_per_id" in settings else {}  # others have a config, too


def find_verification(content: Any, path: Path) -> Mapping[str, Any]:
    """The verification record of weights: in their file's `content`, or in results.json beside it; empty if in neither.

    path: the weight file, or the run folder. Raises InputError if results.json is damaged.
    """
    record = content.get("verification") if isinstance(content, Mapping) else None
    results = (path if path.is_dir() else path.parent) / RESULTS_NAME
    if not record and settings_of(content) and results.is_file():
        try:
            record = json.loads(results.read_text(encoding="utf-8")).get("verification")
        except (ValueError, AttributeError, OSError) as error:
            raise InputError(f"{results} is damaged: evaluate the weights again, or remove it") from error
    return record or {}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Digest of a model's tensors and their names; independent of the file format."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """Find the model's tensors in the content of a weight file; names as by `plain_names`.

    Looks for the moving average in checkpoints of earlier versions, for STATE_DICT_KEYS (of a list, the first entry),
    then for tensors at the top level. Raises InputError, which lists the file's keys, if there are no tensors.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{source} holds no model weights: it holds an object of type {type(content).__name__}")
    for inner in (*(content.get(key) for key in ("average", *STATE_DICT_KEYS)), content):
        candidate = inner[0] if isinstance(inner, (list, tuple)) and inner else inner
        if isinstance(candidate, Mapping):
            tensors = {str(name): value for name, value in candidate.items() if isinstance(value, Tensor)}
            if tensors:
                return plain_names(tensors)
    keys = ", ".join(printable(str(key)) for key in list(content)[:8]) or "none"
    advice = f"save the state dict alone, or under one of: {', '.join(STATE_DICT_KEYS)}"
    raise InputError(f"{source} holds no model weights: its keys are: {keys}; {advice}")


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors as ours: strip prefixes of wrappers before `base.` (`module.`, `_orig_mod.`, `model.`).

    Numbered parts of a trunk in an nn.Sequential get torchvision's names: `base.4.` becomes `base.layer1.`.
    """
    block = "4.0.conv1.weight"
    trunks = {name.removesuffix(block) for name in tensors if name.endswith(block)}
    for trunk in (trunk for trunk in trunks if f"{trunk}0.weight" in tensors):
        for position, part in enumerate(TRUNK_PARTS):
            start = f"{trunk}{position}."
            tensors = {
                name.replace(start, f"{trunk}{part}.", 1) if name.startswith(start) else name: value
                for name, value in tensors.items()
            }
    wrappers = [found[1] for name in tensors if (found := re.fullmatch(r"(|.*\.)base\.conv1\.weight", name))]
    wrapper = min(wrappers, default="")
    return {name.removeprefix(wrapper): value for name, value in tensors.items()}


def load_trunk(trunk: nn.Module, weights: Mapping[str, Tensor], source: str) -> str:
    """Copy the ResNet-50 in `weights`, behind any prefix, into `trunk`.

    Returns a line that lists what was loaded and what was not. Raises InputError, which names the network in the file,
    if a tensor of the trunk is missing (except num_batches_tracked) or has another shape, or if the file's trunk has
    tensors that ResNet-50 does not have.
    """
    own = trunk.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    ends = ("layer1.0.conv1.weight", "conv1.weight")
    prefixes = sorted({name.removesuffix(end) for end in ends for name in weights if name.endswith(end)})
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in weights for name in needed), default="")
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if misfit := find_misfit(found, own, needed, prefix):
        network = network_of(found)
        held = f"{network}, not ResNet-50" if network not in ("", "ResNet-50") else "no whole ResNet-50"
        others = f"; it has {list_parts(weights)}" if not any(name in found for name in needed) else ""
        raise InputError(f"{source} holds {held}: {misfit}{others}")
    trunk.load_state_dict({name: found[name] for name in own if name in found}, strict=False)
    loaded = {prefix + name for name in own}
    others = list_parts([name for name in weights if name not in loaded], prefix)
    return (
        f"trunk: {len(needed)} of {len(needed)} tensors loaded from {source}"
        + (f" (names behind {prefix!r})" if prefix not in ("", "base.") else "")
        + (f", not loaded: {others}" if others else "")
    )


def find_misfit(found: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: list[str], prefix: str) -> str:
    """Why the tensors `found` behind `prefix` do not fit the trunk; empty if they do."""
    missing = [name for name in needed if name not in found]
    if missing:
        return f"{len(missing)} of {len(needed)} tensors are missing, the first is {printable(prefix + missing[0])}"
    for name in own:
        if name in found and not fits(found[name], own[name]):
            theirs, ours = tuple(found[name].shape), tuple(own[name].shape)
            return f"{printable(prefix + name)} has shape {theirs} ({found[name].type()}), the trunk's has {ours}"
    parts = {name.split(".")[0] for name in own}  # other parts may be a head behind the same prefix
    surplus = [name for name in found if name.split(".")[0] in parts and name not in own]
    if surplus:
        return f"tensors that ResNet-50 does not have: {len(surplus)}, the first is {printable(prefix + surplus[0])}"
    return ""


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a file's tensor can replace a model's: same shape, both floating point or neither, dense."""
    same_kind = tensor.is_floating_point() == own.is_floating_point()
    return tensor.shape == own.shape and same_kind and tensor.layout == torch.strided and not tensor.is_meta


def network_of(tensors: Mapping[str, Tensor]) -> str:
    """The residual network that tensors with torchvision's names form, such as "SE-ResNet-101"; empty if unknown."""
    stages = [{name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    depth = DEPTHS.get(tuple(len(blocks) for blocks in stages))
    middle = tensors.get("layer1.0.conv2.weight")
    if depth is None or middle is None or middle.dim() != 4:
        return ""
    if depth == 50 and "layer1.0.conv3.weight" not in tensors:
        depth = 34
    family = "ResNet"
    if middle.shape[0] != middle.shape[1]:
        family = "ResNeXt"  # grouped convolutions
    elif middle.shape[0] != 64:
        family = "Wide ResNet"
    squeezed = any(".se_module." in name or ".se." in name for name in tensors)
    normed = any(".IN." in name for name in tensors)
    return f"{'SE-' if squeezed else ''}{family}-{depth}{'-IBN' if normed else ''}"


def list_parts(names: Iterable[str], prefix: str = "") -> str:
    """The parts of a network that tensors belong to, at most 8, such as "neck, fc.bias".

    A part is named one level below what its path shares with the trunk's `prefix`.
    """
    trunk = prefix.split(".")[:-1]
    members: dict[str, list[str]] = {}
    for name in names:
        path = name.split(".")
        members.setdefault(".".join(path[: len(os.path.commonprefix([path, trunk])) + 1]), []).append(name)
    parts = [printable(part if len(inside) > 1 else inside[0]) for part, inside in members.items()]
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")


def read_imagenet_weights() -> dict[str, Tensor]:
    """Read torchvision's ImageNet weights of ResNet-50 from torch.hub's folder; download them if they are missing.

    Raises InputError, which names the file to put there, if the download fails.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", IMAGENET_URL.rsplit("/", 1)[1])
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
    """Untrusted text from a file, shortened and with line breaks and terminal codes escaped."""
    return ascii(text)[1:-1][:length]
