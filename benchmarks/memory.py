"""Peak memory of a training step against the batch size, in nanoGPT's way of computing and in this project's.

    python benchmarks/memory.py --batch_sizes=1,2,4,8 --picture=memory.png

The steps run on fake tensors (nanofit/autofit/simulate.py), so that no GPU is needed and nothing is too large. They
accumulate gradients: these and AdamW's state are there while activations grow. nanoGPT's way makes the logits of every
position and takes their cross-entropy in float32; ours makes them in chunks, with or without recompute (activation
checkpointing). What is counted is what tensors hold: a driver's context and fragmentation come on top. Prints a
table, and one line of JSON last.
"""

import contextlib
import io
import math

import torch
from common import finish

from configurator import configure
from model import GPT, GPTConfig
from nanofit import machine, settings
from nanofit.autofit.plan import Job
from nanofit.autofit.simulate import step_memory
from nanofit.errors import UsageError, usage_errors
from nanofit.models import GPT2_SIZES
from nanofit.units import MemoryLevers

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
model = "gpt2"  # or 'gpt2-medium', 'gpt2-large', 'gpt2-xl': their sizes
block_size = 1024
dtype = "bfloat16"
batch_sizes = "1,2,4,8,16,32,64"  # sequences of a micro-batch
cards = "8,12,16,24"  # GiB, lines in the picture
picture = ""  # a PNG file for the picture
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "block_size")
settings.one_of(tuple(GPT2_SIZES), config, "model")
settings.one_of(tuple(machine.DTYPES), config, "dtype")


class NanoGPTsWay(GPT):
    """All logits in memory, and held on to as nanoGPT's loop does."""

    def forward(self, idx, targets=None):
        self.logits, loss = super().forward(idx, targets)
        return self.logits, loss


WAYS = {  # name: (label in the table, label in the picture, the model, whether blocks are computed again)
    "nanogpt": ("nanoGPT's way", "nanoGPT's way:\nall logits at once", NanoGPTsWay, False),
    "ours": ("ours", "nanoGPT-fit:\nloss in chunks", GPT, False),
    "ours_recompute": ("with recompute", "nanoGPT-fit, with\nactivation checkpointing", GPT, True),
}
# Black, blue and orange of Okabe and Ito's palette, which colour-blind people can tell apart; in greyscale they are
# dark, medium and light.
STROKES = {"nanogpt": ("#000000", "o"), "ours": ("#0072B2", "s"), "ours_recompute": ("#D97A00", "^")}


def numbers(key, kind):
    """The numbers above 0 that a key lists, ascending."""
    with usage_errors(ValueError, prefix=f"{key}={config[key]!r} must be numbers with commas between: "):
        found = sorted({kind(text) for text in str(config[key]).strip("()[] ").split(",")})
    if not 0 < found[0] <= found[-1] < math.inf:
        raise UsageError(f"{key}={config[key]!r} must be numbers above 0 with commas between")
    return found


def simulated(batch_size, model_class, recompute):
    """Bytes at the peak of a step, by part."""
    sizes = dict(block_size=block_size, vocab_size=50304, dropout=0.0, bias=False, **GPT2_SIZES[model])
    job = Job({}, sizes, "cuda", dtype, grad_clip=1.0, micro_batch_size=batch_size, micro_steps=2)
    with contextlib.redirect_stdout(io.StringIO()):  # every model tells its number of parameters
        return step_memory(model_class, GPTConfig, job, MemoryLevers(recompute=recompute).within(0))


def point(batch_size):
    """Peaks of all ways at one batch size, their parts, and their ratios to nanoGPT's way."""
    found = {"batch_size": batch_size}
    for name, (_, _, *way) in WAYS.items():
        parts = simulated(batch_size, *way)
        peak = sum(parts.values())
        reference = found["nanogpt"]["peak_bytes"] if "nanogpt" in found else peak
        found[name] = {"peak_bytes": peak, "ratio": peak / reference, "parts": parts}
    return found


def draw(points, cards, path):
    """GiB against batch size, both in powers of two: a line for each way, a thin one for each card."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 17, "axes.spines.top": False, "axes.spines.right": False})
    sizes = [p["batch_size"] for p in points]
    figure, axes = pyplot.subplots(figsize=(16, 9), dpi=100)
    figure.subplots_adjust(left=0.06, right=0.78, top=0.88, bottom=0.14)
    for name, (_, label, *_) in WAYS.items():
        colour, marker = STROKES[name]
        peaks = [p[name]["peak_bytes"] / 2**30 for p in points]
        axes.plot(sizes, peaks, color=colour, marker=marker, markersize=11, linewidth=3.5, clip_on=False)
        axes.annotate(f"{label}\n{peaks[-1]:.1f} GiB", (sizes[-1], peaks[-1]), (20, 0), textcoords="offset points",
                      va="center", linespacing=1.3)  # fmt: skip
    for card in cards:
        axes.axhline(card, color="#8c8c8c", linewidth=1.2, linestyle=(0, (6, 4)), zorder=1)
        axes.annotate(f"{card:g} GiB card", (sizes[0], card), (0, 5), textcoords="offset points", color="#595959")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("batch size (sequences in a micro-step)", labelpad=10)
    axes.set_ylabel("GiB")
    parameters = points[0]["ours"]["parts"]["weights"] / 4e6
    title = f"Peak memory of a training step, {model}, {parameters:.0f}M, {block_size:,} tokens, {dtype} (simulated)"
    axes.set_title(title, loc="left", pad=14, fontsize=21)
    with usage_errors(OSError, ValueError, prefix="the picture can't be written: "):
        figure.savefig(path)


batch_sizes, cards = numbers("batch_sizes", int), numbers("cards", float)
if picture:  # before the steps are simulated, in case it is missing
    with usage_errors(ImportError, prefix="the picture is drawn by matplotlib: pip install matplotlib. "):
        import matplotlib

        matplotlib.use("agg")
points = []
print(f"{'batch_size':>10}" + "".join(f"{label:>22}" for label, *_ in WAYS.values()))
for batch_size in batch_sizes:
    found = point(batch_size)
    points.append(found)
    columns = (f"{found[name]['peak_bytes'] / 2**30:10.2f} GiB {found[name]['ratio']:7.3f}" for name in WAYS)
    print(f"{batch_size:>10}" + "".join(columns))
if picture:
    draw(points, cards, picture)
del config["picture"]
finish("memory", config, torch.device("cpu"), {"simulated": True, "points": points}, save)
