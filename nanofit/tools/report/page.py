"""The report as one HTML page: a summary, the last sample, charts and tables."""

import os

import jinja2  # comes with Bokeh
import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import CustomJS
from bokeh.resources import Resources

from nanofit.autofit.plan import Trial, from_dict
from nanofit.tools.report.charts import charts_of
from nanofit.units import duration, gib

TITLES = {
    "loss": "Loss, in nats a token", "lr": "Learning rate", "speed": "Tokens per second",
    "norm": "Norm of the gradient, before clipping", "memory": "Memory, in GiB",
}  # fmt: skip
DASHED = {"loss": "; dashed: validation", "memory": "; dashed: in use, else the peak"}  # where colours tell runs
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(os.path.dirname(__file__)), autoescape=True)


def page_of(runs):
    """The whole page as a str, with everything that it needs."""
    charts, document, several = charts_of(runs), Document(), len(runs) > 1
    for chart in charts.values():
        document.add_root(chart)
    document.js_on_event("document_ready", CustomJS(code="pageIsReady()"))
    script, places = components(charts, wrap_script=False)
    return TEMPLATES.get_template("page.html").render(
        title=", ".join(run.label for run in runs), runs=runs, script=script,
        summary=[f"{run.label}: {_summary(run)}" if several else _summary(run) for run in runs],
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(), tables=[tables_of(run) for run in runs],
        charts={TITLES.get(name, name) + DASHED.get(name, "") * several: place for name, place in places.items()},
    )  # fmt: skip


def _known(values):
    return values[~np.isnan(values)]


def _summary(run):
    done, words = run.iterations["iter"], []
    if not len(done):
        return "no iteration yet."
    if run.seconds:
        words.append(f"took {duration(run.seconds)}")
    if resumes := len(run.starts) - 1:
        words.append(f"{resumes} resume{'s' if resumes > 1 else ''}")
    most = run.facts.get("config", {}).get("max_iters")
    words.append(f"iteration {done[-1]:,.0f}" + (f" of {most:,}" if most else ""))
    words.append(f"{run.iterations['tokens'][-1]:,.0f} tokens")
    if len(best := _known(run.evaluations["best_val_loss"])):
        words.append(f"best validation loss {best[-1]:.4f}")
    if len(speed := _known(run.iterations["tokens_per_second"])):
        words.append(f"{np.median(speed[-100:]):,.0f} tokens/s on {run.facts.get('device', 'a device')}")
    if (left := run.iterations["seconds_left"][-1]) > 0:  # false for nan
        words.append(f"{duration(left)} left when this was written")
    return ", ".join(words) + "."


# ---- tables ------------------------------------------------------------------------------------------------


def tables_of(run):
    """What the page shows about one run besides its charts."""
    facts, plan, config = run.facts, run.plan, run.facts.get("config", {})
    trials = filter(None, (from_dict(Trial, told) for told in (plan.trials if plan else ())))
    about = {
        "device": facts.get("device"),
        "memory": gib(facts["memory"]) if facts.get("memory") else None,
        "driver": facts.get("driver"),
        "ranks": facts.get("ranks"),
        "torch": facts.get("torch"),
        "Python": facts.get("python"),
        "model": ", ".join(f"{name} {value}" for name, value in facts.get("model_args", {}).items()),
        "begun": run.starts[0][1] if run.starts else None,
        "gone on": ", ".join(f"{date} at iteration {iteration:,}" for iteration, date, _ in run.starts[1:]),
        **run.checkpoints,
    }
    changed = {name: config.get(name) for name in facts.get("changed", [])}
    if changed.get("init_from") in ("resume", "auto"):
        del changed["init_from"]  # not a setting of the run
    return {
        "about": {name: value for name, value in about.items() if value},
        "changed": changed,
        "split": f"{plan}{plan.levers}" if plan else "",
        "reasons": plan.reasons if plan else (),
        "trials": [f"batch_size {t.micro_batch_size}{t.levers}{', compiled' * t.compiled}: {t}" for t in trials],
    }
