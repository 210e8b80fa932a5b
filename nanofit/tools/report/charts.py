"""The report's charts, as Bokeh models: each run has a colour, and each kind of figure a stroke.

Data lies in sources named "iterations 0", "evaluations 0", "memory 0" and so on by run, so that a page that is watched
can be given new figures.
"""

import html

import numpy as np

from nanofit.errors import UsageError
from nanofit.units import GIB

try:
    from bokeh.models import (
        ColumnDataSource,
        CustomJSTickFormatter,
        DataRange1d,
        HoverTool,
        Legend,
        LegendItem,
        NumeralTickFormatter,
    )
    from bokeh.plotting import figure
except ImportError as e:
    raise UsageError("the report's charts are drawn by Bokeh, which isn't installed: pip install bokeh") from e

# Far enough from white and from black, and from each other for colour-blind eyes as well (after Okabe and Ito).
COLOURS = ("#1a80c4", "#d9730d", "#129a6b", "#c2528f", "#8a74d6", "#8f7f10", "#4f8fa8", "#b5564a")
PARTS = {  # what memory holds, from the bottom of the pile
    "weights": "#1a80c4", "gradients": "#57b0e0", "optimizer state": "#8a74d6", "activations": "#129a6b",
    "loss and backward": "#d9730d", "everything else": "#8c8c8c",
}  # fmt: skip
LIMIT = "#d03b3b"
REST = "everything else"  # what the run took beyond its tensors, as simulated
OUT_OF_SIGHT = 3  # a limit so many times the highest pile is told and not drawn


def charts_of(runs):
    """{name: figure}: loss, loss_log, lr, speed, norm, memory, and parts_0, parts_1, ... by run."""
    drawn = [run.drawn(len(runs)) for run in runs]
    sources = [
        (ColumnDataSource(rows, name=f"iterations {i}"), ColumnDataSource(evaluations, name=f"evaluations {i}"))
        for i, (rows, evaluations) in enumerate(drawn)
    ]
    across = DataRange1d(range_padding=0.01)  # all charts zoom together
    charts = {
        "loss": _loss(runs, sources, across, "linear"),
        "loss_log": _loss(runs, sources, across, "log"),
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
    charts |= {f"parts_{i}": _parts(run, i) for i, run in enumerate(runs)}
    for name, chart in charts.items():
        chart.name = name
    return charts


def data_of(runs):
    """{name of a source: {name: values}}: what the charts of these runs draw now."""
    data = {}
    for i, run in enumerate(runs):
        data[f"iterations {i}"], data[f"evaluations {i}"] = run.drawn(len(runs))
        data[f"memory {i}"] = piles_of(run)
    return data


def piles_of(run):
    """Columns of the picture of memory: for each way "pile", and GiB by PARTS that add up to its peak."""
    rest = rest_of(run) if run.memory else 0
    columns = {"pile": [f"{way['name']}, {way['micro_batch_size']}" for way in run.memory]}
    for part in PARTS:
        columns[part] = [(rest if part == REST else way["parts"].get(part, 0)) / GIB for way in run.memory]
    return columns


def rest_of(run):
    """Bytes of a run's measured peak that its simulated tensors don't account for, at least 0."""
    peaks = run.log.iterations["peak_bytes"]
    peak = np.nanmax(peaks) if len(peaks) and not np.isnan(peaks).all() else 0
    return max(0, peak - sum(run.memory[0]["parts"].values()))


# ---- curves ------------------------------------------------------------------------------------------------


def _figure(**options):
    made = figure(
        sizing_mode="stretch_width", toolbar_location="above", toolbar_inner=True, background_fill_color=None,
        border_fill_color=None, outline_line_color=None, active_drag=None, **options,
    )  # fmt: skip
    made.toolbar.logo, made.toolbar.autohide = None, True
    return made


def _figure_of_iterations(across, **options):
    made = _figure(x_range=across, tools="pan,box_zoom,wheel_zoom,reset,save", **options)
    made.xaxis.formatter = NumeralTickFormatter(format="0[.]0a")
    made.xaxis.axis_label = "iteration"
    return made


def _loss(runs, sources, across, scale):
    chart = _figure_of_iterations(across, y_axis_type=scale, height=380)
    entries = []
    for i, (run, (rows, evaluations)) in enumerate(zip(runs, sources, strict=True)):
        alone = len(runs) == 1
        ink = COLOURS[i % len(COLOURS)]
        other, third = COLOURS[1:3] if alone else (ink, ink)
        raw = chart.line("iter", "loss", source=rows, color=ink, alpha=0.35)
        smooth = chart.line("iter", "smoothed", source=rows, color=ink, line_width=2.5)
        train = chart.scatter("iter", "train_loss", source=evaluations, color=third, fill_color=None, size=6)
        val = [
            chart.line("iter", "val_loss", source=evaluations, color=other, line_width=2, line_dash="dashed"),
            chart.scatter("iter", "val_loss", source=evaluations, color=other, size=5),
        ]
        told = "iteration @iter{0,0}, @tokens{0.00a} tokens: "
        _hover(chart, raw, run, told + "loss @loss{0.0000}, smoothed @smoothed{0.0000}")
        _hover(chart, val[1], run, told + "train @train_loss{0.0000}, val @val_loss{0.0000}")
        if alone:
            kinds = {"training": [raw], "smoothed": [smooth], "train, evaluated": [train], "val": val}
            entries = list(kinds.items())
        else:
            entries.append((run.label, [smooth, raw, train, *val]))
    _legend(chart, entries)
    return chart


def _curves(runs, sources, across, names, told, **options):
    """names: {column: what the legend calls it, '' where there is one}."""
    chart = _figure_of_iterations(across, height=280, **options)
    short = "return tick.toLocaleString('en', {maximumSignificantDigits: 4})"
    chart.yaxis.formatter = CustomJSTickFormatter(code=short)
    entries = []
    for i, (run, (rows, _)) in enumerate(zip(runs, sources, strict=True)):
        for k, (name, word) in enumerate(names.items()):
            ink = COLOURS[(i if len(runs) > 1 else k) % len(COLOURS)]
            dash = "solid" if k == 0 else "dashed"
            line = chart.line("iter", name, source=rows, color=ink, line_width=1.5, line_dash=dash)
            if k == 0:
                _hover(chart, line, run, "iteration @iter{0,0}: " + told)
            if word or len(runs) > 1:
                entries.append((" ".join(filter(None, (run.label if len(runs) > 1 else "", word))), [line]))
    if entries:
        _legend(chart, entries)
    return chart


def _hover(chart, renderer, run, told):
    label = html.escape(run.label).replace("@", "&#64;")  # of a folder, which may be called anything
    chart.add_tools(HoverTool(renderers=[renderer], tooltips=f"{label}, {told}", mode="mouse", visible=False))


def _legend(chart, entries):
    items = [LegendItem(label=label, renderers=renderers) for label, renderers in entries]
    legend = Legend(items=items, click_policy="hide", location="top_left", orientation="horizontal")
    legend.border_line_color = legend.background_fill_color = None
    legend.padding = legend.margin = 2
    legend.glyph_width, legend.spacing, legend.label_text_font_size = 16, 10, "12px"
    chart.add_layout(legend, "above")


# ---- where memory goes -------------------------------------------------------------------------------------


def _parts(run, index):
    columns = piles_of(run)
    piles = columns["pile"][::-1]  # the first on top
    highest = max((sum(column) for column in zip(*(columns[p] for p in PARTS), strict=True)), default=1.0)
    limit = run.limit_bytes / GIB
    seen = bool(piles) and 0 < limit <= OUT_OF_SIGHT * highest
    chart = _figure(
        y_range=piles or ["not known"], x_range=(0, 1.05 * max(highest, limit if seen else 0)), tools="save",
        height=110 + 44 * max(1, len(piles)),
    )  # fmt: skip
    chart.ygrid.grid_line_color = None
    chart.xaxis.axis_label = "GiB"
    bars = chart.hbar_stack(
        list(PARTS), y="pile", height=0.7, color=list(PARTS.values()),
        source=ColumnDataSource(columns, name=f"memory {index}"),
    )  # fmt: skip
    for part, bar in zip(PARTS, bars, strict=True):
        told = f"@pile: {part} @{{{part}}}{{0.00}} GiB"
        chart.add_tools(HoverTool(renderers=[bar], tooltips=told, visible=False))
    entries = [(part, [bar]) for part, bar in zip(PARTS, bars, strict=True) if any(columns[part])]
    if seen:
        ends = [(piles[0], -0.5), (piles[-1], 0.5)]
        line = chart.line([limit, limit], ends, color=LIMIT, line_dash="dashed", line_width=2)
        entries.append((f"limit {limit:.2f} GiB", [line]))
    _legend(chart, entries)
    chart.legend.click_policy = "none"
    return chart
