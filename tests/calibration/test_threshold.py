"""Thresholds: golden values, plain references written from the definitions, and properties."""

import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxquant.calibration import kl
from jaxquant.calibration import threshold as th
from jaxquant.calibration.search import run_search, validated
from jaxquant.calibration.sums import SYMMETRIC_LEVELS

pytestmark = pytest.mark.optimized

ORACLES = Path(__file__).parent.parent / "data" / "kl_thresholds.npz"
SEARCHES = {
    "kl": kl.kl_threshold,
    "percentile": th.percentile_threshold,
    "mse": th.mse_threshold,
}
settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=10)


# --- references -----------------------------------------------------------------------------------


def kl_curve(counts, variant="jaxquant", abs_max=None):
    """The candidates of a search, in bins, and their divergences, NaN for what does not compete."""
    hist = validated(counts, 1.0, abs_max, SYMMETRIC_LEVELS)
    candidates, divergences = run_search(kl.KL_VARIANTS[variant].curve, hist)
    shape = (*hist.shape, -1)
    return candidates.reshape(shape), divergences.reshape(shape)


def reference_paddle(hist: list[int], start: int, groups: int) -> tuple[float, dict[int, float]]:
    """Threshold in bins and divergence by candidate, straight from the definition."""
    total = sum(hist)
    divergences = {}
    for i in range(start, len(hist)):
        if hist[i - 1] == 0:
            continue
        p = [*hist[: i - 1], hist[i - 1] + sum(hist[i:])]
        q = [0.0] * i
        for g in range(groups):
            size = i // groups
            group = range(g * size, i if g == groups - 1 else (g + 1) * size)
            members = [j for j in group if p[j]]
            for j in members:
                q[j] = sum(hist[m] for m in group) / len(members)
        q_total = sum(hist[:i])
        divergences[i] = sum(
            p[j] / total * math.log(p[j] / total / (q[j] / q_total)) for j in range(i) if p[j]
        )
    if divergences:
        return min(divergences, key=divergences.__getitem__) + 0.5, divergences
    return max((j for j in range(start + 1) if hist[j]), default=0) + 0.5, {}


def reference_nvidia(hist: list[int]) -> float:
    hist = [hist[1], *hist[1:]]
    best, best_divergence = 0, math.inf
    for i in range(128, len(hist) + 1):
        p = np.array(hist[:i], np.float64)
        group = np.arange(i) * 128 // i
        q = np.zeros(i)
        for g in range(128):
            members = (group == g) & (p > 0)
            if members.any():
                q[members] = p[members].mean()
        p[-1] += sum(hist[i:])
        if not q.any():
            divergence = -math.inf
        else:
            p, q = p / p.sum(), q / q.sum()
            with np.errstate(divide="ignore"):
                divergence = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if divergence <= best_divergence + 1e-13:
            best, best_divergence = i, min(divergence, best_divergence)
    return best


def reference_int8(hist: list[int], threshold: float) -> tuple[float, float]:
    """Divergence and summed squared error of one threshold, by cutting each bin at level edges."""
    h = np.array(hist, np.float64)
    h[0] = min(h[0], h[1])
    step = threshold / 127
    divergence, error = 0.0, 0.0
    for level in range(128):
        low = max(level - 0.5, 0.0) * step
        high = (level + 0.5) * step if level < 127 else math.inf
        mass, length, pieces = 0.0, 0.0, []
        for j in range(len(h)):
            a, b = max(low, j), min(high, j + 1)
            if h[j] and a < b:
                mass += h[j] * (b - a)
                length += b - a
                pieces.append((h[j], b - a))
                c = level * step
                error += h[j] * ((b - c) ** 3 - (a - c) ** 3) / 3
        for density, width in pieces:
            divergence += density * width * math.log(density / (mass / length))
    return divergence / max(h.sum(), 1.0), error


def clipped_squares(h: list[int], threshold: float) -> float:
    """The squared clipping error alone, bin by bin; T is a bin edge."""
    return sum(
        n * ((j + 1 - threshold) ** 3 - (j - threshold) ** 3) / 3
        for j, n in enumerate(h)
        if j >= threshold
    )


def sqnr_db(x: np.ndarray, threshold: float) -> float:
    step = threshold / 127
    q = np.clip(np.rint(x / step), -127, 127) * step
    return 10 * math.log10(np.mean(x**2) / np.mean((x - q) ** 2))


def histogram(x: np.ndarray, bins: int = 2048) -> tuple[np.ndarray, float, float]:
    """Counts, bin width and abs max, over a power-of-two range as the streaming histogram's."""
    abs_max = float(np.abs(x).max())
    top = 2.0 ** math.frexp(abs_max)[1]
    return np.histogram(np.abs(x), bins, (0.0, top))[0], top / bins, abs_max


def distributions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    g = rng.standard_normal(50_000)
    return {
        "normal": g,
        "laplace": rng.laplace(size=g.size),
        "relu": np.maximum(g, 0),
        "sparse_relu": np.maximum(g - 1.5, 0),
        "relu6": np.clip(3 * g + 1, 0, 6),
        "saturated_relu6": np.clip(8 * g, 0, 6),
        "student_t": rng.standard_t(3, size=g.size),
        "one_outlier": np.append(g, 100.0),
        "uniform": rng.uniform(-1, 1, g.size),
        "swish": 3 * g / (1 + np.exp(-3 * g)),
        "hard_swish": 3 * g * np.clip(3 * g + 3, 0, 6) / 6,
        "two_modes": np.where(rng.uniform(size=g.size) < 0.99, 0.1 * g, 0.1 * g + 5),
    }


# --- golden values --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracles() -> dict[str, dict[str, np.ndarray]]:
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(ORACLES) as data:
        for key in data.files:
            name, field = key.split("/")
            cases.setdefault(name, {})[field] = data[key]
    assert len(cases) == 8
    return cases


def stacked(oracles, field: str) -> np.ndarray:
    return np.stack([case[field] for case in oracles.values()])


def widths(oracles) -> np.ndarray:
    edges = stacked(oracles, "edges")
    return edges[:, 1] - edges[:, 0]


@pytest.mark.parametrize("version", ["3.3", "1.6"])
def test_paddle_thresholds_are_the_oracles(oracles, version):
    got = kl.kl_threshold(stacked(oracles, "hist"), widths(oracles), f"paddle-{version}")
    # Paddle multiplies in float32, so its value is ours rounded to float32, bit for bit.
    np.testing.assert_array_equal(
        got.astype(np.float32), stacked(oracles, f"paddle_{version}_threshold")
    )


def test_paddle_divergence_curve_is_the_oracles(oracles):
    candidates, got = kl_curve(stacked(oracles, "hist"), "paddle-3.3")
    np.testing.assert_array_equal(candidates[0], np.arange(1023, 2048) + 0.5)
    np.testing.assert_allclose(got, stacked(oracles, "paddle_3.3_divergence"), rtol=0, atol=1e-11)


def test_nvidia_thresholds_are_the_oracles(oracles):
    edges = stacked(oracles, "edges").astype(np.float64)
    got = kl.kl_threshold(stacked(oracles, "hist"), 1.0, "nvidia")
    want = (stacked(oracles, "nvidia_s8_threshold") - edges[:, 0]) / widths(oracles)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)  # the edges are float32


# --- against the references -----------------------------------------------------------------------


def sparse_histograms(bins: int) -> st.SearchStrategy[list[int]]:
    count = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10**15))
    return st.lists(count, min_size=bins, max_size=bins).filter(any)


@settings
@hypothesis.given(sparse_histograms(300))
def test_paddle_matches_reference(hist):
    for name, start, groups in [("3.3", 0.5, 127), ("1.6", 0.7, 255)]:
        want, curve = reference_paddle(hist, int(299 * start), groups)
        candidates, got = kl_curve(hist, f"paddle-{name}")
        expected = [curve.get(int(i), math.nan) for i in candidates]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
        chosen = float(kl.kl_threshold(hist, 1.0, f"paddle-{name}"))
        if curve:  # rounding may decide between equals
            assert curve[int(chosen)] <= curve[int(want)] + 1e-10
        else:
            assert chosen == want


@settings
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.9))
def test_nvidia_matches_reference(seed, empty):
    rng = np.random.default_rng(seed)
    hist = rng.integers(1, 100, 200) * (rng.uniform(size=200) >= empty)
    assert float(kl.kl_threshold(hist, 1.0, "nvidia")) == reference_nvidia(hist.tolist())


@settings
@hypothesis.given(sparse_histograms(24), st.floats(0.05, 1.0))
def test_default_matches_reference(hist, fraction):
    last = max(j for j in range(24) if hist[j])
    limit = last + fraction
    candidates = [min(i, limit) for i in range(1, 25)]
    want = [reference_int8(hist, t) for t in candidates]
    errors = np.array([error for _, error in want])
    h = [min(hist[:2]), *hist[1:]]
    weighted = errors + [15 * clipped_squares(h, t) if t < limit else 0.0 for t in candidates]
    got_candidates, got = kl_curve(hist, abs_max=limit)
    np.testing.assert_allclose(got_candidates, candidates)
    competes = ~np.isnan(got)
    np.testing.assert_allclose(got[competes], [d for d, _ in np.array(want)[competes]], atol=1e-9)
    # The running sums carry about 1e-16 of the largest term, the second moment.
    slack = 1e-12 * sum(h * (j + 1) ** 2 for j, h in enumerate(hist))
    assert np.all(weighted[competes] <= weighted[-1] * (1 + 1e-6) + slack)
    assert np.all(weighted[~competes] >= weighted[-1] * (1 - 1e-6) - slack)
    assert competes[-1]
    chosen = float(kl.kl_threshold(hist, 1.0, abs_max=limit))
    assert got[got_candidates == chosen][0] <= np.nanmin(got) + 1e-10
    best = float(th.mse_threshold(hist, 1.0, abs_max=limit))
    assert reference_int8(hist, best)[1] <= errors.min() * (1 + 1e-9) + slack


def test_mse_is_exact_for_values_spread_within_their_bins():
    rng = np.random.default_rng(0)
    hist = rng.integers(0, 50, 600)
    # 64 values in the middle of as many equal parts of each bin stand for an even spread.
    x = (np.arange(600)[:, None] + (np.arange(64) + 0.5) / 64).ravel()
    weights = np.repeat(hist.astype(np.float64), 64)
    weights[:64] = min(hist[0], hist[1])

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(np.sum(weights * (x - np.minimum(np.rint(x / step), 127) * step) ** 2))

    best = float(th.mse_threshold(hist, 1.0))
    assert error(best) <= min(error(float(t)) for t in range(400, 601)) * (1 + 1e-4)


# --- what the default repairs ---------------------------------------------------------------------


@pytest.mark.parametrize("name", distributions())
def test_default_is_never_worse_than_abs_max(name):
    x = distributions()[name]
    counts, width, abs_max = histogram(x)
    threshold = float(kl.kl_threshold(counts, width, abs_max=abs_max))
    assert 0 < threshold <= abs_max
    assert sqnr_db(x, threshold) >= sqnr_db(x, abs_max) - 0.05  # the histogram is an estimate


@pytest.mark.parametrize("name", ["relu", "sparse_relu", "hard_swish"])
def test_textbook_search_clips_hard(name):
    x = distributions()[name]
    counts, width, abs_max = histogram(x)
    full, edges = np.histogram(np.abs(x), 2048)  # as Paddle does, up to abs max
    textbook = float(kl.kl_threshold(full, edges[1], "paddle-3.3"))
    default = float(kl.kl_threshold(counts, width, abs_max=abs_max))
    assert sqnr_db(x, textbook) < sqnr_db(x, default) - 3


@pytest.mark.parametrize("name", ["laplace", "student_t"])
def test_default_gains_where_clipping_pays(name):
    x = distributions()[name]
    counts, width, abs_max = histogram(x)
    threshold = float(kl.kl_threshold(counts, width, abs_max=abs_max))
    assert threshold < 0.98 * abs_max
    assert sqnr_db(x, threshold) > sqnr_db(x, abs_max) + 0.1


def test_saturated_activation_is_not_clipped():
    counts, width, abs_max = histogram(distributions()["relu6"])
    assert float(kl.kl_threshold(counts, width, abs_max=abs_max)) == 6.0


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("value", [1.0, 1.5, 0.7, 3.999, 1e-30, 3e38])
def test_constant_is_covered(search, value):
    counts, width, _ = histogram(np.full(1000, value))
    got = float(search(counts, width, abs_max=value))
    assert got == pytest.approx(value, rel=1e-9 if search is not th.percentile_threshold else 1e-3)
    uncertain = float(search(counts, width))
    assert value * (1 - 1e-3) <= uncertain <= value * (1 + 2e-3)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_all_zero_gives_zero(search):
    zeros = np.zeros(2048, np.int64)
    assert float(search(zeros, 1.0)) == 0.0  # no data
    zeros[0] = 10**6
    assert float(search(zeros, 1.0)) == 0.0
    assert float(search(zeros, 1.0, abs_max=0.0)) == 0.0


def test_zero_spike_does_not_matter():
    counts, width, abs_max = histogram(distributions()["relu"])
    want = float(kl.kl_threshold(counts, width, abs_max=abs_max))
    counts[0] += 10**12
    assert float(kl.kl_threshold(counts, width, abs_max=abs_max)) == want


# --- properties of all ----------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_leading_axes_and_scaling(search):
    cases = [histogram(x) for x in list(distributions().values())[:6]]
    counts = np.stack([c for c, _, _ in cases]).reshape(2, 3, -1)
    width = np.array([w for _, w, _ in cases]).reshape(2, 3)
    together = search(counts, width)
    assert together.shape == (2, 3)
    assert together.dtype == np.float64
    np.testing.assert_array_equal(together[1, 2], search(counts[1, 2], width[1, 2]))
    np.testing.assert_allclose(search(counts, 4 * width), 4 * together)
    np.testing.assert_allclose(search(counts * 10**9, width), together)
    np.testing.assert_array_equal(search(jax.numpy.asarray(counts, "int32"), width), together)
    assert search(counts[:0], width[:0]).shape == (0, 3)


def test_x64_stays_off():
    kl.kl_threshold(np.ones(2048), 1.0)
    assert jax.numpy.ones(1).dtype == np.float32


def test_percentile():
    hist = np.array([10, 0, 5, 5, 80, 0])
    for percent, want in [(0.05, 0.5), (0.1, 1.0), (0.15, 3.0), (0.6, 4.5), (1.0, 5.0)]:
        assert float(th.percentile_threshold(hist, 2.0, percent)) == pytest.approx(2 * want)
    assert float(th.percentile_threshold(hist, 2.0, 1.0, abs_max=8.5)) == 8.5


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variant": "padle-3.3"}, "unknown KL variant 'padle-3.3'; did you mean 'paddle-3.3'"),
        ({"variant": ""}, "unknown KL variant ''"),
        ({"counts": [1, -2, 3]}, r"counts must not be negative; got -2.0 at index \(1,\)"),
        ({"counts": [[1, 2], [3, math.nan]]}, r"counts must be finite; got nan at index \(1, 1\)"),
        ({"counts": [1]}, r"N >= 2 bins; got shape \(1,\)"),
        ({"counts": 3}, r"got shape \(\)"),
        ({"counts": ["a", "b"]}, "got shape .* and dtype <U1"),
        ({"bin_width": 0.0}, "bin_width must be positive and finite; got 0.0"),
        ({"bin_width": math.nan}, "bin_width must be positive and finite; got nan"),
        ({"bin_width": [1.0, 2.0]}, r"bin_width must have the leading shape of counts, \(\)"),
        ({"abs_max": -1.0}, "abs_max must be >= 0; got -1.0"),
        ({"abs_max": 1.5}, "abs_max lies below the last bin in use; got 1.5"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        kl.kl_threshold(**{"counts": [1, 2, 3], "bin_width": 1.0, **kwargs})


@pytest.mark.parametrize("percent", [0.0, 1.5, -1.0, math.nan])
def test_bad_percent(percent):
    with pytest.raises(ValueError, match=r"percent is a fraction in \(0, 1\]"):
        th.percentile_threshold([1, 2, 3], 1.0, percent)


def test_many_tensors_of_either_grid_are_searched_as_one_by_one(rng):
    """They go in chunks by their number of levels and come back in their own order."""
    counts = rng.integers(0, 100, (19, 256)) * (rng.random((19, 256)) < 0.8)
    levels = np.where(rng.random(19) < 0.5, 127, 255)
    together = kl.kl_threshold(counts, 0.1, levels=levels)
    alone = [float(kl.kl_threshold(h, 0.1, levels=steps)) for h, steps in zip(counts, levels)]
    np.testing.assert_array_equal(together, alone)
    assert kl.kl_threshold(np.zeros((0, 256)), 0.1).shape == (0,)
