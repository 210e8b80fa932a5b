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

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
import nanofit

nanofit.start()
import torch

from configurator import configure
from model import GPT, GPTConfig
from nanofit import checkpoint, machine, models, settings
from nanofit.codec import codec_of
from nanofit.compiling import try_compile
from nanofit.decoding import Graphed
from nanofit.errors import UsageError, usage_errors
from nanofit.files import replacing
from nanofit.folder import run_id_of
from nanofit.tools.huggingface import ends_of

# ---- keys: a config file or --key=value overrides them -----------------------------------------------------
init_from = "resume"  # the checkpoint in out_dir; or a .pt; 'gpt2' to 'gpt2-xl'; a folder
out_dir = "out"
start = "\n"  # the prompt; "FILE:prompt.txt" reads it from a file, "-" one from each line of standard input
num_samples = 10
max_new_tokens = 500  # of each sample
temperature = 0.8  # below 1 is less random, above 1 more
top_k = 200  # only the likeliest tokens are drawn; 0 for all
stop = ""  # a text before which a sample ends, such as "<|endoftext|>"; a Hugging Face folder names its own
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
    with usage_errors(OSError, ValueError, prefix="the prompt can't be read: "):
        start = Path(start[5:]).read_text(encoding="utf-8-sig")
if not start:
    raise UsageError("start is empty: a sample goes on from at least one token, for example --start=The")

# ---- the model and its tokenizer ---------------------------------------------------------------------------
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
    if "dataset" in saved["config"]:
        data_dir = os.path.join("data", saved["config"]["dataset"])
else:
    model = models.pretrained(GPT, init_from, dropout=0.0)
model.eval().to(device)
is_folder = not path and os.path.isdir(init_from)
vocab_size = model.config.vocab_size
codec = codec_of(init_from if is_folder else data_dir, vocab_size)
encode, decode = codec.encode, codec.decode
print(f"symbols: {codec.name}")
stops = [stop] if stop else [] if "stop" in given or not is_folder else ends_of(init_from, decode)
if stop:
    encode(stop)  # a UsageError for what the model can't draw
elif stops:
    print(f"a sample ends before {' or '.join(stops)} (--stop= lets it go on)")


def rows_that_fit(prompt):
    """How many samples can be drawn in one batch: those that half of the free memory holds, at least one."""
    sizes = model.config
    width = machine.DTYPES[dtype].itemsize
    positions = min(sizes.block_size, prompt.shape[1] + max_new_tokens)
    try:
        free = machine.free_memory_bytes(device)
    except UsageError:  # unknown on this system
        return 1
    if dtype != "float32":
        free -= model.get_num_params() * width  # autocast will keep a copy of the weights
    keys_values = 2 * sizes.n_layer * sizes.n_embd * positions * width
    # A block's temporary tensors, about 12 times as wide as its input, and copies of the logits.
    others = 4 * (12 * sizes.n_embd * positions + 6 * sizes.vocab_size)
    return max(1, free // 2 // (keys_values + others))


# ---- draw --------------------------------------------------------------------------------------------------


class Texts:
    """The texts of a batch while their tokens come. Each ends before a stop. A single one is printed as it grows."""

    def __init__(self, prompt, count):
        self.begin = len(decode(prompt))
        self.tokens = [list(prompt) for _ in range(count)]
        self.unfinished, self.printed = set(range(count)), 0

    def on_token(self, drawn):
        """Add the next token to each text, int64 (count, 1). Returns whether all texts have ended."""
        for row, token in enumerate(drawn[:, 0].tolist()):
            if row in self.unfinished:
                self.tokens[row].append(token)
                if any(end in decode(self.tokens[row])[self.begin :] for end in stops):
                    self.unfinished.remove(row)
        if streams:
            self.show()
        return not self.unfinished

    def text(self, row):
        text = decode(self.tokens[row])
        for end in stops:
            text = text[: self.begin] + text[self.begin :].partition(end)[0]
        return text

    def show(self, is_last=False):
        """Print what is new in the first text, except what may be part of a character or of a stop."""
        text = self.text(0).rstrip("\ufffd")
        if self.unfinished and not is_last:
            may_begin = (n for end in stops for n in range(1, len(end)) if text.endswith(end[:n], self.begin))
            text = text[: len(text) - max(may_begin, default=0)]
        print(text[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(text))


generate = type(model).generate
is_ours = "on_token" in inspect.signature(generate).parameters  # another model's may take only one sequence
streams = is_ours and num_samples == 1 and sys.stdout.isatty()
last_texts = deque(maxlen=10)  # for the report
drawn_ids = Counter()


def check_numbers(prompt):
    """Raise a UsageError if no token can be drawn from the model's logits."""
    logits = model(prompt[:, -model.config.block_size :])[0]
    if logits.isnan().any() or logits.isposinf().any():
        raise UsageError("the model's numbers are not finite: its weights are spoilt, or too large for this dtype")


def draw(text):
    """Print num_samples continuations of a text."""
    tokens = encode(text)
    if not tokens:  # a tokenizer may drop white space
        raise UsageError(f"{codec.name} makes no tokens of the prompt {text!r}: give another, such as --start=The")
    if (largest := max(tokens)) >= vocab_size:
        raise UsageError(
            f"the prompt has the token {largest} of {codec.name}, and the model has a vocabulary of {vocab_size:,}: "
            "bring the symbols that it was trained with"
        )
    prompt = torch.tensor([tokens], device=device)  # (1, T)
    check_numbers(prompt)
    rows, left = min(num_samples, rows_that_fit(prompt)) if is_ours else 1, num_samples
    while left:
        batch = prompt.expand(min(rows, left), -1)
        texts = Texts(tokens, len(batch))
        options = dict(on_token=texts.on_token) if is_ours and (streams or stops) else {}
        # Called on the class: a compiled model's own generate would run the original model.
        drawn = generate(model, batch, max_new_tokens, temperature=temperature, top_k=top_k or None, **options)
        for column in drawn[:, len(tokens) :].split(1, dim=1) if not options else ():
            texts.on_token(column)
        for _ in range(len(tokens) + max_new_tokens - drawn.shape[1]):
            # Draw as many random numbers as without a stop, so that the next samples are the same.
            torch.multinomial(torch.ones(len(batch), vocab_size, device=device), num_samples=1)
        for row, ids in enumerate(texts.tokens):
            drawn_ids.update(ids[len(tokens) :])
            last_texts.append(texts.text(row))
            texts.show(is_last=True) if streams else print(last_texts[-1], end="")
            print("\n---------------")
        left -= len(batch)


def lines_of_standard_input():
    sys.stdin.reconfigure(encoding="utf-8-sig")  # whatever the locale, as with FILE:
    with usage_errors(OSError, UnicodeDecodeError, prefix="standard input can't be read: "):
        for line in sys.stdin:
            yield line.rstrip("\r\n")


# One context for all tokens, so that each weight is converted only once.
with torch.no_grad(), machine.autocast(device, dtype, keep_weights=True):
    if compile:
        trial = torch.zeros(min(num_samples, 2), min(8, model.config.block_size), dtype=torch.long, device=device)
        model, failure = try_compile(model, lambda compiled: compiled(trial), device, dynamic=True)
        if failure:
            print(f"compile failed, sampling goes on without it ({failure})")
    elif device.type == "cuda" and is_ours and models.offers(model, "cache"):
        model = Graphed(model)
    for line in lines_of_standard_input() if start == "-" else [start]:
        if line:
            draw(line)
if left_out := sum(count for i, count in drawn_ids.items() if not decode([i, i])):  # a single token may lose its space
    print(f"warning: {left_out:,} of {drawn_ids.total():,} tokens stand for nothing in {codec.name}, and are left out")
if init_from == "resume":
    kept = os.path.join(out_dir, "sample.txt")
    with contextlib.suppress(OSError), replacing(kept) as file:  # the folder may be read-only
        file.write(f"run {run_id_of(saved)}, iteration {saved.get('iter_num', 'unknown')}\n")
        file.write("\n---------------\n".join(last_texts))
