"""Who a model was trained on: persons are known by their photos, since another preparation may number them anew."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from aligned_reid.data.dataset import TestImages, TrainImages
from aligned_reid.data.partitions import QUERY
from aligned_reid.errors import InputError

HASHED_BYTES = 2**16  # of a photo


def identities_of(images: TrainImages) -> list[str]:
    """For each label, in order, a digest of its person's photo."""
    digests = []
    for part in images.parts:
        _, first = np.unique(part.labels, return_index=True)
        digests += _digests(part.images_dir, part.person_ids[first].tolist())
    return digests


def identity_record(images: TrainImages, start: Any) -> dict[str, list[str]]:
    """Whom a run trains on, for its weight files ("trained_on").

    "identities" has one for each label, "before" those of the weights that the run starts from, whose file has the
    content `start` (None: no file).
    """
    own = identities_of(images)
    return {"identities": own, "before": sorted(_all_of(start) - set(own))}


def check_identities(checkpoint: Mapping[str, Any], path: os.PathLike[str], images: TrainImages) -> None:
    """Raise InputError if the labels of a run to resume stood for other persons than those of `images`."""
    before = checkpoint.get("trained_on", {}).get("identities")
    if before is None:  # written by an older version
        return
    now = identities_of(images)
    num_same = sum(one == other for one, other in zip(before, now, strict=False))
    if not num_same == len(before) == len(now):
        raise InputError(
            f"--resume true: {len(before) - num_same} of the {len(before)} identities in {path} are other persons in "
            "the training data now, which may have been prepared with another --seed: prepare it as before, or start "
            "anew from the weights, with --model_weight_file in the place of --resume"
        )


def describe_overlap(tests: Mapping[str, TestImages], weights: Any) -> list[str]:
    """For each data set, a line on how many persons it tests that the weights were trained on; [] if they do not say.

    weights: the content of their file.
    """
    trained = _all_of(weights)
    lines = []
    for name, images in tests.items() if trained else ():
        persons = np.unique(images.person_ids[images.marks == QUERY]).tolist()
        num_trained = len(trained.intersection(_digests(images.images_dir, persons)))
        of_set = f" of {name}" if len(tests) > 1 else ""
        lines.append(f"the weights were trained on {num_trained:,} of the {len(persons):,} persons in the test{of_set}")
    return lines


def _all_of(weights: Any) -> set[str]:
    said = weights.get("trained_on", {}) if isinstance(weights, Mapping) else {}
    return {*said.get("identities", ()), *said.get("before", ())}


def _digests(images_dir: str, person_ids: Iterable[int]) -> list[str]:
    """A digest of the first image of each person in the folder, whatever part of the data set it is in."""
    first: dict[str, str] = {}
    for name in sorted(os.listdir(images_dir)):
        first.setdefault(name[:8], name)
    digests = []
    for person_id in person_ids:
        with open(f"{images_dir}/{first[f'{person_id:08d}']}", "rb") as file:
            digests.append(blake2b(file.read(HASHED_BYTES), digest_size=16).hexdigest())
    return digests
