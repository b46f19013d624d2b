"""Draws queries and their nearest gallery images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from aligned_reid.data.dataset import TestImages
from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.data.transforms import resize_image

TILE = (160, 80)  # height, width of an image, pixels
GAP = 6
COLOURS = {"query": (90, 90, 90), "right": (46, 160, 67), "wrong": (208, 52, 44)}  # RGB of the frames


def draw_matches(path: str | Path, images: TestImages, dist: np.ndarray, query_rows: list[int], topk: int = 8) -> None:
    """Write a PNG with a row for each of `query_rows`: the query, then its `topk` nearest gallery images.

    dist [Q, G]: distances of the queries and gallery images of `images`, in order. Frames are green for the query's
    person, red otherwise; images of the query's person and camera are left out, as in the protocol.
    """
    queries, gallery = np.flatnonzero(images.marks == QUERY), np.flatnonzero(images.marks == GALLERY)
    rows = []
    for row in query_rows:
        query = queries[row]
        same_person = images.person_ids[gallery] == images.person_ids[query]
        junk = same_person & (images.cameras[gallery] == images.cameras[query])
        nearest = np.argsort(np.where(junk, np.inf, dist[row]), kind="stable")[:topk]
        tiles = [frame(images, int(query), "query"), np.full((TILE[0] + 2 * GAP, 2 * GAP, 3), 255, np.uint8)]
        tiles += [frame(images, int(gallery[one]), "right" if same_person[one] else "wrong") for one in nearest]
        rows.append(np.concatenate(tiles, axis=1))
    if not cv2.imwrite(str(path), np.concatenate(rows, axis=0)[:, :, ::-1]):
        raise OSError(f"cannot write {path}")


def frame(images: TestImages, index: int, kind: str) -> np.ndarray:
    """An image with a frame around it, uint8 [height + 2 GAP, width + 2 GAP, 3]."""
    tile = resize_image(images.decode(index), TILE)
    inner = cv2.copyMakeBorder(tile, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=COLOURS[kind])
    outer = GAP - 3
    return cv2.copyMakeBorder(inner, outer, outer, outer, outer, cv2.BORDER_CONSTANT, value=(255, 255, 255))
