"""Training batches of P identities with K images each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aligned_reid.errors import InputError


class SampleRequest(NamedTuple):
    """One image to load: its index in the data set, and the seed of its random augmentation."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which is not needed
    seed: int


class IdentityBatchSampler:
    """Batches of `ids_per_batch` identities with `ims_per_id` images each; every identity occurs once per epoch.

    An identity's images are drawn without replacement, or with replacement if it has fewer than `ims_per_id` (listed in
    `ids_with_few_images`). The identities left at the end of an epoch form a smaller last batch with `final_batch`, and
    are dropped otherwise; a single one joins the previous batch, because alone it has no negative. Everything is a
    function of (seed, rank, epoch), so a resumed run repeats it. With num_shards, the ranks take turns in one common
    order, and identities that cannot be divided evenly are left out, so that all ranks make the same number of steps.

    person_ids: the person of each image, [number of images]. Raises InputError if there are fewer identities than
    `ids_per_batch`.
    """

    def __init__(
        self,
        person_ids: Sequence[int] | np.ndarray,
        ids_per_batch: int,
        ims_per_id: int,
        final_batch: bool,
        seed: int,
        rank: int = 0,
        num_shards: int = 1,
    ) -> None:
        self.ids_per_batch = ids_per_batch
        self.ims_per_id = ims_per_id
        self.final_batch = final_batch
        self.seed = seed
        self.rank = rank
        self.num_shards = num_shards
        self.epoch = self.first_batch = 0
        # Never shuffled in place: the order in an epoch must not depend on the epochs before it.
        self.ids, identity = np.unique(np.asarray(person_ids, dtype=np.int64), return_inverse=True)
        self.num_ids = len(self.ids) // num_shards  # in an epoch of this rank
        if self.num_ids < ids_per_batch:
            share = f", {self.num_ids} in each of {num_shards} processes" if num_shards > 1 else ""
            raise InputError(f"--ids_per_batch {ids_per_batch} is more than the {len(self.ids)} identities{share}")
        by_identity = np.argsort(identity, kind="stable")
        self.images_of_id = np.split(by_identity, np.cumsum(np.bincount(identity, minlength=len(self.ids)))[:-1])
        num_images = np.array([len(images) for images in self.images_of_id])
        self.ids_with_few_images: list[int] = self.ids[num_images < ims_per_id].tolist()

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch of the next iteration, and how many of its batches to skip."""
        self.epoch, self.first_batch = epoch, first_batch

    def batch_sizes(self) -> list[int]:
        """The number of identities in each batch of an epoch."""
        num_full, num_left = divmod(self.num_ids, self.ids_per_batch)
        sizes = [self.ids_per_batch] * num_full
        if self.final_batch and num_left == 1:
            sizes[-1] += 1
        elif self.final_batch and num_left:
            sizes.append(num_left)
        return sizes

    def __len__(self) -> int:
        return len(self.batch_sizes())

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        random = _random_state(self.seed, self.rank, self.epoch)
        if self.num_shards > 1:
            order = _random_state(self.seed, self.epoch).permutation(len(self.ids))
            order = order[self.rank :: self.num_shards][: self.num_ids]
        else:
            order = random.permutation(len(self.ids))
        identities = iter(order.tolist())
        for number, size in enumerate(self.batch_sizes()):
            batch = [request for _ in range(size) for request in self._draw(next(identities), random)]
            if number >= self.first_batch:
                yield batch

    def _draw(self, identity: int, random: np.random.RandomState) -> list[SampleRequest]:
        images = self.images_of_id[identity]
        drawn = random.choice(images, self.ims_per_id, replace=len(images) < self.ims_per_id)
        seeds = random.randint(0, 2**63 - 1, size=self.ims_per_id, dtype=np.int64)
        return [SampleRequest(index, seed) for index, seed in zip(drawn.tolist(), seeds.tolist(), strict=True)]


def _random_state(*seeds: int) -> np.random.RandomState:
    """A generator whose stream, unlike those of newer classes, numpy promises never to change."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seeds)))
