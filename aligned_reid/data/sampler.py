"""Which images a training batch holds: P identities with K images each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aligned_reid.errors import InputError


class SampleRequest(NamedTuple):
    """One image to load: its index in the data set, and the seed of all that is random about it (mirror, crop)."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    seed: int


class IdentityBatchSampler:
    """Batches of `ids_per_batch` identities with `ims_per_id` images each; every identity comes once an epoch.

    An identity's images are drawn without repetition, or with repetition where it has fewer than `ims_per_id`
    (`ids_with_few_images` lists those). What is left at the end of an epoch is a smaller last batch with `final_batch`,
    else dropped; a single identity left over joins the batch before, for alone it has no negative to mine.
    Order and draws are a function of (seed, rank, epoch): a resumed run repeats them, and each rank has its own. With
    num_shards, the ranks walk one common order and take turns in it, each identity being in one rank's epoch; what does
    not divide evenly is left out, for ranks make the same number of steps.

    person_ids: the person of each image, [number of images]. Raises InputError when there are fewer identities than
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
        shuffle: bool = True,
        num_shards: int = 1,
    ) -> None:
        self.ids_per_batch = ids_per_batch
        self.ims_per_id = ims_per_id
        self.final_batch = final_batch
        self.seed = seed
        self.rank = rank
        self.shuffle = shuffle
        self.num_shards = num_shards
        self.epoch = self.first_batch = 0
        # Sorted, and never shuffled in place: the order of one epoch must not depend on the epochs before it.
        self.ids, identity = np.unique(np.asarray(person_ids, dtype=np.int64), return_inverse=True)
        self.num_ids = len(self.ids) // num_shards  # of this rank's epoch
        if self.num_ids < ids_per_batch:
            share = f", of which each of {num_shards} processes has {self.num_ids}" if num_shards > 1 else ""
            raise InputError(
                f"--ids_per_batch {ids_per_batch} is more than the {len(self.ids)} identities of the training data"
                + share
            )
        by_identity = np.argsort(identity, kind="stable")
        self.images_of_id = np.split(by_identity, np.cumsum(np.bincount(identity, minlength=len(self.ids)))[:-1])
        self.ids_with_few_images: list[int] = [
            int(person_id)
            for person_id, images in zip(self.ids, self.images_of_id, strict=True)
            if len(images) < ims_per_id
        ]

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch that the next iteration draws, and how many of its batches it leaves out."""
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
        # RandomState, for numpy promises that its streams never change between versions.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, self.rank, self.epoch])))
        order = np.arange(len(self.ids))
        if self.shuffle:
            common = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, self.epoch])))
            order = (common if self.num_shards > 1 else random).permutation(len(self.ids))
        if self.num_shards > 1:
            order = order[self.rank :: self.num_shards][: self.num_ids]
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
