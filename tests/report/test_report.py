import dataclasses
import json
import math
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.report.make import tree_bytes
from jaxquant.report.sqnr import decibel
from tests import networks, reference

KEYS = {
    "name",
    "kind",
    "scope",
    "status",
    "mode",
    "reason",
    "threshold",
    "threshold_max",
    "by_layer",
    "weight_scale_min",
    "weight_scale_max",
    "own_sqnr_db",
    "sqnr_db",
    "epilogue",
    "inputs",
    "rounding",
    "weight_path",
}
SUMMARY = {
    "backend",
    "read_dequantized",
    "recovery",
    "sites_int8",
    "sites_float",
    "kinds",
    "output_sqnr_db",
    "tensors_int8",
    "tensors_float",
    "bytes_before",
    "bytes_after",
    "algo",
    "weight_quantize_type",
    "mode",
    "group_size",
}
BAD = '<b>&"bad"\''  # a name that HTML must escape


def apply_fn(p, x):
    exact = jax.nn.relu(x @ p["exact"]["w"] + p["exact"]["b"])
    noisy = x @ p["noisy"]["w"]
    return exact, noisy @ noisy.T, x @ p[BAD]["w"]


@pytest.fixture(scope="module")
def quantized():
    params = {
        "exact": {"w": networks.exact_weight((6, 5)), "b": networks.whole_numbers((5,))},
        "noisy": {"w": networks.images(0, (6, 3))},
        BAD: {"w": jnp.ones((6, 2))},
    }
    x = networks.whole_numbers((4, 6))
    qparams, qapply = networks.quantize(params, apply_fn, x, skip=("<b>*",))
    return params, x, qparams, qapply


@pytest.fixture(scope="module")
def report(quantized):
    return quantized[3].report()


@pytest.fixture(scope="module")
def rows(report):
    return {row["name"]: row for row in report.rows}


def test_a_row_per_site_with_every_key(report, rows):
    assert list(rows) == ["exact", "noisy", "noisy/matmul", BAD]
    assert all(set(row) == KEYS for row in report.rows)
    assert [row["kind"] for row in report.rows] == ["mul", "mul", "matmul", "mul"]
    assert [row["status"] for row in report.rows] == ["int8", "int8", "float", "float"]


def test_int8_rows(quantized, rows):
    params = quantized[0]
    row = rows["exact"]
    assert (row["threshold"], row["weight_scale_min"], row["weight_scale_max"]) == (127, 1, 1)
    assert (row["reason"], row["epilogue"], row["weight_path"]) == ("", ["add", "max"], "exact/w")
    scale = np.abs(np.asarray(params["noisy"]["w"], np.float64)).max(0) / 127
    noisy = rows["noisy"]
    np.testing.assert_allclose(noisy["weight_scale_min"], scale.min(), rtol=1e-6)
    np.testing.assert_allclose(noisy["weight_scale_max"], scale.max(), rtol=1e-6)


def test_float_rows_have_reasons_and_no_scales(rows):
    assert rows["noisy/matmul"]["reason"] == "'matmul' is not in quantizable_op_type"
    assert rows[BAD]["reason"] == "skip='<b>*'"
    for name in ("noisy/matmul", BAD):
        row = rows[name]
        assert row["threshold"] is row["weight_scale_min"] is row["weight_scale_max"] is None


def test_sqnr_is_infinite_where_int8_is_exact_and_that_of_the_outputs_elsewhere(quantized, rows):
    params, x, qparams, _ = quantized
    assert rows["exact"]["sqnr_db"] == rows[BAD]["sqnr_db"] == math.inf
    weight = qparams["params"]["noisy"]["w"]
    kernel = np.asarray(weight["int8"], np.float64) * np.asarray(weight["scale"], np.float64)
    y = np.asarray(x, np.float64) @ np.asarray(params["noisy"]["w"], np.float64)
    noise = y - np.asarray(x, np.float64) @ kernel
    expected = 10 * np.log10((y**2).sum() / (noise**2).sum())
    assert rows["noisy"]["sqnr_db"] == pytest.approx(expected, abs=0.05)
    noisy = y - noise
    expected = 10 * np.log10(((y @ y.T) ** 2).sum() / ((y @ y.T - noisy @ noisy.T) ** 2).sum())
    assert rows["noisy/matmul"]["sqnr_db"] == pytest.approx(expected, abs=0.05)


def chain(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


@pytest.mark.parametrize("recover", [(), ("bias_correction",)])
def test_a_site_behind_a_bad_one_is_good_by_itself(recover):
    """The input of the first site is clipped to a thirtieth."""
    params = {"a": networks.images(0, (6, 8)), "b": networks.images(1, (8, 3))}
    x = networks.whole_numbers((16, 6))
    clipping = jaxquant.histogram_observer(
        lambda stats, levels: [s.abs_max / (1 if k else 30) for k, s in enumerate(stats)]
    )
    with pytest.warns(UserWarning, match="only"):
        _, qapply = jaxquant.quant_post(
            params, chain, [x], algo=clipping, recover=recover, progress=False
        )
    first, second = qapply.report().rows
    assert first["own_sqnr_db"] < 10
    assert first["own_sqnr_db"] == pytest.approx(first["sqnr_db"], abs=0.5)
    assert second["sqnr_db"] < 10 < 30 < second["own_sqnr_db"]


@pytest.mark.parametrize("full", [False, True])
def test_own_errors_are_those_of_an_analysis_on_the_same_batch(full):
    """Pooling too, whose error is none of the site behind it."""
    x = networks.images()
    params = networks.plain_params()
    qparams, qapply = jaxquant.quant_post(
        params, networks.plain_net, [x], is_full_quantize=full, progress=False
    )
    analysis = jaxquant.analyze(params, networks.plain_net, qparams, qapply, [x], progress=False)
    wanted = {row["name"]: row["own_sqnr_db"] for row in analysis.rows}
    found = {row["name"]: row["own_sqnr_db"] for row in qapply.report().rows}
    assert found == pytest.approx(wanted, abs=0.3)


def test_summary(quantized, report):
    qparams = quantized[2]
    summary = dict(report.summary)
    assert set(summary) == SUMMARY
    assert summary["recovery"] == {}
    assert (summary["sites_int8"], summary["sites_float"]) == (2, 2)
    assert (summary["tensors_int8"], summary["tensors_float"]) == (1, 3)
    assert (summary["algo"], summary["weight_quantize_type"]) == ("abs_max", "channel_wise_abs_max")
    assert summary["bytes_before"] == 4 * (6 * 5 + 5 + 6 * 3 + 6 * 2)
    int8 = 6 * 5 + 6 * 3
    scales, epilogues, tensors, floats = 5 + 3, 2 * 5 + 3, 2, 6 * 2
    assert summary["bytes_after"] == int8 + 4 * (scales + epilogues + tensors + floats)
    assert summary["bytes_after"] == sum(np.asarray(v).nbytes for v in jax.tree.leaves(qparams))


def test_text(report):
    text = str(report)
    lines = text.splitlines()
    heads = ["site", "kind", "runs", "in", "threshold"]
    assert lines[0].split() == [*heads, "own", "dB", "SQNR", "dB"]
    assert lines[2].split() == ["exact", "mul", "int8", "127", "inf", "inf"]
    assert lines[5] == "    'matmul' is not in quantizable_op_type"
    assert "mul: a dot with a weight (a Dense or Linear layer)" in " ".join(text.split())
    assert all(len(line) <= 80 for line in lines)
    assert "2 sites int8, 2 float: matmul 0 (+1 float), mul 2 (+1 float)." in lines
    assert "Tensors between them: 1 int8, 3 float:" in lines
    assert any(line.startswith("Parameters: 260 bytes before") for line in lines)
    assert any(line.startswith("On CPU the int8 convolutions and dots are") for line in lines)
    assert repr(report) == text
    # The columns are aligned: every one begins or ends where its rule does.
    ends = [i for i, c in enumerate(lines[1]) if c == "-" and lines[1][i + 1 : i + 2] in ("", " ")]
    rows = [line for line in lines[2:8] if not line.startswith("    ")]  # without the reasons
    assert len(rows) == 4
    assert all(line[end + 1 : end + 3].strip() == "" for line in rows for end in ends[:-1])


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.rows += tag == "tr"
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html_is_well_formed_and_escaped(report):
    text = report._repr_html_()
    parser = Tags()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert parser.rows == 5
    assert len(parser.cells) == 5 * 9
    assert BAD in parser.cells
    assert "<b>" not in text
    assert parser.cells[9:16] == ["exact", "mul", "int8", "127", "1", "inf", "inf"]
    assert parser.cells[16] == "add max"


def test_json_is_strict_and_holds_everything(report):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    data = json.loads(report.to_json(), parse_constant=refuse)
    assert data["summary"] == dict(report.summary)
    assert [row["name"] for row in data["rows"]] == ["exact", "noisy", "noisy/matmul", BAD]
    assert data["rows"][0]["sqnr_db"] is None  # infinite
    assert data["rows"][1] == report.rows[1]


def test_tree_bytes_counts_every_dtype_and_keys():
    tree = {
        "a": jnp.ones(3, jnp.bfloat16),
        "b": np.ones((2, 2), np.int8),
        "c": np.float32(1),
        "key": jax.random.key(0),
    }
    assert tree_bytes(tree) == 6 + 4 + 4 + 8


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (1.0, 0.0, math.inf), (0.0, 0.0, math.inf), (0.0, 1.0, -math.inf)],
)
def test_decibel(signal, noise, expected):
    assert decibel(signal, noise) == expected


def test_tensor_rows_give_a_reason_for_every_float_tensor(report):
    statuses = {(row["name"], row["status"]) for row in report.tensors}
    assert ("exact/input", "int8") in statuses
    assert ("noisy/matmul/input", "float") in statuses
    for row in report.tensors:
        assert bool(row["reason"]) == (row["status"] != "int8")


def test_a_normalisation_is_named_as_the_reason():
    """Local response normalisation between two int8 convolutions reads its input in float."""
    rng = np.random.default_rng(0)
    params = {n: {"w": jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)} for n in ("a", "b")}

    def apply_fn(p, x):
        y = jax.nn.relu(x @ p["a"]["w"])
        squares = jax.lax.reduce_window(y * y, 0.0, jax.lax.add, (1, 3), (1, 1), "SAME")
        return (y / (1.0 + squares) ** 0.75) @ p["b"]["w"]

    x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    _, qapply = jaxquant.quant_post(params, apply_fn, [x], is_full_quantize=True, progress=False)
    floats = [row for row in qapply.report().tensors if row["status"] == "float"]
    assert [row["reason"] for row in floats] == [
        "read by reduce_window_sum, which has no int8 form"
    ]
    assert "read by reduce_window_sum" in " ".join(str(qapply.report()).split())


def test_a_poor_model_warns_with_its_worst_sites():
    """One channel is a million times the others, which a single scale loses and the dot needs."""
    x = np.ones((4, 8), np.float32)
    x[:, 0] = 1e6
    w = np.zeros((8, 3), np.float32)
    w[1:] = 1.0

    def quantize():
        return jaxquant.quant_post(
            {"w": jnp.asarray(w)}, lambda p, x: x @ p["w"], [x], **reference.QUANTIZER
        )

    message = r"only 0\.0 dB .* falls most at w \(to 0\.0 dB, 0\.0 dB by its own error alone\)"
    with pytest.warns(UserWarning, match=message):
        _, qapply = quantize()
    assert qapply.report().summary["output_sqnr_db"] == pytest.approx(0.0, abs=0.01)


def outputs_of(apply_fn, params, x, **options):
    _, qapply = networks.quantize(params, apply_fn, x, **options)
    return qapply.report()


def test_each_output_has_a_row_with_its_worst_column():
    w = np.array(networks.images(0, (6, 3)))
    w[:, 1] = networks.exact_weight((6,), 1)  # its products are exact

    def apply_fn(p, x):
        return {"a": x @ p["w"], "b": [(x @ p["w"])[:, 0], jnp.argmax(x, -1)]}

    x = networks.whole_numbers((4, 6))
    report = outputs_of(apply_fn, {"w": jnp.asarray(w)}, x)
    first, second = report.outputs
    assert (first["name"], second["name"]) == ("a", "b/0")
    assert first["worst_column"] in (0, 2)
    assert first["worst_column_db"] < first["sqnr_db"]
    assert first["lost_columns"] == second["lost_columns"] == []
    assert second["worst_column"] is None  # a vector has no columns
    lines = str(report).splitlines()
    assert f"  Worst of 2: b/0, {second['sqnr_db']:.1f} dB." in lines or (
        f"  Worst of 2: a, {first['sqnr_db']:.1f} dB." in lines
    )
    worst = f"  Worst column: {first['worst_column']} of a, {first['worst_column_db']:.1f} dB."
    assert worst in lines


def test_a_column_that_is_one_value_in_int8_is_lost_and_named():
    """Two heads that one int8 tensor holds; the sum over all columns tells nothing."""

    def apply_fn(p, x):
        return jnp.sin((x @ p["w"]) @ p["eye"]) + x.sum() * 0.0

    w = np.asarray(networks.images(0, (6, 4))) * np.array([1.0, 1.0, 1.0, 1e-4], np.float32)
    params = {"w": jnp.asarray(w), "eye": jnp.eye(4)}
    with pytest.warns(UserWarning, match=r"one value on the first batch.*output\[\.\.\., 3\]"):
        report = outputs_of(apply_fn, params, networks.images(1, (16, 6)))
    (row,) = report.outputs
    assert row["lost_columns"] == [3]
    assert row["worst_column"] == 3
    assert row["worst_column_db"] == pytest.approx(0.0, abs=0.1)
    assert row["sqnr_db"] > 30
    assert "  Lost in output, one value in int8: columns 3." in str(report).splitlines()
    assert json.loads(report.to_json())["outputs"] == [row]


def test_what_a_relu_made_zero_is_not_lost():
    def apply_fn(p, x):
        return jax.nn.relu((x @ p["w"]) @ p["eye"])

    w = np.asarray(networks.images(0, (6, 3))) * np.array([1.0, 1.0, 1e-4], np.float32)
    params = {"w": jnp.asarray(w), "eye": jnp.eye(3)}
    report = outputs_of(apply_fn, params, networks.images(1, (16, 6)))
    assert report.outputs[0]["lost_columns"] == []


def test_long_names_are_cut_in_their_middle(report):
    name = "encoder/" + "/".join(f"layer_{i}" for i in range(20)) + "/kernel"
    rows = [dict(row, name=name, kind="depthwise_conv2d") for row in report.rows]
    lines = str(dataclasses.replace(report, rows=rows)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[2].startswith("encod")
    assert "…" in lines[2]
    assert "kernel" in lines[2]


def test_rows_as_a_data_frame(report):
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == [row["name"] for row in report.rows]
