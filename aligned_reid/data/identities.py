"""Which persons a model was trained on; a person is identified by a photo, as preparation chooses the numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from aligned_reid.data.dataset import TestImages, TrainImages
from aligned_reid.data.partitions import QUERY
from aligned_reid.errors import InputError

HASHED_BYTES = 2**16  # at the start of a photo


def identities_of(images: TrainImages) -> list[str]:
    """A digest of each person's first photo, in the order of the labels."""
    _, first = np.unique(images.labels, return_index=True)
    return _digests(images.images_dir, images.person_ids[first].tolist())


def identity_record(images: TrainImages, start: Any) -> dict[str, list[str]]:
    """The entry "trained_on" of a run's weight files: "identities" (one per label) and "before".

    "before" has the persons that the start weights were trained on. start: the content of their file, or None.
    """
    own = identities_of(images)
    return {"identities": own, "before": sorted(_all_of(start) - set(own))}


def check_identities(checkpoint: Mapping[str, Any], path: os.PathLike[str], images: TrainImages) -> None:
    """Raise InputError if the labels in the checkpoint to resume belong to other persons than those in `images`."""
    before = checkpoint.get("trained_on", {}).get("identities")
    if before is None:  # written by an older version
        return
    now = identities_of(images)
    num_labels, num_same = max(len(before), len(now)), sum(map(str.__eq__, before, now))
    if num_same < num_labels:
        raise InputError(
            f"--resume true: {num_labels - num_same} of the {num_labels} labels are other persons in the training data "
            f"now than in {path}, perhaps because it was prepared with another --seed: prepare it as before, or start "
            "a new run with --model_weight_file instead of --resume"
        )


def describe_overlap(images: TestImages, weights: Any) -> str:
    """A line on how many test persons the weights were trained on; "" if their file does not say.

    weights: the content of the weight file.
    """
    trained = _all_of(weights)
    if not trained:
        return ""
    persons = np.unique(images.person_ids[images.marks == QUERY]).tolist()
    num_trained = len(trained.intersection(_digests(images.images_dir, persons)))
    return f"the weights were trained on {num_trained:,} of the {len(persons):,} persons in the test"


def _all_of(weights: Any) -> set[str]:
    record = weights.get("trained_on", {}) if isinstance(weights, Mapping) else {}
    return {*record.get("identities", ()), *record.get("before", ())}


def _digests(images_dir: str, person_ids: Iterable[int]) -> list[str]:
    """A digest of each person's first image in the folder, whichever part of the data set it belongs to."""
    first: dict[str, str] = {}
    for name in sorted(os.listdir(images_dir)):
        first.setdefault(name[:8], name)
    digests = []
    for person_id in person_ids:
        with open(f"{images_dir}/{first[f'{person_id:08d}']}", "rb") as file:
            digests.append(blake2b(file.read(HASHED_BYTES), digest_size=16).hexdigest())
    return digests
