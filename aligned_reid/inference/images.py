"""Whatever a user calls an image as uint8 RGB, upright: files, PIL images, numpy arrays, tensors; and crops of one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from aligned_reid.data.prepare.jpeg import decode_upright, read_content, to_rgb
from aligned_reid.data.prepare.sources import shown
from aligned_reid.data.transforms import MAX_PIXELS, too_large
from aligned_reid.errors import InputError
from aligned_reid.evaluation.kernels import to_numpy

MIN_SIDE = 4  # pixels of an image or box; a person cannot be seen in fewer
CHANNELS = (1, 3, 4)  # gray, RGB, RGB with transparency, which is dropped
WHITE = {"u1": 255, "u2": 65535, "f2": 1, "f4": 1, "f8": 1}  # by the type of an array's values


def is_one_image(images: Any) -> bool:
    """Whether `images` is one image rather than several: a path, a PIL image, an array of at most 3 dimensions."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim <= 3
    return isinstance(images, (str, os.PathLike, Image.Image))


def name_of(image: Any, number: int) -> str:
    """How messages call an image: by its path, or by its number in the call, counted from 0."""
    return shown(image) if isinstance(image, (str, os.PathLike)) else f"number {number}"


def read_image(image: Any, name: str, *, bgr: bool = False) -> np.ndarray:
    """An image as uint8 [h, w, 3], RGB, contiguous.

    image: a path; a PIL image; an array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]; a tensor of these shapes or with the
    channels first. Files and PIL images are turned upright by their EXIF orientation. Arrays and tensors hold uint8,
    uint16, or floats from 0 to 1, in the order R, G, B, or B, G, R with `bgr`. Raises InputError with `name`.
    """
    if isinstance(image, (str, os.PathLike)):
        if os.path.isdir(image):  # unlike Path.is_dir, also for a path that cannot be looked up
            raise InputError(f"image {name} is a folder; Gallery.open reads the images of a folder")
        pixels = decode_upright(name, read_content(Path(image)))  # as TestImages, if it is an upright JPEG
    elif isinstance(image, Image.Image):
        if image.width * image.height > MAX_PIXELS:
            raise InputError(too_large(name))
        try:
            pixels = to_rgb(name, ImageOps.exif_transpose(image))
        except InputError:
            raise
        except Exception as error:  # Pillow reads a file when its pixels are needed, and raises errors of many types
            raise InputError(f"image {name} cannot be decoded: {error}") from error
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        pixels = read_array(image, name, bgr)
    else:
        raise InputError(f"image {name} is a {type(image).__name__}, not a path, a PIL image, an array or a tensor")
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise InputError(f"image {name} has {pixels.shape[1]} x {pixels.shape[0]} pixels: too few to show a person")
    return np.ascontiguousarray(pixels)


def read_array(image: Any, name: str, bgr: bool) -> np.ndarray:
    """An array or a tensor as uint8 [h, w, 3], RGB. Raises InputError for other shapes, types and ranges."""
    is_tensor = isinstance(image, torch.Tensor)
    array = to_numpy(image)
    if is_tensor and array.ndim == 3 and array.shape[0] in CHANNELS and array.shape[2] not in CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in CHANNELS or array.size == 0:
        raise InputError(f"image {name} has the shape {tuple(image.shape)}, not [height, width, 3]")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(too_large(name))
    white = WHITE.get(array.dtype.str[1:])
    if white is None:
        raise InputError(f"image {name} holds {array.dtype} values, not uint8, or floats from 0 to 1")
    if white != 255:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= white):  # NaN too
            raise InputError(f"image {name} has values from {low:g} to {high:g}; floats are from 0 to 1")
        array = np.rint(array * (255 / white)).astype(np.uint8)
    array = array[..., :3]
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., ::-1] if bgr else array


def cut_boxes(image: np.ndarray, boxes: Any, name: str) -> list[np.ndarray | InputError]:
    """The parts of an image [h, w, 3] in `boxes` [N, 4] (left, top, right, bottom, in pixels), cut at its borders.

    A box that is not in the image, or is empty, gives an InputError in its place. Raises InputError for other shapes.
    """
    try:
        values = to_numpy(boxes).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"boxes of image {name} are not numbers [N, 4]: {error}") from error
    if values.size == 0:
        return []
    if values.ndim != 2 or values.shape[1] != 4:
        raise InputError(f"boxes have the shape {values.shape}, not [N, 4]: left, top, right, bottom of each")
    height, width = image.shape[:2]
    limit = np.array([width, height, width, height])
    parts: list[np.ndarray | InputError] = []
    for number, box in enumerate(values):
        corners = ", ".join(f"{value:g}" for value in box)
        if not np.isfinite(box).all() or (box[2:] <= box[:2]).any():
            parts.append(InputError(f"box {number} ({corners}) of image {name} is empty: right > left, bottom > top"))
            continue
        left, top, right, bottom = np.rint(box).clip(0, limit).astype(int)
        if min(right - left, bottom - top) < MIN_SIDE:
            parts.append(InputError(f"box {number} ({corners}) is outside image {name} ({width} x {height}), or tiny"))
        else:
            parts.append(image[top:bottom, left:right])
    return parts


def as_list(images: Any) -> list[Any]:
    """The images of a call, of which there may be one. Raises InputError for what is neither."""
    if is_one_image(images):
        return [images]
    if not isinstance(images, Iterable):
        raise InputError(f"{type(images).__name__}: give a path, a PIL image, an array, a tensor, or a list of them")
    return images if isinstance(images, list) else list(images)
