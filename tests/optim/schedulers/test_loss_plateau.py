"""When a loss counts as flat."""

import pytest

from arsg_dist.optim.schedulers.loss_plateau import LossPlateau


def first_flat(plateau: LossPlateau, losses: list[float]) -> int | None:
    return next((index for index, loss in enumerate(losses) if plateau.observe(loss)), None)


def test_a_falling_loss_is_never_flat_and_a_constant_one_after_the_patience() -> None:
    """Catches an improvement that does not reset the count, or a patience that is off by one."""
    assert first_flat(LossPlateau(0.0, patience=0), [0.9**i for i in range(50)]) is None
    for patience in range(4):
        assert first_flat(LossPlateau(0.0, patience=patience), [1.0] * 10) == patience + 1
    assert first_flat(LossPlateau(0.0, patience=2), [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]) == 6


def test_threshold_is_relative_also_for_negative_losses() -> None:
    """Catches the form best·(1 − threshold), which calls a worse negative loss an improvement."""
    assert first_flat(LossPlateau(0.0, threshold=0.1, patience=0), [100.0, 91.0]) == 1
    assert first_flat(LossPlateau(0.0, threshold=0.1, patience=0), [100.0, 89.0]) is None
    assert first_flat(LossPlateau(0.0, threshold=0.1, patience=0), [-100.0, -95.0]) == 1
    assert first_flat(LossPlateau(0.0, threshold=0.1, patience=0), [-100.0, -111.0]) is None


def test_the_average_is_bias_corrected() -> None:
    """Catches an average that starts at zero: the first observations would look like a rising loss."""
    plateau = LossPlateau(0.9)
    plateau.observe(3.0)
    assert plateau.average == pytest.approx(3.0)
    plateau.observe(1.0)
    assert plateau.average == pytest.approx((0.9 * 3.0 + 1.0) / 1.9)


def test_smoothing_rides_out_noise() -> None:
    """Catches smoothing that has no effect: noise around a falling mean must not look flat."""
    noisy = [0.95**i * (0.7 if i % 4 == 3 else 1.1) for i in range(60)]
    assert first_flat(LossPlateau(0.0, patience=2), noisy) is not None
    assert first_flat(LossPlateau(0.9, patience=2), noisy) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"smoothing": 1.0},
        {"smoothing": -0.1},
        {"threshold": 1.0},
        {"threshold": float("nan")},
        {"patience": -1},
        {"patience": 1.5},
        {"cooldown": True},
    ],
)
def test_settings_outside_their_domain_are_refused(arguments: dict[str, float]) -> None:
    """Catches a setting that would make the detector say always or never."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LossPlateau(**arguments)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_is_refused() -> None:
    """Catches NaN in the average, which would end all improvement."""
    with pytest.raises(ValueError, match="finite"):
        LossPlateau().observe(float("nan"))


def test_an_improvement_is_more_than_the_threshold() -> None:
    """Catches equality taken for an improvement: with threshold 0 a constant loss would never be flat."""
    assert first_flat(LossPlateau(0.0, threshold=0.0, patience=0), [1.0, 1.0]) == 1
    assert first_flat(LossPlateau(0.0, threshold=0.5, patience=0), [4.0, 2.0]) == 1
    assert first_flat(LossPlateau(0.0, threshold=0.0, patience=0), [0.0, 0.0]) == 1


def test_the_cooldown_counts_observations_after_a_flat_one() -> None:
    """Catches a cooldown that is one too long or short, and an improvement inside it that is forgotten."""
    plateau = LossPlateau(0.0, threshold=0.0, patience=1, cooldown=2)
    #        best  1st   flat  cool, cool, 1st   flat  cool, best         1st   flat
    losses = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert [plateau.observe(loss) for loss in losses] == [
        *(False, False, True),
        *(False, False, False, True),
        *(False, False, False, True),
    ]
