"""The order of training images: exactly once per epoch, on any number of ranks, from any position."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arsg_dist.imagenet.data.sampler import SampleKey, TrainingSampler


def order(
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    *,
    images: int = 61,
    batch_size: int = 12,
    epochs: int = 3,
    position: int = 0,
    seed: int = 5,
) -> TrainingSampler:
    made = TrainingSampler(
        images,
        epochs=epochs,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )
    made.position = position
    return made


def updates(world_size: int = 1, accumulation_steps: int = 1, **settings: int) -> list[list[SampleKey]]:
    """What all ranks together see in each update, in one order for all numbers of ranks."""
    ranks = [list(order(rank, world_size, accumulation_steps, **settings)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(batch) for batches in ranks for batch in batches}) == 1, "batches of different size"
    steps = list(zip(*ranks, strict=True))
    return [
        sorted(key for step in steps[start : start + accumulation_steps] for batch in step for key in batch)
        for start in range(0, len(steps), accumulation_steps)
    ]


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(2, 1), (3, 2), (4, 3)])
def test_updates_hold_the_same_images_on_any_number_of_ranks(
    world_size: int, accumulation_steps: int
) -> None:
    """Catches an order, an augmentation or a filling that depends on the number of ranks."""
    assert updates(world_size, accumulation_steps) == updates()


@given(
    images=st.integers(1, 40),
    parts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    per_part=st.integers(1, 4),
    epochs=st.integers(1, 4),
)
@settings(max_examples=60)
def test_every_epoch_holds_every_image_exactly_once(
    images: int, parts: tuple[int, int], per_part: int, epochs: int
) -> None:
    """Catches images dropped or repeated at the end of an epoch or of the run, where sizes do not divide."""
    batch_size = parts[0] * parts[1] * per_part
    if batch_size > images:
        return
    keys = [
        key
        for update in updates(*parts, images=images, batch_size=batch_size, epochs=epochs)
        for key in update
    ]
    counted = Counter((key.epoch, key.image) for key in keys if key.counts)
    assert counted == Counter((epoch, image) for epoch in range(epochs) for image in range(images))


def test_a_last_update_lacks_images_evenly_and_is_weighed_up() -> None:
    """Catches ranks without a single image at the end, and a gradient that is smaller than the mean."""
    batches = [list(order(rank, 3))[-1] for rank in range(3)]
    assert [sum(key.counts for key in batch) for batch in batches] == [1, 1, 1]  # 183 = 15 × 12 + 3
    made = order()
    assert made.weight(180) == 4
    assert made.weight(168) == 1
    assert made.after(180) == 183
    assert len(made) == 16


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("done", [1, 5, 9, 15])
def test_the_next_image_after_a_resume_is_the_one_that_would_have_come(world_size: int, done: int) -> None:
    """Catches a resume that begins the epoch anew, or loses its place on another number of ranks."""
    assert updates(world_size, position=12 * done) == updates()[done:]


def test_a_longer_run_goes_on_after_the_filled_up_end_of_a_shorter_one() -> None:
    """Catches the images that are lost when a run whose last update was not full is given more epochs."""
    first = updates(epochs=1)
    position = 61
    more = updates(epochs=2, position=position)
    counted = Counter((key.epoch, key.image) for update in first + more for key in update if key.counts)
    assert set(counted.values()) == {1}
    assert len(counted) == 2 * 61


def test_epochs_end_at_the_first_update_after_their_last_image() -> None:
    """Catches an epoch that is validated before all of its images were used, or twice."""
    made, position, ends = order(), 0, []
    for epoch in range(3):
        for _ in range(made.updates_until(epoch, position)):
            position = made.after(position)
        ends.append(position)
    assert ends == [72, 132, 183]
    assert made.updates_until(1, 132) == 0


def test_permutations_differ_by_epoch_and_seed_and_not_between_calls() -> None:
    """Catches a permutation drawn from global random state, or the same one every epoch."""
    assert updates() == updates()
    per_epoch = {
        epoch: [key.image for batch in order() for key in batch if key.epoch == epoch and key.counts]
        for epoch in range(3)
    }
    other = [key.image for batch in order(seed=6) for key in batch if key.epoch == 0]
    assert len({tuple(images) for images in [*per_epoch.values(), other]}) == 4


def test_a_batch_over_the_border_of_epochs_has_one_size() -> None:
    """Catches images of two sizes in one batch where the size grows with the epoch."""
    border = next(update for update in updates() if len({key.epoch for key in update}) == 2)
    assert {key.batch_epoch for key in border} == {0}


def test_a_batch_of_more_than_an_epoch_is_refused() -> None:
    """Catches a batch in which one image would be twice."""
    with pytest.raises(ValueError, match="batch_size=12 is larger than the training split of 11 images"):
        order(images=11)
