"""The report's curves as a picture, by matplotlib."""

from nanofit.errors import UsageError, usage_errors
from nanofit.tools.report.charts import COLOURS
from nanofit.tools.report.page import TITLES
from nanofit.units import GIB


def draw(runs, path):
    """Write a picture of the curves; the kind of file follows from its name. UsageError where that fails."""
    try:
        from matplotlib import use
    except ImportError as e:
        raise UsageError("--png is drawn by matplotlib, which isn't installed: pip install matplotlib") from e
    use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
    drawn, axes = pyplot.subplot_mosaic([["loss", "loss"], ["lr", "speed"], ["norm", "memory"]], figsize=(12, 11))
    for i, run in enumerate(runs):
        rows, evaluations = run.drawn(len(runs))
        ink = COLOURS[i % len(COLOURS)]
        other = COLOURS[1] if len(runs) == 1 else ink
        at = rows["iter"]
        axes["loss"].plot(at, rows["loss"], color=ink, alpha=0.3, linewidth=1)
        axes["loss"].plot(at, rows["smoothed"], color=ink, linewidth=2, label=f"{run.label}: training")
        axes["loss"].plot(
            evaluations["iter"], evaluations["val_loss"], "--o", color=other, markersize=4,
            label=f"{run.label}: validation",
        )  # fmt: skip
        for name, values in {
            "lr": rows["lr"], "speed": rows["tokens_per_second"], "norm": rows["grad_norm"],
            "memory": rows["peak_bytes"] / GIB,
        }.items():  # fmt: skip
            axes[name].plot(at, values, color=ink, linewidth=1.2)
    for name, title in TITLES.items():
        axes[name].set_title(title, loc="left")
        axes[name].set_xlabel("iteration")
        axes[name].grid(alpha=0.3)
    axes["norm"].set_yscale("log")
    axes["loss"].legend(frameon=False)
    drawn.tight_layout()
    with usage_errors(OSError, ValueError, prefix=f"{path} can't be written: "):
        drawn.savefig(path, dpi=100)
    pyplot.close(drawn)
