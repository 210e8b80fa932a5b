"""The report: what it reads, what it draws, and the page as a browser sees it."""

import contextlib
import io
import json
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, page_at
from conftest import ROOT, run_script, train

from nanofit.errors import UsageError
from nanofit.tools.report import log as logs
from nanofit.tools.report.log import EVALUATION, ITERATION, Log, smoothed, thinned
from nanofit.tools.report.run import Run, labels_of
from nanofit.units import GIB

pytestmark = pytest.mark.xdist_group("report")  # one process makes the run that they look at

FACTS = {
    "id": "aaaaaaaa", "time": "2026-01-01T00:00:00Z", "device": "CPU", "memory": 8 * GIB, "driver": "", "torch": "2.13",
    "python": "3.11", "ranks": 1, "config": {"dtype": "float32", "grad_clip": 1.0, "max_iters": 100, "lr": 0.1},
    "changed": ["lr"], "model_args": {"n_layer": 2}, "levers": {}, "plan": {
        "batch_size": 8, "gradient_accumulation_steps": 1, "micro_batch_size": 4, "limit_bytes": GIB,
        "reasons": ["compile off: <it takes longer>"], "trials": [
            {"micro_batch_size": 4, "peak_bytes": GIB // 2, "tokens_per_second": 1000.0, "limit_bytes": GIB},
            {"micro_batch_size": 8, "failure": "out of memory", "limit_bytes": GIB},
        ],
    },
}  # fmt: skip
PARTS = {"weights": 1.0, "gradients": 1.0, "optimizer state": 2.0, "activations": 3.0, "loss and backward": 0.5}


def iteration(it, **changed):
    return {
        "iter": it, "tokens": 64 * (it + 1), "lr": 1e-3, "loss": 4.0 - it / 100, "grad_norm": 0.5, "seconds": 0.1,
        "tokens_per_second": 640.0, "mfu": 0.3, "peak_bytes": 2**30, "memory_bytes": 2**29, "seconds_left": 9.0,
        **changed,
    }  # fmt: skip


def evaluation(it, **changed):
    return {
        "iter": it,
        "tokens": 64 * it,
        "lr": 1e-3,
        "train_loss": 3.9,
        "val_loss": 4.0,
        "best_val_loss": 4.0,
        **changed,
    }


def write(folder, records, mode="w"):
    Path(folder).mkdir(exist_ok=True)
    with open(Path(folder, "metrics.jsonl"), mode) as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records)


def a_run(folder="out", iterations=20, **facts):
    """A Run of made-up figures, without its folder's torch side."""
    records = [{"iter": 0, "run": {**FACTS, **facts}}]
    for it in range(iterations):
        records += [evaluation(it)] if it % 10 == 0 else []
        records.append(iteration(it))
    write(folder, records)
    memory = [
        {"name": name, "micro_batch_size": size, "parts": {part: int(k * size * 2**24) for part, k in PARTS.items()}}
        for name, size in (("this run", 4), ("nanoGPT's way", 4), ("nanoGPT's way", 8))
    ]
    return Run(folder, folder, Log(folder).update(), memory, {})


# ---- what it reads -----------------------------------------------------------------------------------------


def test_a_log_as_columns():
    write("out", [{"iter": 0, "run": FACTS}, evaluation(0), *map(iteration, range(3)), iteration(3, loss=None)])
    log = Log("out").update()
    assert [start["id"] for start in log.starts] == ["aaaaaaaa"]
    assert set(log.iterations) == set(ITERATION)
    assert set(log.evaluations) == set(EVALUATION)
    assert log.iterations["loss"] == pytest.approx([4.0, 3.99, 3.98, np.nan], nan_ok=True)
    assert log.iterations["tokens"].tolist() == [64, 128, 192, 256]
    assert log.evaluations["val_loss"].tolist() == [4.0]


def test_an_evaluation_that_is_not_finite_is_one_still():
    write("out", [evaluation(0, train_loss=None, val_loss=None, best_val_loss=None), iteration(0)])
    log = Log("out").update()
    assert (len(log.iterations["iter"]), len(log.evaluations["iter"])) == (1, 1)
    assert np.isnan(log.evaluations["val_loss"]).all()


def test_a_log_is_read_on_and_half_a_line_waits():
    write("out", [iteration(0)])
    log = Log("out").update()
    before = log.version
    assert log.update().version == before
    with open("out/metrics.jsonl", "a") as file:
        file.write(json.dumps(iteration(1))[:30])
    assert log.update().iterations["iter"].tolist() == [0]
    with open("out/metrics.jsonl", "a") as file:
        file.write(json.dumps(iteration(1))[30:] + "\n")
    assert log.update().iterations["iter"].tolist() == [0, 1]
    assert log.version != before


def test_a_log_that_was_cut_back_is_read_again():
    write("out", map(iteration, range(10)))
    log = Log("out").update()
    write("out", [*map(iteration, range(5)), *(iteration(it, seconds=0.2) for it in range(5, 30))])
    assert log.update().iterations["iter"].tolist() == list(range(30))
    assert log.iterations["seconds"][9] == 0.2


@pytest.mark.parametrize("damage", ['{"iter": 3, "lo\n', "\0\0\0\n", '[1, 2]\n{"iter": "3"}\n', '{"loss": {"a": 1}}\n'])
def test_a_damaged_line_costs_no_other(damage):
    write("out", map(iteration, range(3)))
    with open("out/metrics.jsonl", "a") as file:
        file.write(damage)
    write("out", map(iteration, range(3, 6)), "a")
    assert Log("out").update().iterations["iter"].tolist() == list(range(6))


def test_blocks_end_where_lines_do(monkeypatch):
    monkeypatch.setattr(logs, "BLOCK", 700)  # some three lines
    write("out", [{"iter": 0, "run": FACTS}, *map(iteration, range(50))])
    log = Log("out").update()
    assert log.iterations["iter"].tolist() == list(range(50))
    assert len(log.starts) == 1


def test_smoothing_leaves_out_what_is_not_known():
    values = np.array([1.0, 3.0, np.nan, 5.0])
    assert smoothed(values, share=0.5) == pytest.approx([2.0, 2.0, 4.0, 5.0])
    assert smoothed(np.full(100, 2.5)) == pytest.approx(np.full(100, 2.5))


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


def test_folders_of_the_same_name_are_told_apart():
    assert labels_of(["runs/a", "runs/b/"]) == ["a", "b"]
    assert labels_of(["x/out", "y/out"]) == ["x/out", "y/out"]


# ---- what it draws -----------------------------------------------------------------------------------------


def test_piles_add_up_to_the_peak_that_was_measured():
    from nanofit.tools.report.charts import PARTS as STACKED
    from nanofit.tools.report.charts import piles_of

    run = a_run()
    columns = piles_of(run)
    totals = [sum(columns[part][i] for part in STACKED) for i in range(3)]
    assert totals[0] == pytest.approx(1.0)  # peak_bytes of every iteration
    assert totals[1] - totals[0] == pytest.approx(0)  # both of 4 sequences, with the same parts here
    assert totals[2] > totals[1]


def test_a_simulation_that_exceeds_the_peak_stands_alone():
    from nanofit.tools.report.charts import REST, rest_of

    run = a_run()
    run.memory[0]["parts"]["weights"] = 4 * GIB
    assert rest_of(run) == 0
    assert REST not in run.memory[0]["parts"]


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "accumulation"), [(False, 1), (True, 4)])
def test_few_layers_tell_of_many(monkeypatch, recompute, accumulation):
    from nanofit.tools.report import memory

    facts = {
        **FACTS, "levers": {"recompute": recompute, "loss_chunk_mb": 1},
        "model_args": dict(n_layer=4, n_head=2, n_embd=32, block_size=64, vocab_size=512, dropout=0.0, bias=False),
        "plan": {"batch_size": 8, "gradient_accumulation_steps": accumulation, "micro_batch_size": 8},
    }  # fmt: skip
    found = {}
    for few in ((1, 2), (4, 4)):
        monkeypatch.setattr(memory, "FEW_LAYERS", few)
        with contextlib.redirect_stdout(io.StringIO()):
            found[few] = memory.simulated(str(ROOT / "model.py"), facts)
    for ours, whole in zip(found[1, 2], found[4, 4], strict=True):
        assert sum(ours["parts"].values()) == pytest.approx(sum(whole["parts"].values()), rel=0.01)


def test_facts_that_are_missing_or_damaged_make_no_picture_of_memory():
    from nanofit.tools.report.memory import ways_of

    assert ways_of({}) == []
    assert ways_of({"plan": {"batch_size": "x"}}) == []
    assert ways_of({**FACTS, "levers": {"unheard_of": 1}}) != ways_of(FACTS)
    assert [(name, job.micro_batch_size, job.micro_steps) for name, _, job in ways_of(FACTS)] == [
        ("this run", 4, 2), ("nanoGPT's way", 4, 2), ("nanoGPT's way", 8, 1),
    ]  # fmt: skip


# ---- the page ----------------------------------------------------------------------------------------------


def test_the_page_tells_what_was_decided_and_lets_nothing_run():
    from nanofit.tools.report.page import page_of

    run = a_run()
    Path("out/sample.txt").write_text("<script>alert(1)</script>")
    page = page_of([run])
    for words in (
        "batch_size 8 -&gt; 4", "compile off: &lt;it takes longer&gt;", "out of memory", "iteration 19 of 100",
        "&lt;script&gt;alert(1)", "The limit is 1.00 GiB", "8.00 GiB",
    ):  # fmt: skip
        assert words in page, words
    assert "<script>alert" not in page
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="([^"]*)"', markup) == ["data:,"]


def test_every_picture_has_a_text():
    from nanofit.tools.report.page import page_of

    page = page_of([a_run()])
    pictures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(pictures) == 6
    for picture in pictures:
        text = re.search(r"<figcaption[^>]*>(.*?)</figcaption>", picture, re.DOTALL)[1]
        assert re.search(r"\d", text), text
        heading = re.search(r'aria-labelledby="([^"]+)"', picture)[1]
        assert f'id="{heading}"' in picture


@pytest.mark.parametrize(
    "records", [[], [{"iter": 0, "run": {}}], [iteration(0, mfu=None, loss=None, peak_bytes=None)]]
)
def test_a_page_of_next_to_nothing(records):
    from nanofit.tools.report.page import page_of

    write("out", records)
    assert "Loss" in page_of([Run("out", "out", Log("out").update())])


def test_a_long_run_makes_a_small_page():
    from nanofit.tools.report.page import page_of

    write(
        "out",
        [{"iter": 0, "run": FACTS}, *(iteration(it, loss=4 + it % 7, lr=it / 7, mfu=it % 11) for it in range(50_000))],
    )
    with open("out/metrics.jsonl", "a") as file:
        file.write(json.dumps(iteration(50_000, loss=1234.5)) + "\n")
    run = Run("out", "out", Log("out").update())
    rows, _ = run.drawn(1)
    assert 1000 < len(rows["iter"]) <= 8000
    assert rows["loss"].max() == 1234.5
    assert len(page_of([run])) < 5e6


# ---- the script --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder out that a real run has trained in, with auto-fit, and its report.html."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(ROOT / "tests" / "reference" / "markov", place / "data" / "markov")
    with contextlib.chdir(place):
        told = train(max_iters=30, eval_interval=5, auto_fit=True, gradient_accumulation_steps=2).text
        run_script("sample.py", "--out_dir=out", "--num_samples=1", "--max_new_tokens=20", "--device=cpu", "--start=!")
        written = run_script("report.py", "out").text
    assert "python report.py out shows this run" in told
    assert written == "out/report.html\n"
    return place / "out"


def test_the_report_of_a_run(trained):
    page = (trained / "report.html").read_text()
    assert len(page) < 5e6
    for words in ("iteration 30 of 30", "auto-fit's trials", "checkpoint ckpt.pt", "n_layer 2", "Its last sample"):
        assert words in page, words
    assert "memory goes is not known" not in page
    assert not list(trained.glob("*.part"))


def test_runs_are_compared(trained):
    shutil.copytree(trained, "out-b")
    assert (
        run_script("report.py", str(trained), "out-b", "--png=curves.png").text
        == f"curves.png\n{trained}/report.html\n"
    )
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    page = (trained / "report.html").read_text()
    assert page.count("auto-fit's trials") == 2
    assert "out and out-b" in page


def test_what_is_missing_is_told(monkeypatch):
    with pytest.raises(UsageError, match=r"no figures in out: train.py --out_dir=out writes them"):
        run_script("report.py", "out")
    a_run()
    with pytest.raises(UsageError, match=r"out/metrics.jsonl is a file: report.py takes the out_dir of a run"):
        run_script("report.py", "out/metrics.jsonl")
    for package, sentence in (("bokeh", "pip install bokeh"), ("matplotlib", "pip install matplotlib")):
        for name in [name for name in sys.modules if name.startswith("nanofit.tools.report.")]:
            monkeypatch.delitem(sys.modules, name)
        with monkeypatch.context() as without:
            for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
                without.setitem(sys.modules, name, None)
            with pytest.raises(UsageError, match=sentence):
                run_script("report.py", "out", "--png=curves.png")


# ---- served while the run goes on --------------------------------------------------------------------------


@contextlib.contextmanager
def served(run):
    from nanofit.tools.report.server import server_of

    def load():
        run.log.update()
        return [run]

    with server_of(load, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield "http://{}:{}".format(*server.server_address)
        finally:
            server.shutdown()


def asked(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
        return answer.status, answer.read().decode()


def test_news_come_while_a_run_goes_on():
    with served(a_run(iterations=20)) as address:
        assert address.startswith("http://127.0.0.1:")
        _, page = asked(address)
        assert "refresh(page" in page
        _, news = asked(f"{address}/news?seen=")
        news = json.loads(news)
        assert news["data"]["iterations 0"]["iter"] == list(range(20))
        assert asked(f"{address}/news?seen={news['seen']}")[0] == 204
        write("out", [iteration(20, loss=None)], "a")
        _, more = asked(f"{address}/news?seen={news['seen']}")
        more = json.loads(more)
        assert more["data"]["iterations 0"]["loss"][-1] is None
        assert "iteration 20 of 100" in more["texts"]["text-summary"]


def test_others_names_for_this_machine_are_refused():
    with served(a_run()) as address:
        for path, headers, code in (("/", {"Host": "evil.example"}, 403), ("/metrics.jsonl", {}, 404)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                asked(address + path, **headers)
            assert refused.value.code == code


# ---- in a browser ------------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
LENGTHS = """
Object.fromEntries([...Bokeh.documents[0].all_models].filter(model => model.type == "ColumnDataSource" && model.name)
    .map(source => [source.name, Object.fromEntries(Object.entries(source.data).map(([k, v]) => [k, v.length]))]))
"""
MARKS = """
[...Bokeh.documents[0].all_models].filter(model => model.type == "GlyphRenderer" && model.data_source.name)
    .map(drawn => [drawn.data_source.name, Bokeh.index.find_one_by_id(drawn.id)?.glyph.data_size])
"""


@in_a_browser
@pytest.mark.slow
def test_the_page_in_a_browser(trained):
    from nanofit.tools.report.charts import PARTS as STACKED

    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    kinds = {
        "evaluations 0": [r for r in records if "val_loss" in r],
        "iterations 0": [r for r in records if "loss" in r],
    }
    with page_at((trained / "report.html").as_uri()) as page:
        drawn = page.evaluate(LENGTHS)
        for name, figures in kinds.items():
            assert set(drawn[name].values()) == {len(figures)}, name
        marks = page.evaluate(MARKS)
        assert len([count for name, count in marks if name == "iterations 0" and count == 31]) >= 8
        assert {count for name, count in marks if name == "evaluations 0"} == {7}

        data = page.evaluate(
            "Object.fromEntries(Object.entries(Bokeh.documents[0].get_model_by_name('memory 0').data))"
        )
        peak = max(r["peak_bytes"] for r in kinds["iterations 0"]) / GIB
        assert sum(data[part][0] for part in STACKED) == pytest.approx(peak, rel=0.01)
        chosen = records[0]["run"]["plan"]["micro_batch_size"]  # by speed, so that it is one or another
        configured = [] if chosen == 8 else ["nanoGPT's way, 8"]
        assert data["pile"] == [f"this run, {chosen}", f"nanoGPT's way, {chosen}", *configured]

        for width, dark in ((1280, False), (390, True)):
            page.show(width, 900, dark)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            ink = page.evaluate("Bokeh.documents[0].get_model_by_name('lr').below[0].major_label_text_color")
            assert ink == ("#9aa5b1" if dark else "#59636e")
        page.evaluate("document.getElementById('log').click()")
        page.wait_for("document.getElementById('loss-log').offsetHeight > 300")
        assert page.evaluate("document.getElementById('chart-loss').hidden")
        assert page.requests == [(trained / "report.html").as_uri()]
        assert not page.errors


@in_a_browser
@pytest.mark.slow
def test_a_watched_page_in_a_browser():
    with served(a_run(iterations=20)) as address, page_at(address) as page:
        page.wait_for("Bokeh.documents[0].get_model_by_name('iterations 0').data.iter.length == 20")
        write("out", [iteration(20, mfu=None)], "a")
        page.wait_for("Bokeh.documents[0].get_model_by_name('iterations 0').data.iter.length == 21")
        page.wait_for("document.getElementById('text-summary').textContent.includes('iteration 20')")
        assert page.evaluate("isNaN(Bokeh.documents[0].get_model_by_name('iterations 0').data.mfu[20])")
        assert {url.removeprefix(address).split("=")[0] for url in page.requests} == {"/", "/news?seen"}
        assert not page.errors
