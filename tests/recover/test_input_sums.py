"""Sums about means, against NumPy on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from jaxquant.recover.covariance import APART, KEPT
from jaxquant.recover.input_sums import InputSums

KEPT_ROWS, APART_ROWS, K = 48, 16, 5


@pytest.fixture
def rows() -> np.ndarray:
    """[R, K], with means that are large beside what varies."""
    return np.random.default_rng(0).normal(size=(KEPT_ROWS + APART_ROWS, K)) + np.arange(K) * 10


def seen(rows: np.ndarray, has_added: bool) -> InputSums:
    parts = rows[:KEPT_ROWS], rows[KEPT_ROWS:]
    products = np.stack([(part.T @ part)[None] for part in parts])
    totals = np.stack([part.sum(axis=0)[None] for part in parts])
    return InputSums(
        products,
        totals,
        np.array([float(len(part)) for part in parts]),
        np.array([len(part) for part in parts]),
        has_added,
    )


def test_second_moments_where_nothing_takes_the_mean(rows):
    found, apart = seen(rows, has_added=False), rows[KEPT_ROWS:]
    np.testing.assert_allclose(found.varying(KEPT, APART)[0], rows.T @ rows)
    np.testing.assert_allclose(found.held_out()[0], apart.T @ apart)


def test_what_varies_about_the_mean_where_a_parameter_takes_it(rows):
    found = seen(rows, has_added=True)
    kept, apart = rows[:KEPT_ROWS], rows[KEPT_ROWS:]
    for parts, own in (((KEPT,), kept), ((KEPT, APART), rows)):
        about = own - own.mean(axis=0)
        noise = 1e-5 * np.einsum("rk,rk->k", own, own)
        np.testing.assert_allclose(found.varying(*parts)[0], about.T @ about + np.diag(noise))
    about = apart - kept.mean(axis=0)  # what is known of the mean is that of the others
    np.testing.assert_allclose(found.held_out()[0], about.T @ about, atol=1e-8)
    np.testing.assert_allclose(found.mean[0], rows.mean(axis=0))


def test_of_few_positions_no_mean_is_taken(rows):
    few = rows[KEPT_ROWS - 8 :]
    products = np.stack([(part.T @ part)[None] for part in (few[:8], few[8:])])
    totals = np.stack([part.sum(axis=0)[None] for part in (few[:8], few[8:])])
    found = InputSums(products, totals, np.array([8.0, 16.0]), np.array([8, 16]), has_added=True)
    assert not found.takes_mean
    np.testing.assert_allclose(found.varying(KEPT)[0], few[:8].T @ few[:8])
