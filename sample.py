"""Sample from a trained model.

python sample.py --out_dir=out-shakespeare-char --start="O Romeo"
python sample.py --init_from=gpt2-xl --start="FILE:prompt.txt" --num_samples=5
python sample.py --start=- --num_samples=1 < prompts.txt
"""

import contextlib
import inspect
import math
import os
import sys
from collections import Counter, deque
from pathlib import Path

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out
import nanofit

nanofit.start()
import torch

from configurator import configure
from model import GPT, GPTConfig
from nanofit import checkpoint, machine, models, settings
from nanofit.codec import codec_of
from nanofit.compiling import try_compile
from nanofit.errors import UsageError, usage_errors
from nanofit.files import replacing
from nanofit.folder import run_id_of
from nanofit.tools.huggingface import codec_of_folder

# ---- keys: a config file or --key=value overrides them -----------------------------------------------------
init_from = "resume"  # the checkpoint in out_dir; or a .pt; 'gpt2' to 'gpt2-xl'; a folder
out_dir = "out"
start = "\n"  # the prompt; "FILE:prompt.txt" reads it from a file, "-" one from each line of standard input
num_samples = 10
max_new_tokens = 500  # of each sample
temperature = 0.8  # below 1 is less random, above 1 more
top_k = 200  # only the likeliest tokens are drawn; 0 for all
seed = 1337
device = machine.best_device()
dtype = machine.best_dtype(device)  # 'float32', 'bfloat16', 'float16'
compile = False
config, given = configure(globals())

settings.at_least(1, config, "num_samples", "max_new_tokens")
settings.at_least(0, config, "top_k")
if not 1e-4 <= temperature < math.inf:  # less would turn logits into infinities
    raise UsageError(
        f"temperature must be from 0.0001 on, not {temperature}; for the likeliest token each time, use --top_k=1"
    )
dtype = settings.dtype(config, given)
device = machine.find_device(device)
machine.set_device(device)
torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper, cuDNN's attention plans anew for every length
if start.startswith("FILE:"):
    if os.path.exists(start[5:]) and not os.path.isfile(start[5:]):
        raise UsageError(f"the prompt can't be read: {start[5:]} is not a file")
    with usage_errors(OSError, ValueError, prefix="the prompt can't be read: "):
        start = Path(start[5:]).read_text(encoding="utf-8-sig")
if not start:
    raise UsageError("start is empty: a sample goes on from at least one token, for example --start='\\n'")

# ---- the model and its alphabet ----------------------------------------------------------------------------
torch.manual_seed(seed)
data_dir = None
path = checkpoint.path_of_model(init_from)
if init_from == "resume":
    path = os.path.join(out_dir, checkpoint.name_of_model(out_dir))
if path:
    saved = checkpoint.load(*os.path.split(path))
    model = models.build(GPT, GPTConfig, saved["model_args"])
    models.load_weights(model, saved, path)
    print(f"{path}, of iteration {saved.get('iter_num', 'unknown')}")
    if "dataset" in saved.get("config", {}):
        data_dir = os.path.join("data", saved["config"]["dataset"])
else:
    model = models.pretrained(GPT, init_from, dropout=0.0)
model.eval().to(device)
is_folder = not path and os.path.isdir(init_from)
vocab_size = model.config.vocab_size
encode, decode, symbols = codec_of_folder(init_from, vocab_size) if is_folder else codec_of(data_dir, vocab_size)
print(f"symbols: {symbols}")


def rows_that_fit(prompt):
    """How many samples half of the free memory holds, at least one: so many can be drawn in one batch."""
    sizes = model.config
    width = machine.DTYPES[dtype].itemsize
    positions = min(sizes.block_size, prompt.shape[1] + max_new_tokens)
    try:
        free = machine.free_memory_bytes(device)
    except UsageError:  # this system can't be asked
        return 1
    if dtype != "float32":
        free -= model.get_num_params() * width  # autocast will keep a copy of the weights
    keys_values = 2 * sizes.n_layer * sizes.n_embd * positions * width
    # A block's temporary tensors, about 12 times as wide as what enters it, and copies of the logits matter
    # beside these where there are few layers or few positions.
    others = 4 * (12 * sizes.n_embd * positions + 6 * sizes.vocab_size)
    return max(1, free // 2 // (keys_values + others))


# ---- draw --------------------------------------------------------------------------------------------------


class Shown:
    """Prints a text as its tokens come; a character of several tokens when it is whole."""

    def __init__(self, tokens):
        self.tokens, self.text = tokens, ""
        self.show()

    def show(self):
        text = decode(self.tokens).rstrip("\ufffd")
        print(text[len(self.text) :], end="", flush=True)
        self.text = text

    def on_token(self, drawn):
        self.tokens.append(drawn.item())
        self.show()


generate = type(model).generate
is_ours = "on_token" in inspect.signature(generate).parameters  # others may take one sequence alone, as nanoGPT's
streams = is_ours and num_samples == 1 and sys.stdout.isatty()
last_texts = deque(maxlen=10)  # which the report shows
drawn_ids = Counter()


def check_numbers(prompt):
    """Raise a UsageError where the model computes what no token can be drawn from."""
    logits, _ = model(prompt[:, -model.config.block_size :])
    if logits.isnan().any() or logits.isposinf().any():
        raise UsageError("the model's numbers are not finite: its weights are spoilt, or too large for this dtype")


def draw(text):
    """Print num_samples texts that go on from this one."""
    tokens = encode(text)
    if (largest := max(tokens)) >= vocab_size:
        raise UsageError(
            f"the prompt has the token {largest} of {symbols}, and the model has a vocabulary of {vocab_size:,}: bring "
            "the symbols that it was trained with"
        )
    prompt = torch.tensor([tokens], device=device)  # (1, T)
    check_numbers(prompt)
    rows, left = min(num_samples, rows_that_fit(prompt)) if is_ours else 1, num_samples
    while left:
        batch = prompt.expand(min(rows, left), -1)
        options = dict(on_token=Shown(tokens).on_token) if streams else {}
        # Called on the class, so that a compiled model runs compiled: its own attributes are the original's.
        drawn = generate(model, batch, max_new_tokens, temperature=temperature, top_k=top_k or None, **options)
        for row in drawn:
            drawn_ids.update(row[len(tokens) :].tolist())
            last_texts.append(decode(row.tolist()))
            print("" if streams else last_texts[-1])
            print("---------------")
        left -= len(batch)


def lines_of_standard_input():
    sys.stdin.reconfigure(encoding="utf-8-sig")  # whatever the locale, as with FILE:
    with usage_errors(OSError, UnicodeDecodeError, prefix="standard input can't be read: "):
        for line in sys.stdin:
            yield line.rstrip("\r\n")


# Every token is a pass in this one context, for which each weight is converted once.
with torch.no_grad(), machine.autocast(device, dtype, keep_weights=True):
    if compile:
        trial = torch.zeros(min(num_samples, 2), min(8, model.config.block_size), dtype=torch.long, device=device)
        model, failure = try_compile(model, lambda compiled: compiled(trial), device, dynamic=True)
        if failure:
            print(f"compile failed, sampling goes on without it ({failure})")
    for line in lines_of_standard_input() if start == "-" else [start]:
        if line:
            draw(line)
if left_out := sum(count for i, count in drawn_ids.items() if not decode([i])):
    print(f"warning: {left_out:,} of {drawn_ids.total():,} tokens stand for nothing in {symbols}, and are left out")
if init_from == "resume":
    kept = os.path.join(out_dir, "sample.txt")
    with contextlib.suppress(OSError), replacing(kept) as file:  # the folder may be somebody else's
        file.write(f"run {run_id_of(saved)}, iteration {saved.get('iter_num', 'unknown')}\n")
        file.write("\n---------------\n".join(last_texts))
