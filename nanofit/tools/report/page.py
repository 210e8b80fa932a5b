"""The report as one HTML page: charts, a text for each of them, and tables."""

import os
import time

import jinja2  # comes with Bokeh
import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import CustomJS
from bokeh.resources import Resources

from nanofit.tools.report.charts import OUT_OF_SIGHT, PARTS, REST, charts_of, piles_of
from nanofit.units import GIB, duration

TOO_LITTLE = 0.05 / 1024  # GiB: a part that would be told as 0.0 MiB
TITLES = {
    "loss": "Loss, in nats a token", "lr": "Learning rate", "speed": "Tokens per second",
    "norm": "Norm of the gradient", "memory": "Memory, in GiB",
}  # fmt: skip
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(os.path.dirname(__file__)), autoescape=True)


def page_of(runs, watched=False):
    """The whole page, a str that needs nothing beside it. watched: it asks whoever serves it for news."""
    charts = charts_of(runs)
    document = Document()
    for chart in charts.values():
        document.add_root(chart)
    document.js_on_event("document_ready", CustomJS(code="pageIsReady()"))
    script, places = components(charts, wrap_script=False)
    return TEMPLATES.get_template("page.html").render(
        title=" and ".join(run.label for run in runs), titles=TITLES, runs=runs, places=places, script=script,
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(), texts=texts_of(runs), watched=watched,
    )  # fmt: skip


def texts_of(runs):
    """{id of an element: its HTML}: everything in the page but the charts, as it is now."""
    several = len(runs) > 1
    lines = TEMPLATES.from_string("{% for line in lines %}<p>{{ line }}</p>{% endfor %}")
    html = {}
    for name, text in TEXTS.items():
        html[f"text-{name}"] = lines.render(
            lines=[f"{run.label}: {text(run)}" if several else text(run) for run in runs]
        )
    for i, run in enumerate(runs):
        html[f"text-parts_{i}"] = lines.render(lines=_parts(run))
        html[f"run-{i}"] = TEMPLATES.get_template("run.html").render(run=run, **tables_of(run))
    return html


# ---- a text for each picture -------------------------------------------------------------------------------


def _known(values):
    return values[~np.isnan(values)]


def _size(gib):
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def _summary(run):
    iterations, facts = run.log.iterations, run.facts
    done = iterations["iter"]
    if not len(done):
        return "no iteration yet."
    words = [f"iteration {done[-1]:,.0f} of {facts.get('config', {}).get('max_iters', 0):,}"]
    words.append(f"{iterations['tokens'][-1]:,.0f} tokens")
    if len(best := _known(run.log.evaluations["best_val_loss"])):
        words.append(f"best validation loss {best[-1]:.4f}")
    words.append(
        f"{np.median(iterations['tokens_per_second'][-100:]):,.0f} tokens/s on {facts.get('device', 'a device')}"
    )
    if (left := iterations["seconds_left"][-1]) > 0:  # which nan isn't
        words.append(f"{duration(left)} left when this was written")
    return ", ".join(words) + "."


def _loss(run):
    iterations, evaluations = run.log.iterations, run.log.evaluations
    training = _known(iterations["loss"])
    words = []
    if len(training):
        last = training[-max(1, len(training) // 50) :].mean()
        words.append(f"Training loss from {training[0]:.3f} to {last:.3f} in {len(training):,} figures.")
    if lost := len(iterations["loss"]) - len(training):
        words.append(f"{lost:,} of its figures are not finite.")
    if len(val := evaluations["val_loss"]) and not np.isnan(val).all():
        at = np.nanargmin(val)
        words.append(
            f"Validation loss {val[at]:.3f} at its lowest, at iteration {evaluations['iter'][at]:,.0f}, and "
            f"{val[-1]:.3f} at last."
        )
    return " ".join(words) or "No figures yet."


def _lr(run):
    lr = _known(run.log.iterations["lr"])
    if not len(lr):
        return "No figures yet."
    at = run.log.iterations["iter"][np.nanargmax(run.log.iterations["lr"])]
    return f"From {lr[0]:.2g} to {lr[-1]:.2g}, highest at iteration {at:,.0f} with {lr.max():.2g}."


def _speed(run):
    speed, seconds = _known(run.log.iterations["tokens_per_second"]), _known(run.log.iterations["seconds"])
    if not len(speed):
        return "No figures yet."
    low, middle, high = np.percentile(speed, (5, 50, 95))
    mfu = _known(run.log.iterations["mfu"])
    share = f", model FLOP/s utilisation {mfu[-1]:.1%}" if len(mfu) else ""
    return (
        f"Median {middle:,.0f} tokens a second, nine in ten between {low:,.0f} and {high:,.0f}; "
        f"{np.median(seconds):.3g} seconds an iteration{share}."
    )


def _norm(run):
    columns = run.log.iterations
    norms = _known(columns["grad_norm"])
    if not len(norms):
        return "No figures yet."
    at = columns["iter"][np.nanargmax(columns["grad_norm"])]
    return f"Before clipping: median {np.median(norms):.3g}, highest {norms.max():.3g} at iteration {at:,.0f}."


def _memory(run):
    peak, held = _known(run.log.iterations["peak_bytes"]), _known(run.log.iterations["memory_bytes"])
    words = []
    if len(peak):
        words.append(f"Peak {peak.max() / GIB:.2f} GiB")
    if len(held):
        words.append(f"in use {held[-1] / GIB:.2f} GiB")
    if run.limit_bytes:
        words.append(f"limit {run.limit_bytes / GIB:.2f} GiB")
    return (", ".join(words) or "Not known on this system") + "."


def _parts(run):
    """Lines, of which the others are one each."""
    if not run.memory:
        return [f"Where this run's memory goes is not known: {run.failure or 'its first line tells too little'}."]
    columns = piles_of(run)
    piles = list(zip(*(columns[part] for part in PARTS), strict=True))
    lines = []
    for name, pile in zip(columns["pile"], piles, strict=True):
        held = ", ".join(f"{part} {_size(gib)}" for part, gib in zip(PARTS, pile, strict=True) if gib > TOO_LITTLE)
        lines.append(f"{name} sequences: {_size(sum(pile))} ({held}).")
    limit = run.limit_bytes / GIB
    if limit:
        beyond = ", beyond this picture" if limit > OUT_OF_SIGHT * max(map(sum, piles)) else ""
        lines.append(f"The limit is {limit:.2f} GiB{beyond}.")
    lines.append(f"Tensors are simulated; {REST} is what the run took beyond them, for nanoGPT's way as much as here.")
    return lines


TEXTS = {"summary": _summary, "loss": _loss, "lr": _lr, "speed": _speed, "norm": _norm, "memory": _memory}


# ---- tables ------------------------------------------------------------------------------------------------


def tables_of(run):
    """What the part of the page on one run shows beside its charts."""
    facts, plan = run.facts, run.plan
    config = facts.get("config", {})
    about = {
        "device": facts.get("device"),
        "memory": f"{facts['memory'] / GIB:.2f} GiB" if facts.get("memory") else None,
        "driver": facts.get("driver"),
        "ranks": facts.get("ranks"),
        "torch": facts.get("torch"),
        "Python": facts.get("python"),
        "model": ", ".join(f"{name} {value}" for name, value in facts.get("model_args", {}).items()),
        "begun": ", gone on ".join(str(start.get("time")) for start in run.log.starts),
        **{f"checkpoint {name}": text for name, text in _checkpoints(run)},
    }
    levers = str(plan.levers).removeprefix(", ") if plan else ""
    return {
        "about": {name: value for name, value in about.items() if value},
        "changed": {name: config.get(name) for name in facts.get("changed", [])},
        "split": str(plan) if plan else "",
        "levers": levers,
        "reasons": plan.reasons if plan else (),
        "trials": [
            {
                "micro-batch": trial.micro_batch_size,
                "how": (str(trial.levers) + (", compiled" if trial.compiled else "")).removeprefix(", ") or "plain",
                "peak": f"{trial.peak_bytes / GIB:.2f} GiB" if trial.peak_bytes else "",
                "tokens/s": f"{trial.tokens_per_second:,.0f}" if trial.tokens_per_second else "",
                "verdict": "fits" if trial.fits else trial.failure or "does not fit",
            }
            for trial in run.trials
        ],
    }


def _checkpoints(run):
    for name, iteration in run.checkpoints.items():
        try:
            found = os.stat(os.path.join(run.folder, name))
        except OSError:
            continue
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.st_mtime))
        yield name, f"iteration {iteration:,}, {found.st_size / 2**20:,.1f} MiB, written {written}"
