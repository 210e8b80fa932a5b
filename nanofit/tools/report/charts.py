"""The report's charts, as Bokeh models. Each run has a colour, and each kind of figure a line style."""

import html

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    CustomJSTickFormatter,
    DataRange1d,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    Span,
)
from bokeh.plotting import figure

from nanofit.metrics import OURS
from nanofit.units import GIB

# Distinct from white, from black and from each other, for colour-blind readers as well (after Okabe and Ito).
COLOURS = ("#1a80c4", "#d9730d", "#129a6b", "#c2528f", "#8a74d6", "#8f7f10", "#4f8fa8", "#b5564a")
LIMIT = "#d03b3b"
OUT_OF_SIGHT = 3  # a limit of more than this times the highest peak is not drawn
DERIVED = {"smoothed", "peak_gib", "memory_gib"}
STEP = "iteration @iter{0,0}, @tokens{0.00a} tokens: "
ITERATIONS, EVALUATIONS = 0, 1  # places of a run's sources


def charts_of(runs):
    """{name: figure}: loss, lr, speed, norm, memory, and the users' own figures by name."""
    sources = [[ColumnDataSource(rows) for rows in run.drawn(len(runs))] for run in runs]
    across = DataRange1d(range_padding=0.01)  # all charts zoom together
    charts = {
        "loss": _loss(runs, sources, across),
        "lr": _curves(runs, sources, across, {"lr": ""}, "@lr{0.00e+0}"),
        "speed": _curves(
            runs, sources, across, {"tokens_per_second": ""},
            "@tokens_per_second{0,0} tok/s, @seconds{0.0000} s, mfu @mfu{0.0%}", y_range=DataRange1d(start=0),
        ),
        "norm": _curves(runs, sources, across, {"grad_norm": ""}, "@grad_norm{0.0000}", y_axis_type="log"),
        "memory": _curves(
            runs, sources, across, {"peak_gib": "peak", "memory_gib": "in use"},
            "peak @peak_gib{0.000} GiB, in use @memory_gib{0.000} GiB", y_range=DataRange1d(start=0),
        ),
    }  # fmt: skip
    limit, peaks = runs[0].limit_bytes / GIB, [of_run[ITERATIONS].data["peak_gib"] for of_run in sources]
    if 0 < limit <= OUT_OF_SIGHT * np.nanmax(np.concatenate([[0.0], *peaks])):
        line = Span(location=limit, dimension="width", line_color=LIMIT, line_dash="dashed", line_width=2)
        charts["memory"].add_layout(line)
    for place in (ITERATIONS, EVALUATIONS):
        for name in sorted({name for of_run in sources for name in of_run[place].data} - OURS - DERIVED):
            told = f"@{{{name}}}{{0.0000}}"
            charts[name] = _curves(runs, sources, across, {name: ""}, told, place, marks=place == EVALUATIONS)
    return charts


def _figure(runs, across, **options):
    made = figure(
        x_range=across, tools="pan,box_zoom,wheel_zoom,reset,save", active_drag=None, sizing_mode="stretch_width",
        toolbar_location="above", toolbar_inner=True, background_fill_color=None, border_fill_color=None,
        outline_line_color=None, **options,
    )  # fmt: skip
    made.toolbar.logo, made.toolbar.autohide = None, True
    made.xaxis.formatter, made.xaxis.axis_label = NumeralTickFormatter(format="0[.]0a"), "iteration"
    short = "return tick.toLocaleString('en', {maximumSignificantDigits: 4})"
    made.yaxis.formatter = CustomJSTickFormatter(code=short)
    for ink, run in zip(COLOURS * len(runs), runs, strict=False):
        for iteration, _, _ in run.starts[1:]:
            ink = ink if len(runs) > 1 else "#8c8c8c"
            made.add_layout(Span(location=iteration, dimension="height", line_color=ink, line_dash="dotted"))
    return made


def _draw(chart, source, name, ink, marks=False, **stroke):
    """A curve's renderers: a line, and markers if asked for or if there is only one value."""
    drawn = [chart.line("iter", name, source=source, color=ink, **stroke)]
    if marks or np.isfinite(source.data[name]).sum() == 1:
        drawn.append(chart.scatter("iter", name, source=source, color=ink, size=5))
    return drawn


def _loss(runs, sources, across):
    chart, entries = _figure(runs, across, height=380), []
    for i, (run, (rows, evaluations)) in enumerate(zip(runs, sources, strict=True)):
        ink = COLOURS[i % len(COLOURS)]
        other, third = COLOURS[1:3] if len(runs) == 1 else (ink, ink)
        kinds = {
            "training": _draw(chart, rows, "loss", ink, alpha=0.35),
            "smoothed": _draw(chart, rows, "smoothed", ink, line_width=2.5),
            "train, evaluated": [
                chart.scatter("iter", "train_loss", source=evaluations, color=third, fill_color=None, size=6)
            ],
            "val": _draw(chart, evaluations, "val_loss", other, marks=True, line_width=2, line_dash="dashed"),
        }
        _hover(chart, kinds["training"][0], run, "loss @loss{0.0000}, smoothed @smoothed{0.0000}")
        _hover(chart, kinds["val"][-1], run, "train @train_loss{0.0000}, val @val_loss{0.0000}")
        entries += (
            kinds.items() if len(runs) == 1 else [(run.label, [line for lines in kinds.values() for line in lines])]
        )
    _legend(chart, entries)
    return chart


def _curves(runs, sources, across, names, told, place=ITERATIONS, marks=False, **options):
    """A chart of columns. names: {column: its name in the legend, '' if it is the only one}."""
    chart, entries = _figure(runs, across, height=280, **options), []
    for i, (run, of_run) in enumerate(zip(runs, sources, strict=True)):
        of_names = {}
        for k, (name, word) in enumerate(names.items()):
            if name not in of_run[place].data:
                continue  # only another run has it
            ink = COLOURS[(i if len(runs) > 1 else k) % len(COLOURS)]
            stroke = dict(line_width=1.5, line_dash="dashed" if k else "solid")
            drawn = _draw(chart, of_run[place], name, ink, marks, **stroke)
            if k == 0:
                _hover(chart, drawn[-1], run, told)
            of_names[word] = drawn
        if len(runs) > 1:
            entries.append((run.label, [line for drawn in of_names.values() for line in drawn]))
        elif len(names) > 1:
            entries += of_names.items()
    if entries:
        _legend(chart, entries)
    return chart


def _hover(chart, renderer, run, told):
    label = html.escape(run.label).replace("@", "&#64;")  # a folder's name may hold anything
    chart.add_tools(HoverTool(renderers=[renderer], tooltips=f"{label}, {STEP}{told}", mode="mouse", visible=False))


def _legend(chart, entries):
    items = [LegendItem(label=label, renderers=renderers) for label, renderers in entries]
    chart.add_layout(Legend(
        items=items, click_policy="hide", location="top_left", orientation="horizontal", border_line_color=None,
        background_fill_color=None, padding=2, margin=2, glyph_width=16, spacing=10, label_text_font_size="12px",
    ), "above")  # fmt: skip
