"""Drawing samples: this project's GPT.generate against nanoGPT's way of computing.

    python benchmarks/sampling.py --num_samples=10 --max_new_tokens=500

Ours keeps the keys and values of the positions that it has seen, and draws all samples in one batch. nanoGPT's way
draws one sample after another, and each token by a pass over all of the last block_size tokens; on a CPU in float32
whatever dtype says. Its samples cost the same time each, so that theirs_samples of them are drawn and the time is
scaled to num_samples. Then one sample of each for the same seed, both in float32: are they the same tokens? Weights
are random. Prints a table, and one line of JSON last.
"""

import time

import torch
from common import finish
from torch.nn import functional as F

from configurator import configure
from model import GPT, GPTConfig
from nanofit import machine, settings
from nanofit.errors import UsageError, usage_errors

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
num_samples = 10
max_new_tokens = 500  # of each sample
theirs_samples = 1  # that are really drawn in nanoGPT's way
temperature = 0.8
top_k = 200
device = machine.best_device()
dtype = machine.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "num_samples", "max_new_tokens", "theirs_samples", "top_k")
if not temperature > 0:
    raise UsageError(f"temperature must be above 0, not {temperature}")
dtype = config["dtype"] = settings.dtype(config, given)
theirs_samples = config["theirs_samples"] = min(theirs_samples, num_samples)
device = machine.find_device(device)
machine.set_device(device)


def ours(model, count, length):
    """So many samples in one batch: tokens (count, 1 + length)."""
    prompt = torch.zeros(count, 1, dtype=torch.int64, device=device)
    return model.generate(prompt, length, temperature=temperature, top_k=top_k)


@torch.no_grad()
def theirs(model, count, length):
    """So many samples one after another, each token by a pass over all tokens that the model can see."""
    samples = []
    for _ in range(count):
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=device)
        for _ in range(length):
            logits = model(tokens[:, -block_size:])[0][:, -1] / temperature  # (1, V)
            least = torch.topk(logits, min(top_k, logits.shape[-1]))[0][:, [-1]]
            logits[logits < least] = float("-inf")
            drawn = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            tokens = torch.cat((tokens, drawn), dim=1)
        samples.append(tokens)
    return torch.cat(samples)


def run(draw, model, count, dtype, length=max_new_tokens):
    """(seconds, tokens) of drawing so many samples from the same seed."""
    torch.manual_seed(1337)
    with torch.no_grad(), machine.autocast(device, dtype, keep_weights=True):  # nanoGPT keeps converted weights too
        machine.synchronize(device)
        start = time.perf_counter()
        tokens = draw(model, count, length)
        machine.synchronize(device)
    return time.perf_counter() - start, tokens


def same_tokens(model, theirs_drawn):
    """Whether both draw the same sample for a seed, where nothing rounds more than float32 does.

    theirs_drawn: nanoGPT's sample for this seed, where it has been drawn so, else None.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would round the two ways differently
    if theirs_drawn is None:
        _, theirs_drawn = run(theirs, model, 1, "float32")
    _, ours_drawn = run(ours, model, 1, "float32")
    torch.set_float32_matmul_precision(precision)
    return torch.equal(ours_drawn, theirs_drawn)


torch.manual_seed(1337)
with usage_errors(ValueError):
    shape = GPTConfig(block_size, 50304, n_layer, n_head, n_embd, dropout=0.0, bias=False)
model = GPT(shape).eval().to(device)
dtypes = {"nanogpt": dtype if device.type == "cuda" else "float32", "ours": dtype}
drawn = {"nanogpt": theirs_samples, "ours": num_samples}
seconds, tokens = {}, {}
for name, draw in {"nanogpt": theirs, "ours": ours}.items():
    run(draw, model, drawn[name], dtypes[name], length=4)  # warms up
    took, tokens[name] = run(draw, model, drawn[name], dtypes[name])
    seconds[name] = took / drawn[name] * num_samples
equal = same_tokens(model, tokens["nanogpt"][:1] if device.type == "cpu" else None)

for name, took in seconds.items():
    scaled = f", scaled from {drawn[name]} drawn" if drawn[name] < num_samples else ""
    speed = num_samples * max_new_tokens / took
    print(f"{name:10} {took:10.2f} s for {num_samples} samples {speed:12,.1f} tok/s  {dtypes[name]}{scaled}")
ratio = seconds["nanogpt"] / seconds["ours"]
print(f"ratio of tok/s {ratio:.2f}")
print(f"the same tokens for one sample and seed, in float32: {equal}")
figures = {
    "seconds": seconds,
    "samples_drawn": drawn,  # seconds are of num_samples; where fewer were drawn, they are scaled
    "dtypes": dtypes,
    "tokens_per_second_ratio": ratio,
    "same_tokens": equal,
}
finish("sampling", config, device, figures, save)
