"""The report as one HTML page: charts, a text for each of them, and tables."""

import os
from dataclasses import fields

import jinja2  # comes with Bokeh
import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import CustomJS
from bokeh.resources import Resources

from nanofit.tools.report.charts import charts_of
from nanofit.units import MemoryLevers, duration, gib

TITLES = {
    "loss": "Loss, in nats a token", "lr": "Learning rate", "speed": "Tokens per second",
    "norm": "Norm of the gradient, before clipping", "memory": "Memory, in GiB",
}  # fmt: skip
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(os.path.dirname(__file__)), autoescape=True)


def page_of(runs):
    """The whole page, a str that needs nothing beside it."""
    charts, document = charts_of(runs), Document()
    for chart in charts.values():
        document.add_root(chart)
    document.js_on_event("document_ready", CustomJS(code="pageIsReady()"))
    script, places = components(charts, wrap_script=False)

    def told(text):
        return [f"{run.label}: {text(run)}" if len(runs) > 1 else text(run) for run in runs]

    return TEMPLATES.get_template("page.html").render(
        title=" and ".join(run.label for run in runs), runs=runs, script=script, summary=told(_summary),
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(), tables=[tables_of(run) for run in runs],
        charts=[
            {"title": TITLES.get(name, name), "place": place,
             "texts": told(TEXTS.get(name) or _course(name))}
            for name, place in places.items()
        ],
    )  # fmt: skip


# ---- a text for each picture -------------------------------------------------------------------------------


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
    if (left := run.iterations["seconds_left"][-1]) > 0:  # which nan isn't
        words.append(f"{duration(left)} left when this was written")
    return ", ".join(words) + "."


def _loss(run):
    training, val, words = _known(run.iterations["loss"]), run.evaluations["val_loss"], []
    if len(training):
        last = training[-max(1, len(training) // 50) :].mean()
        words.append(f"Training loss from {training[0]:.3f} to {last:.3f} in {len(training):,} figures.")
    if lost := len(run.iterations["loss"]) - len(training):
        words.append(f"{lost:,} of its figures are not finite.")
    if len(_known(val)):
        at = np.nanargmin(val)
        lowest = f"{val[at]:.3f} at its lowest, at iteration {run.evaluations['iter'][at]:,.0f}"
        words.append(f"Validation loss {lowest}, and {val[-1]:.3f} at last.")
    if len(run.starts) > 1:
        words.append("Dotted lines show where the run went on.")
    return " ".join(words) or "No figures yet."


def _speed(run):
    speed, mfu = _known(run.iterations["tokens_per_second"]), _known(run.iterations["mfu"])
    if not len(speed):
        return "No figures yet."
    low, middle, high = np.percentile(speed, (5, 50, 95))
    share = f", model FLOP/s utilisation {mfu[-1]:.1%}" if len(mfu) else ""
    return (
        f"Median {middle:,.0f} tokens a second, nine in ten between {low:,.0f} and {high:,.0f}; "
        f"{np.nanmedian(run.iterations['seconds']):.3g} seconds an iteration{share}."
    )


def _memory(run):
    peak, held = _known(run.iterations["peak_bytes"]), _known(run.iterations["memory_bytes"])
    words = [f"peak {gib(peak.max())}"] if len(peak) else []
    words += [f"in use {gib(held[-1])}"] if len(held) else []
    words += [f"limit {gib(run.limit_bytes)}"] if run.limit_bytes else []
    return ", ".join(words) or "not known on this system"


def _course(name):
    """A text on how a figure went."""

    def text(run):
        kind = run.iterations if name in run.iterations else run.evaluations
        values, at = kind.get(name, np.array([])), kind["iter"]
        if not len(known := _known(values)):
            return "No figures yet."
        low, high = np.nanargmin(values), np.nanargmax(values)
        return (
            f"From {known[0]:.4g} to {known[-1]:.4g}; lowest {values[low]:.4g} at iteration {at[low]:,.0f}, highest "
            f"{values[high]:.4g} at iteration {at[high]:,.0f}."
        )

    return text


TEXTS = {"loss": _loss, "lr": _course("lr"), "speed": _speed, "norm": _course("grad_norm"), "memory": _memory}


# ---- tables ------------------------------------------------------------------------------------------------


def tables_of(run):
    """What the part of the page on one run shows beside its charts."""
    facts, plan, config = run.facts, run.plan, run.facts.get("config", {})
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
        del changed["init_from"]  # how it went on, and no setting
    return {
        "about": {name: value for name, value in about.items() if value},
        "changed": changed,
        "split": _split(plan),
        "levers": _levers(plan.get("levers")),
        "reasons": plan.get("reasons", ()),
        "trials": [_trial(trial) for trial in plan.get("trials", ())],
    }


def _split(plan):
    try:
        size, steps, micro = (plan[n] for n in ("batch_size", "gradient_accumulation_steps", "micro_batch_size"))
    except KeyError:
        return ""
    if size == micro:
        return f"As configured: batch_size {size}, gradient_accumulation_steps {steps}"
    now = size * steps // micro
    return f"batch_size {size} -> {micro}, gradient_accumulation_steps {steps} -> {now}, effective batch {size * steps}"


def _levers(told):
    known = {field.name for field in fields(MemoryLevers)}
    moved = {name: value for name, value in (told or {}).items() if name in known}
    return str(MemoryLevers(**moved)).removeprefix(", ")


def _trial(trial):
    peak, speed = trial.get("peak_bytes"), trial.get("tokens_per_second")
    fits = not trial.get("failure") and not trial.get("retries") and 0 < peak <= trial.get("limit_bytes", 0)
    how = [_levers(trial.get("levers")), "compiled" if trial.get("compiled") else ""]
    return {
        "micro-batch": trial.get("micro_batch_size"),
        "how": ", ".join(filter(None, how)) or "plain",
        "peak": gib(peak) if peak else "",
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "verdict": "fits" if fits else trial.get("failure") or "does not fit",
    }
