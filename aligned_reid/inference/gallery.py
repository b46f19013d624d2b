"""A folder of images to search in and to group by person."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aligned_reid.data.prepare.sources import describe_skipped, find_images, kind_of, shown
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.inference.images import as_list, is_one_image
from aligned_reid.inference.index import open_index
from aligned_reid.inference.nearest import group_features, nearest
from aligned_reid.inference.reid import ReID


class Hit(NamedTuple):
    """An image of the gallery, as an answer to a query."""

    path: Path
    distance: float
    same_person: bool | None  # whether it is below the threshold; None without one


class Group(NamedTuple):
    """The images of one person, as far as the model can tell."""

    person: int  # 1, 2, ...; the largest group first
    paths: list[Path]


class Gallery:
    """The images of a folder with their features; `Gallery.open` makes one."""

    def __init__(self, reid: ReID, folder: Path, names: Sequence[str], global_feat: Tensor) -> None:
        """names: paths relative to the folder. global_feat: float32 [N, D] of these images, on the CPU."""
        self.reid, self.folder, self.names = reid, folder, list(names)
        self.feat = reid.scaled(global_feat)
        self.norms = self.feat.square().sum(1)  # [N]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        reid: ReID,
        log: Callable[[str], None] = print,
        on_error: Callable[[str], None] | None = None,
    ) -> Gallery:
        """The images below a folder. Their features are kept in an index: .aligned_reid/ in it, or the user's cache.

        Only new and changed images (by size and date) are computed. on_error (default: log) gets a line for each image
        that cannot be used, and log for what else is noteworthy; the other images are served. Raises InputError if no
        image can be used.
        """
        folder = Path(folder).expanduser()
        paths, others = find_images(folder)
        if others:
            log(describe_skipped(Counter(map(kind_of, others))))
        if not paths:
            raise InputError(f"no images below {shown(folder)}")
        names = [os.fsencode(path.relative_to(folder)) for path in paths]
        rows = open_index(folder, names, reid, log, on_error or log)
        if not rows.names:
            raise InputError(f"none of the {len(paths):,} images below {shown(folder)} can be used")
        return cls(reid, folder, [os.fsdecode(name) for name in rows.names], torch.from_numpy(rows.feat))

    def __len__(self) -> int:
        return len(self.names)

    def search(self, query: Any, k: int = 10, on_error: Callable[[str], None] | None = None) -> list[Any]:
        """The k images nearest to a query, as Hits, nearest first; for several queries, a list of Hits for each.

        query: what `ReID.__call__` takes, or its result. A query that is a file of the gallery is not among its own
        hits. Raises InputError for a query that cannot be used; with `on_error`, that gets the line instead, and the
        query has no hits.
        """
        if is_one_image(query):
            return self.search([query], k, on_error)[0]
        if isinstance(query, FeatureSet):
            feat, own = query.global_feat, [-1] * len(query.global_feat)
            if feat.shape[1] != self.feat.shape[1]:
                raise InputError(f"the query has {feat.shape[1]} features, the gallery {self.feat.shape[1]}")
        else:
            queries = as_list(query)
            feat, own = self.reid(queries, on_error=on_error).global_feat, self.places_of(queries)
        places, distances = nearest(self.reid.scaled(feat), self.feat, self.norms, min(k + 1, len(self)))
        threshold = self.reid.threshold
        answers: list[list[Hit]] = []
        for row, own_place in enumerate(own):
            found = zip(places[row].tolist(), distances[row].tolist(), strict=True)
            hits = [
                Hit(self.folder / self.names[place], distance, None if threshold is None else distance < threshold)
                for place, distance in found
                if place != own_place and distance == distance  # NaN: the query is bad
            ]
            answers.append(hits[:k])
        return answers

    def places_of(self, queries: Sequence[Any]) -> list[int]:
        """The place of each query in the gallery if it is one of its files, else -1."""
        places = {name: place for place, name in enumerate(self.names)}
        folder = os.path.realpath(self.folder)
        found = []
        for query in queries:
            own = -1
            if isinstance(query, (str, os.PathLike)):
                parent, name = os.path.split(query)
                # A link to a file of the gallery, and a link in the gallery.
                for path in (os.path.realpath(query), os.path.join(os.path.realpath(parent), name)):
                    own = places.get(os.path.relpath(path, folder), own)
            found.append(own)
        return found

    def group(self, threshold: float | None = None) -> list[Group]:
        """The images grouped by person, the largest group first; the paths of a group are sorted.

        Clusters of average linkage, whose mean distance is below the threshold (default: that of the weights); for more
        than `nearest.MAX_LINKED` images see `nearest.group_features`. Raises InputError without a threshold.
        """
        threshold = self.reid.threshold if threshold is None else threshold
        if threshold is None:
            raise InputError(
                "the weights have no threshold: test them on 1,000 pairs of strangers or more, or give a threshold"
            )
        members: dict[int, list[Path]] = {}
        for name, label in zip(self.names, group_features(self.feat, threshold).tolist(), strict=True):
            members.setdefault(label, []).append(self.folder / name)
        ordered = sorted(members.values(), key=lambda paths: (-len(paths), paths[0]))
        return [Group(person, paths) for person, paths in enumerate(ordered, start=1)]
