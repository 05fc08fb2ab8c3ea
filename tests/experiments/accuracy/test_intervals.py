import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.accuracy.intervals import paired_difference

# (lost, gained, count, confidence) -> ends, as published.
KNOWN = [
    # Fagerland, Lydersen and Laake 2014: airway hyper-responsiveness before and after a transplant.
    ((1, 7, 21, 0.95), (-0.517, -0.026)),
    # Tango 1998: two ways to disinfect contact lenses.
    ((0, 1, 44, 0.90), (-0.096, 0.037)),
]


@pytest.mark.parametrize(("given", "ends"), KNOWN)
def test_published_intervals(given, ends):
    assert paired_difference(*given) == pytest.approx(ends, abs=5e-4)


def test_without_a_difference_the_ends_have_a_closed_form():
    z2 = 1.959963984540054**2
    assert paired_difference(0, 0, 650) == pytest.approx((-z2 / (650 + z2), z2 / (650 + z2)))


def test_all_items_lost():
    z2 = 1.959963984540054**2
    low, high = paired_difference(5, 0, 5)
    assert high == 1
    assert low == pytest.approx((5 - z2) / (5 + z2))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 100))
def test_the_estimate_is_inside_and_swapping_the_models_mirrors(lost, gained, others):
    count = lost + gained + others + 1
    low, high = paired_difference(lost, gained, count)
    assert -1 <= low <= (lost - gained) / count <= high <= 1
    assert low < high
    assert paired_difference(gained, lost, count) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("lost", "gained"), [(0.01, 0.01), (0.012, 0.004), (0.04, 0.03), (0, 0.01)]
)
def test_it_covers_the_true_difference_as_often_as_it_says(rng, lost, gained):
    draws = rng.multinomial(650, [lost, gained, 1 - lost - gained], size=20_000)
    outcomes, times = np.unique(draws[:, :2], axis=0, return_counts=True)
    intervals = [paired_difference(int(b), int(c), 650) for b, c in outcomes]
    covered = [low <= lost - gained <= high for low, high in intervals]
    share = times[covered].sum() / times.sum()
    assert 0.935 < share < 0.975  # 0.95, up to the steps of whole images


def test_numbers_that_do_not_fit_are_refused():
    for wrong in [(-1, 0, 5), (3, 3, 5), (0, 0, 0)]:
        with pytest.raises(ValueError, match="do not fit each other"):
            paired_difference(*wrong)
