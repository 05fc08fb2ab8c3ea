"""The page and the pictures; the page in a real browser where there is one."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import jaxquant
from jaxquant.analysis.plots import METHODS, thresholds
from tests.analysis import faults
from tests.analysis.test_analyze import quantized, scored

pytest.importorskip("matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

# Runs before the page's own script, and after it.
LISTEN = """<script>
window.problems = [];
window.addEventListener("error", e => problems.push(String(e.message || e.target.src)), true);
console.error = (...args) => problems.push(args.join(" "));
</script>"""
PROBE = """<script>
window.addEventListener("load", () => {
  const table = document.querySelector("#sites");
  const column = n => [...table.tBodies[0].rows].map(row => row.cells[n].innerText);
  const heads = [...table.querySelectorAll("th")];
  const place = name => heads.findIndex(head => head.innerText.trim().startsWith(name));
  const click = name => heads[place(name)].querySelector("button").click();
  const found = {columns: heads.map(head => head.innerText.trim())};
  click("own dB"); found.up = column(place("own dB"));
  click("own dB"); found.down = column(place("own dB"));
  click("site"); found.sites = column(place("site"));
  found.sorted = heads[place("site")].getAttribute("aria-sort");
  const images = [...document.images];
  found.images = images.length;
  found.broken = images.filter(image => !(image.complete && image.naturalWidth > 100)).length;
  found.requests = performance.getEntriesByType("resource")
    .map(entry => entry.name).filter(name => !name.startsWith("data:"));
  found.problems = problems;
  const out = document.createElement("pre");
  out.id = "found"; out.innerText = JSON.stringify(found); document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    qapply = quantized(faults.outlier_input_channel)[2]
    analysis = scored(faults.outlier_input_channel)
    jaxquant.report_html(path, qapply, analysis, title="A <planted> fault")
    return path


def test_the_page_is_whole_and_loads_nothing(page):
    text = page.read_text()
    assert "<title>A &lt;planted&gt; fault</title>" in text
    assert "c: its weights fill their grid badly" in html.unescape(text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert len(re.findall(r"<tr class=", text)) == 5
    assert "prefers-color-scheme: dark" in text
    legend = re.search(r"<dl>(.*?)</dl>", text)[1]
    assert "<dt>mul</dt><dd>a dot with a weight (a Dense or Linear layer)</dd>" in legend
    assert "<dt>own dB</dt>" in legend
    assert "<dt>conv2d</dt>" not in legend, "no site is one"


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_the_page_works_in_a_browser(page):
    text = page.read_text().replace("<style>", f"{LISTEN}<style>", 1)
    copy = page.with_name("probe.html")
    copy.write_text(text.replace("</body>", f"{PROBE}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [*command, profile, "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))
    assert found["problems"] == []
    assert found["requests"] == []
    assert found["broken"] == 0
    assert found["images"] == 3 + 2 * 5
    assert found["sites"] == list(faults.LAYERS)
    assert found["sorted"] == "ascending"
    values = [float(value) for value in found["up"]]
    assert values == sorted(values)
    assert found["down"] == found["up"][::-1]
    assert {"clipped %", "cause", "alone in int8"} <= set(found["columns"])


def test_the_page_can_do_without_an_analysis(tmp_path):
    fault, qparams, qapply = quantized(faults.outlier_input_channel)
    path = tmp_path / "report.html"
    jaxquant.report_html(path, qapply)
    assert "jaxquant.analyze" in path.read_text()
    saved = tmp_path / "model.safetensors"
    jaxquant.save_quantized_model(saved, qparams, qapply)
    jaxquant.report_html(path, jaxquant.load_quantized_model(saved)[1])
    assert fault.labels.size
    with pytest.raises(ValueError, match="there is no folder"):
        jaxquant.report_html(tmp_path / "missing" / "report.html", qapply)


def test_every_picture_shows_its_data():
    analysis = scored(faults.outlier_input_channel)
    bars = jaxquant.plots.sensitivity(analysis).axes[0].patches
    drops = [row["alone_drop"] for row in analysis.worst]
    assert [bar.get_height() for bar in bars[: len(drops)]] == drops
    lines = jaxquant.plots.sqnr(analysis).axes[0].lines
    assert list(lines[0].get_ydata()) == [row["own_db"] for row in analysis.rows]
    curve = jaxquant.plots.tradeoff(analysis).axes[0].lines[0].get_ydata()
    assert list(curve) == [score for _, _, score in analysis.summary["curve"]]
    weights = jaxquant.plots.weight_ranges(analysis, "c").axes[0].patches
    assert [bar.get_height() for bar in weights] == list(analysis.weights["c"])
    axes = jaxquant.plots.histogram(analysis, "c/input").axes[0]
    marked = [line.get_xdata()[0] for line in axes.lines]
    tensor = analysis.tensors["c/input"]
    assert marked == [tensor.threshold, *thresholds(tensor).values()]
    assert len(marked) == 1 + len(METHODS)
    steps = axes.patches[0].get_data()
    assert steps.values.sum() == tensor.stats.count
    assert np.all(np.diff(steps.edges) > 0)


def test_pictures_refuse_what_is_not_there():
    analysis = scored(faults.outlier_input_channel)
    with pytest.raises(ValueError, match="no quantized tensor 'd'; valid: a/input"):
        jaxquant.plots.histogram(analysis, "d")
    with pytest.raises(ValueError, match="no int8 weight of a site 'z'"):
        jaxquant.plots.weight_ranges(analysis, "z")
