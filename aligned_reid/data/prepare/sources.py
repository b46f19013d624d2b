"""Finding files in the source of a preparation, and the command that prepares it."""

import os
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from aligned_reid.cli import command_line
from aligned_reid.errors import InputError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")  # also in capitals


def check_paths(source: str | Path, save_dir: str | Path) -> tuple[Path, Path]:
    """Both paths, ~ expanded. Raises InputError unless the source exists and nothing would be written into it."""
    source, save_dir = Path(os.path.expanduser(source)), Path(os.path.expanduser(save_dir))
    if not os.path.exists(source):
        raise InputError(f"--source {source} does not exist or is not accessible")
    # os.path, as Path's methods raise errors for an unknown ~user and for a link to itself.
    images_dir = Path(os.path.realpath(save_dir / "images"))
    if source.is_dir() and Path(os.path.realpath(source)) in (images_dir, *images_dir.parents):
        raise InputError(f"--save_dir {save_dir} is inside the source {source}; choose a folder outside it")
    return source, save_dir


def folders_to_look_in(path: Path) -> Iterator[Path]:
    """A folder, its folders, and theirs, since archives unpack into nested folders; nothing for a file."""
    level = [path] if path.is_dir() else []
    yield from level
    for _ in range(2):
        children = ((folder, name) for folder in level for name in sorted(list_folder(folder)[0]))
        # macOS adds __MACOSX to archives.
        level = [folder / name for folder, name in children if not name.startswith((".", "__MACOSX"))]
        yield from level


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder; none if it does not exist or cannot be read."""
    return next(((folders, files) for _, folders, files in os.walk(folder)), ([], []))


def find_image(path: Path) -> Path | None:
    """The file, or the one beside it with another image ending; None if there is neither."""
    endings = (ending for lower in IMAGE_ENDINGS for ending in (lower, lower.upper()))
    candidates = (path, *(path.with_suffix(ending) for ending in endings))
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images below a folder by the endings of their names, sorted, and the other files.

    Hidden files and folders are left out. Raises InputError if there is no such folder or it cannot be read.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{shown(folder)} is not a folder of images")
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read {shown(error.filename)}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    found.sort()
    images = [path for path in found if ending_of(path.name) in IMAGE_ENDINGS]
    return images, [path for path in found if ending_of(path.name) not in IMAGE_ENDINGS]


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a terminal: line breaks, control characters and bytes that are not UTF-8 are escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in os.fspath(path))


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, "hidden" or "no ending"."""
    return "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "no ending"


def kind_of(path: Path | zipfile.Path) -> str:
    """ "folders", "dangling links", or the ending of a file's name."""
    return "folders" if path.is_dir() else ending_of(path.name) if path.exists() else "dangling links"


def describe_skipped(kinds: Mapping[str, int]) -> str:
    """`skipped, not images: 1 dangling links, 2 .db`, from the number of files of each kind."""
    counts = ", ".join(f"{number:,} {ascii(kind)[1:-1]}" for kind, number in sorted(kinds.items()))
    return f"skipped, not images: {counts}"


def prepare_command(kind: str, source: Path, flags: str = "") -> str:
    """The line that prepares `source`, of a kind that `aligned-reid prepare` knows, into a folder beside it."""
    path = os.path.abspath(source)
    save_dir = f"{os.path.splitext(path)[0] if source.is_file() else path}_prepared"
    return f"{command_line(f'prepare {kind}')} --source {shlex.quote(path)} --save_dir {shlex.quote(save_dir)}{flags}"
