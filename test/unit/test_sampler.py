"""Identity batches: their identities and images, and reproducibility from seed, rank and epoch."""

import numpy as np
import pytest
from conftest import refusal

from aligned_reid.data.sampler import IdentityBatchSampler, SampleRequest

# person: number of images
COUNTS = {3: 6, 21: 1, 5: 4, 13: 2, 8: 9, 34: 5, 2: 4, 55: 4, 89: 7, 1: 3}
PERSON_IDS = np.random.RandomState(0).permutation(np.repeat(list(COUNTS), list(COUNTS.values())))


def sampler(ids_per_batch=4, ims_per_id=4, final_batch=True, seed=1, **options) -> IdentityBatchSampler:
    return IdentityBatchSampler(PERSON_IDS, ids_per_batch, ims_per_id, final_batch, seed, **options)


def groups(batches: list[list[SampleRequest]], ims_per_id: int = 4) -> list[list[int]]:
    """The image indices of each identity in an epoch."""
    requests = [request for batch in batches for request in batch]
    return [[request.index for request in requests[at : at + ims_per_id]] for at in range(0, len(requests), ims_per_id)]


def test_every_identity_occurs_once_per_epoch_with_its_own_images():
    subject = sampler()
    for epoch in (1, 2):
        subject.set_epoch(epoch)
        epoch_groups = groups(list(subject))
        persons = [person for group in epoch_groups for person in set(PERSON_IDS[group])]
        assert sorted(persons) == sorted(COUNTS)  # each in one group, which has no other person
        for person, group in zip(persons, epoch_groups, strict=True):
            assert len(set(group)) == 4 or COUNTS[person] < 4  # without replacement if there are enough


def test_all_images_are_drawn_over_the_epochs_each_with_its_own_seed():
    subject = sampler()
    requests = []
    for epoch in range(60):
        subject.set_epoch(epoch)
        requests += [request for batch in subject for request in batch]
    assert {request.index for request in requests} == set(range(len(PERSON_IDS)))
    assert len({request.seed for request in requests}) == len(requests)
    assert all(type(request.seed) is int and 0 <= request.seed < 2**63 for request in requests)


@pytest.mark.parametrize(
    ("ids_per_batch", "final_batch", "sizes"),
    [
        *((4, True, [4, 4, 2]), (4, False, [4, 4]), (5, True, [5, 5]), (5, False, [5, 5]), (10, True, [10])),
        (9, True, [10]),  # a single remaining identity would have no negative
        *((3, True, [3, 3, 4]), (3, False, [3, 3, 3]), (1, True, [1] * 10)),
    ],
)
def test_last_smaller_batch_is_kept_or_dropped(ids_per_batch, final_batch, sizes):
    subject = sampler(ids_per_batch, final_batch=final_batch)
    assert [len(batch) for batch in subject] == [4 * size for size in sizes]
    assert subject.batch_sizes() == sizes
    assert len(subject) == len(sizes)


def test_too_few_identities_are_refused_and_those_with_few_images_listed():
    assert "--ids_per_batch 11" in refusal(sampler, ids_per_batch=11)
    refusal(IdentityBatchSampler, [], 1, 4, True, 1)
    assert sampler().ids_with_few_images == [1, 13, 21]
    assert sampler(ims_per_id=1).ids_with_few_images == []


def test_epochs_are_a_function_of_seed_rank_and_epoch():
    def epoch_of(epoch: int, **options) -> list[list[SampleRequest]]:
        subject = sampler(**options)
        subject.set_epoch(epoch)
        return list(subject)

    before = np.random.get_state()[1].copy()
    first = epoch_of(7)
    assert epoch_of(7) == first
    assert np.array_equal(np.random.get_state()[1], before)  # the global generator is not used
    subject = sampler()
    for epoch, first_batch in ((1, 0), (7, 0), (7, 2), (7, 0)):  # epochs before do not matter, as after a resume
        subject.set_epoch(epoch, first_batch=first_batch)
        drawn = list(subject)
        assert (drawn == first[first_batch:]) == (epoch == 7)
    others = [epoch_of(8), epoch_of(7, seed=2), epoch_of(7, rank=1), epoch_of(1, rank=7), epoch_of(7, seed=2**63 + 5)]
    assert len({str(groups(batches)) for batches in [first, *others]}) == 6


def test_draws_are_those_of_earlier_versions():
    """A run of an earlier version resumes with the same draws."""
    subject = IdentityBatchSampler([5, 5, 7, 7, 7, 9], 2, 2, True, seed=3, rank=1)
    subject.set_epoch(4)
    indices = [5, 5, 1, 0, 2, 4]
    seeds = [7278974541391867024, 1851874262292907826, 5776761366725996170]
    seeds += [4227413481742876118, 6190269527286367431, 9190621936180538610]
    assert list(subject) == [[SampleRequest(*pair) for pair in zip(indices, seeds, strict=True)]]


def test_shards_divide_the_identities():
    shards = [sampler(ids_per_batch=3, rank=rank, num_shards=3) for rank in range(3)]
    orders = []
    for epoch in (1, 2):
        for shard in shards:
            shard.set_epoch(epoch)
        orders.append([PERSON_IDS[group[0]] for shard in shards for group in groups(list(shard))])
        assert len(orders[-1]) == len(set(orders[-1])) == 9  # of 10: one is left out, so that all shards are equal
    assert orders[0] != orders[1] and {len(shard) for shard in shards} == {1}
    assert "3 in each of 3 processes" in refusal(sampler, ids_per_batch=4, num_shards=3)
