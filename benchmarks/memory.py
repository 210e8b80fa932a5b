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
NOTE = (
    "Bytes of tensors while gradients accumulate: weights, gradients, AdamW's state, activations, loss. "
    "A driver's context and fragmentation come on top."
)


def numbers(key, kind, what):
    """The numbers above 0 that a key lists, ascending."""
    sentence = f"{key}={config[key]!r} must be {what} above 0 with commas between"
    with usage_errors(ValueError, prefix=f"{sentence}: "):
        found = sorted({kind(text) for text in str(config[key]).strip("()[] ").split(",") if text.strip()})
    if not all(0 < n < float("inf") for n in found):
        raise UsageError(sentence)
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


def drawing_tools():
    """pyplot, drawing into files alone, and what opens an image."""
    try:
        import matplotlib
    except ImportError as e:
        raise UsageError("the picture is drawn by matplotlib, which isn't installed: pip install matplotlib") from e
    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image  # which matplotlib brings along

    return pyplot, Image.open


def draw(pyplot, image_of, points, cards, path):
    """GiB against batch size, both in powers of two: a line for each way, a thin one for each card."""
    pyplot.rcParams.update({"font.size": 17, "axes.spines.top": False, "axes.spines.right": False})
    sizes = [p["batch_size"] for p in points]
    peaks = {name: [p[name]["peak_bytes"] / 2**30 for p in points] for name in WAYS}
    figure, axes = pyplot.subplots(figsize=(16, 9), dpi=100)
    figure.subplots_adjust(left=0.05, right=0.78, top=0.84, bottom=0.16)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for name, (_, label, *_) in WAYS.items():
        colour, marker = STROKES[name]
        axes.plot(sizes, peaks[name], color=colour, marker=marker, markersize=11, linewidth=3.5, clip_on=False)
        axes.annotate(f"{label}\n{peaks[name][-1]:.1f} GiB", (sizes[-1], peaks[name][-1]), (20, 0),
                      textcoords="offset points", va="center", linespacing=1.3)  # fmt: skip
    left = 0.8 * sizes[0]
    for card in cards:
        axes.plot((left, sizes[-1]), (card, card), color="#8c8c8c", linewidth=1.2, linestyle=(0, (6, 4)), zorder=1)
        axes.annotate(f"{card:g} GiB card", (left, card), (6, 5), textcoords="offset points", color="#595959")
    shown = [value for values in (*peaks.values(), cards) for value in values]
    lowest, highest = 2.0 ** math.floor(math.log2(min(shown))), max(shown) * 1.1
    axes.set_xlim(left, sizes[-1])
    axes.set_ylim(lowest, highest)
    axes.set_xticks(sizes, map(str, sizes))
    powers = [2.0**p for p in range(int(math.log2(lowest)), math.floor(math.log2(highest)) + 1)]
    axes.set_yticks(powers, [f"{power:g}" for power in powers])
    axes.minorticks_off()
    axes.set_xlabel("batch size (sequences in a micro-step)", labelpad=10)
    axes.set_title("GiB", loc="left", x=-0.03, pad=14, fontsize=17)
    size = f"GPT-2{model.removeprefix('gpt2').replace('-', ' ')} {points[0]['ours']['parts']['weights'] / 4e6:.0f}M"
    figure.suptitle(
        f"Peak memory of a training step, {size}, {block_size:,} tokens, {dtype} (simulated)",
        x=0.02, y=0.965, ha="left", fontsize=23,
    )  # fmt: skip
    figure.text(0.02, 0.025, NOTE, color="#595959", fontsize=14)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    with usage_errors(OSError, ValueError, prefix="the picture can't be written: "):
        image_of(drawn).convert("RGB").quantize(64).save(
            path, optimize=True
        )  # so few colours take a third of the bytes


batch_sizes, cards = numbers("batch_sizes", int, "whole numbers"), numbers("cards", float, "numbers of GiB")
if not batch_sizes:
    raise UsageError("batch_sizes is empty: name at least one")
tools = drawing_tools() if picture else None  # before the steps are simulated, in case it is missing
points = []
print(f"{'batch_size':>10}" + "".join(f"{label:>22}" for label, *_ in WAYS.values()))
for batch_size in batch_sizes:
    found = point(batch_size)
    points.append(found)
    columns = (f"{found[name]['peak_bytes'] / 2**30:10.2f} GiB {found[name]['ratio']:7.3f}" for name in WAYS)
    print(f"{batch_size:>10}" + "".join(columns))
if picture:
    draw(*tools, points, cards, picture)
config = {key: value for key, value in config.items() if key != "picture"}
finish("memory", config, torch.device("cpu"), {"simulated": True, "points": points}, save)
