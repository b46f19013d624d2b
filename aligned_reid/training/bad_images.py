"""Training images that turn out bad during a run, changed on disk since they were checked: named, counted, limited."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import Tensor

from aligned_reid.data.dataset import TrainImages
from aligned_reid.distributed import World
from aligned_reid.errors import InputError


class BadImages:
    """Says once of each bad image what is wrong with it, and ends the run at more than `limit` different ones.

    Each rank counts its own. Rank 0 writes into the log, the others to their own standard error.
    """

    def __init__(self, images: TrainImages, limit: int, world: World, log: Callable[[str], None]) -> None:
        self.images, self.limit, self.world, self.log = images, limit, world, log
        self.seen: set[int] = set()

    def note(self, replaced: Tensor, last_checkpoint: Callable[[], str]) -> None:
        """Take note of a batch's `replaced` [R, 2]. Raises InputError, which names the image, beyond the limit."""
        for bad, used in replaced.tolist():
            if bad in self.seen:
                continue
            self.seen.add(bad)
            if len(self.seen) > self.limit:
                raise InputError(
                    f"{self.defect_of(bad)}; {len(self.seen)} different training images turned bad since they "
                    f"were checked, and --max_bad_images is {self.limit}: prepare the data again; {last_checkpoint()}"
                )
            name = self.images.image_names[used]
            self.say(f"bad image {len(self.seen)} of at most {self.limit}: {self.defect_of(bad)}; {name} in its place")

    def defect_of(self, index: int) -> str:
        """What is wrong with an image; it may be whole again."""
        try:
            self.images.decode(index)
        except InputError as error:
            return str(error)
        return f"image {self.images.image_names[index]} could not be read for a time"

    def say(self, line: str) -> None:
        if self.world.is_main:
            self.log(line)
        else:
            print(f"process {self.world.rank}: {line}", file=sys.stderr, flush=True)
