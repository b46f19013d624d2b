"""What the pages share: templates and thumbnails."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from aligned_reid import __version__
from aligned_reid.errors import InputError
from aligned_reid.files import write_file

THUMBNAIL_SIDE = 192  # pixels of the longer side, at most
THUMBNAIL_BYTES = 12_000  # of one file, at most
QUALITIES = (85, 70, 50, 30, 10)  # of JPEG, tried in this order

Pixels = NDArray[np.uint8]


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page. Its values are escaped, whatever they contain; it loads nothing from a network."""
    environment = Environment(
        loader=PackageLoader("aligned_reid.inference"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(version=__version__, **values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def thumbnail(image: Pixels) -> bytes:
    """A photo, uint8 [h, w, 3] (RGB), as a JPEG of at most THUMBNAIL_SIDE pixels and THUMBNAIL_BYTES."""
    scale = min(1.0, THUMBNAIL_SIDE / max(image.shape[:2]))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    small = image if scale == 1.0 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for quality in QUALITIES:
        content: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=quality, colorspace="RGB")
        if len(content) <= THUMBNAIL_BYTES:
            break
    return content


def data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
