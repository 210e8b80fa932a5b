"""The report: what it reads, what it draws, and the page as a browser sees it."""

import contextlib
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script, train

from nanofit.autofit.fit import Fitter
from nanofit.autofit.plan import Plan, Trial
from nanofit.errors import UsageError
from nanofit.tools.report.run import Run, thinned
from nanofit.units import GIB

pytestmark = pytest.mark.xdist_group("report")  # one process makes the run that they look at

FACTS = {
    "id": "aaaaaaaa", "device": "CPU", "memory": 8 * GIB, "driver": "", "torch": "2.13",
    "python": "3.11", "ranks": 1, "config": {"dtype": "float32", "grad_clip": 1.0, "max_iters": 100, "lr": 0.1},
    "changed": ["lr"], "model_args": {"n_layer": 2}, "levers": {}, "plan": {
        "batch_size": 8, "gradient_accumulation_steps": 1, "micro_batch_size": 4, "limit_bytes": GIB,
        "reasons": ["compile off: <it takes longer>"], "trials": [
            {"micro_batch_size": 4, "peak_bytes": GIB // 2, "tokens_per_second": 1000.0, "limit_bytes": GIB},
            {"micro_batch_size": 8, "failure": "out of memory", "limit_bytes": GIB},
        ],
    },
}  # fmt: skip
BEGUN = 1767225600.0  # 2026-01-01 00:00 UTC


def iteration(it, **changed):
    return {
        "iter": it, "time": BEGUN + 6 * it, "tokens": 64 * (it + 1), "lr": 1e-3, "loss": 4.0 - it / 100,
        "grad_norm": 0.5, "seconds": 0.1, "tokens_per_second": 640.0, "mfu": 0.3, "peak_bytes": 2**30,
        "memory_bytes": 2**29, "seconds_left": 9.0, **changed,
    }  # fmt: skip


def evaluation(it, **changed):
    told = {"tokens": 64 * it, "lr": 1e-3, "train_loss": 3.9, "val_loss": 4.0, "best_val_loss": 4.0}
    return {"iter": it, "time": BEGUN + 6 * it, **told, **changed}


def start(it=0, pause=0.0, **facts):
    return {"iter": it, "time": BEGUN + 6 * it + pause, "run": {**FACTS, **facts}}


def write(folder, records, mode="w"):
    Path(folder).mkdir(exist_ok=True)
    with open(Path(folder, "metrics.jsonl"), mode) as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records)


def a_run(folder="out", iterations=20, **facts):
    """A Run of made-up figures."""
    records = [start(**facts)]
    for it in range(iterations):
        records += [evaluation(it)] if it % 10 == 0 else []
        records.append(iteration(it))
    write(folder, records)
    return Run(folder, folder)


def test_a_log_as_columns():
    own = [iteration(1, noise=1.5), iteration(2, noise="odd")]  # a figure of one's own, which begins late
    write("out", [start(), evaluation(0, acc=0.2), iteration(0), *own, iteration(3, loss=None, mfu=-1)])
    run = Run("out", "out")
    assert run.facts["id"] == "aaaaaaaa"
    assert run.iterations["loss"] == pytest.approx([4.0, 3.99, 3.98, np.nan], nan_ok=True)
    assert run.iterations["tokens"].tolist() == [64, 128, 192, 256]
    assert np.isnan(run.iterations["mfu"][3]), "nanoGPT's -100% is no share"
    assert run.iterations["noise"] == pytest.approx([np.nan, 1.5, np.nan, np.nan], nan_ok=True)
    assert (run.evaluations["val_loss"].tolist(), run.evaluations["acc"].tolist()) == ([4.0], [0.2])


def test_what_a_run_took_leaves_out_its_pauses():
    first = map(iteration, range(10))
    later = [{**iteration(it), "time": BEGUN + 6 * it + 3600} for it in range(10, 20)]
    write("out", [start(), *first, start(10, pause=3594), *later])
    run = Run("out", "out")
    assert run.seconds == pytest.approx(9 * 6 + 6 + 9 * 6)
    assert [(iteration, date) for iteration, date, _ in run.starts] == [
        (0, "2026-01-01 00:00 UTC"), (10, "2026-01-01 01:00 UTC"),
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ['{"iter": 3, "lo\n', '[1, 2]\n{"iter": "3"}\n'])
def test_a_damaged_line_costs_no_other(damage):
    write("out", map(iteration, range(3)))
    with open("out/metrics.jsonl", "a") as file:
        file.write(damage)
    write("out", map(iteration, range(3, 6)), "a")
    assert Run("out", "out").iterations["iter"].tolist() == list(range(6))


def test_thinning_keeps_every_extreme():
    n = 100_000
    noise = np.random.default_rng(0).normal(size=(3, n))
    columns = {"iter": np.arange(n, dtype=float), "a": noise[0], "b": noise[1], "c": noise[2]}
    columns["a"][777] = 50.0
    columns["b"][99_999] = -50.0
    columns["c"][5000:70_000] = np.nan
    thin = thinned(columns, 2000)
    rows = thin["iter"].astype(int)
    assert 500 < len(rows) <= 2000
    assert (np.diff(rows) > 0).all()
    assert (rows[0], rows[-1]) == (0, n - 1)
    for name, values in columns.items():
        assert (thin[name] == values[rows])[~np.isnan(values[rows])].all()
        assert np.nanmax(thin[name]) == np.nanmax(values)
        assert np.nanmin(thin[name]) == np.nanmin(values)
    assert thinned(columns, n) is columns


def test_the_page_tells_what_was_decided_and_lets_nothing_run():
    from nanofit.tools.report.page import page_of

    run = a_run()
    Path("out/sample.txt").write_text("run aaaaaaaa, iteration 12\n<script>alert(1)</script>")
    page = page_of([run])
    for words in (
        "batch_size 8 -&gt; 4", "compile off: &lt;it takes longer&gt;", "batch_size 8: out of memory", "8.00 GiB",
        "&lt;script&gt;alert(1)", "iteration 19 of 100", "took 1.9 min, iteration",
    ):  # fmt: skip
        assert words in page, words
    assert "<script>alert" not in page
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="([^"]*)"', markup) == ["data:,"]


@pytest.mark.parametrize(
    "records",
    [[], [{"iter": 0, "run": {}}], [iteration(0, mfu=None, loss=None, peak_bytes=None)], [evaluation(0), iteration(0)]],
)
def test_a_page_of_next_to_nothing(records):
    from nanofit.tools.report.page import page_of

    write("out", records)
    assert "Loss" in page_of([Run("out", "out")])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder out that a real run has trained in, with auto-fit's answer made up, and its report.html."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(ROOT / "tests" / "reference" / "markov", place / "data" / "markov")
    plan = Plan(8, 2, 4, trials=(Trial(8, failure="out of memory"), Trial(4, peak_bytes=GIB, limit_bytes=GIB)))
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fitter, "plan", lambda *_: plan)
        told = train(max_iters=30, eval_interval=5, auto_fit=True, gradient_accumulation_steps=2).text
        run_script("sample.py", "--out_dir=out", "--num_samples=1", "--max_new_tokens=20", "--device=cpu", "--start=!")
        written = run_script("report.py", "out").text
    assert "python report.py out shows this run" in told
    assert written == "out/report.html\n"
    return place / "out"


def test_the_report_of_a_run(trained):
    page = (trained / "report.html").read_text()
    assert len(page) < 5e6
    for words in (
        "iteration 30 of 30",
        "auto-fit's trials",
        "ckpt.pt",
        "n_layer 2",
        "The last sample, at iteration 30",
    ):
        assert words in page, words
    assert not list(trained.glob("*.part"))


def test_runs_are_compared_in_a_page_of_their_own(trained):
    shutil.copytree(trained, "out-b")
    before = (trained / "report.html").read_text()
    assert run_script("report.py", str(trained), "out-b").text == f"{trained}/compared.html\n"
    page = (trained / "compared.html").read_text()
    assert page.count("auto-fit's trials") == 2
    assert "<h1>out, out-b</h1>" in page
    assert "Memory, in GiB; dashed: in use" in page, "as colours tell the runs"
    assert (trained / "report.html").read_text() == before


def test_what_is_missing_is_told(monkeypatch):
    with pytest.raises(UsageError, match=r"no figures in out: train.py --out_dir=out writes them"):
        run_script("report.py", "out")
    a_run()
    with pytest.raises(UsageError, match=r"out/metrics.jsonl is a file: report.py takes the out_dir of a run"):
        run_script("report.py", "out/metrics.jsonl")
    for name in [n for n in sys.modules if n.startswith("nanofit.tools.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    monkeypatch.setitem(sys.modules, "bokeh.plotting", None)
    with pytest.raises(UsageError, match="pip install bokeh"):
        run_script("report.py", "out")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>
const errors = []
addEventListener("error", event => errors.push(event.message))
console.error = console.warn = (...words) => errors.push(words.join(" "))
const waiting = setInterval(() => {
    if (!window.Bokeh?.documents[0]?.is_idle) return
    clearInterval(waiting)
    const models = [...Bokeh.documents[0].all_models]
    const marks = models.filter(model => model.type == "GlyphRenderer")
        .map(drawn => [drawn.glyph.y.field, Bokeh.index.find_one_by_id(drawn.id)?.glyph.data_size])
    const fetched = performance.getEntriesByType("resource").map(entry => entry.name)
    document.title = JSON.stringify({marks: Object.fromEntries(marks), errors,
        inks: models.map(model => model.major_label_text_color), width: document.documentElement.scrollWidth,
        fetched: fetched.filter(name => !name.startsWith("data:"))})
}, 50)
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_the_page_in_a_browser(trained, width, dark):
    Path("page.html").write_text((trained / "report.html").read_text().replace("<head>", f"<head>{LOOK}", 1))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", f"--window-size={width},900")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *flags, scheme, "--dump-dom", Path("page.html").resolve().as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(html.unescape(re.search("<title>(.*)</title>", page)[1]))
    drawn = ("loss", "smoothed", "lr", "tokens_per_second", "grad_norm", "peak_gib", "memory_gib")
    assert seen["marks"] == {**dict.fromkeys(drawn, 31), "train_loss": 7, "val_loss": 7}
    assert seen["width"] <= width, "nothing sticks out"
    assert ("#9aa5b1" if dark else "#59636e") in seen["inks"]
    assert (seen["fetched"], seen["errors"]) == ([], [])
