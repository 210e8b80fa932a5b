"""Take a trained model elsewhere.

python export.py --out_dir=out-shakespeare-char --to=shakespeare-gpt
python export.py --out_dir=out-shakespeare-char --weights_only_to=shakespeare.pt
"""

import os
import sys
import tempfile

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
import nanofit

nanofit.start()
import torch

from configurator import configure
from model import GPT, GPTConfig
from nanofit import checkpoint, models
from nanofit.errors import UsageError
from nanofit.files import refuse_to_replace, whole_or_not_at_all
from nanofit.tools import huggingface

# ---- keys: a config file or --key=value overrides them -----------------------------------------------------
out_dir = "out"  # the checkpoint
to = ""  # a new folder, for Hugging Face's transformers
push_to = ""  # 'user/name': the same folder as a model on the Hugging Face hub
weights_only_to = ""  # a new file, 'name.pt': the checkpoint without its optimizer, a third of the size
keep_padding = False  # keep the rows that pad the vocabulary
config, given = configure(globals())

KEPT = ("model", "model_args", "activation", "config", "iter_num", "best_val_loss")  # without the optimizer
NOT_FOR_OTHERS = ("out_dir", "device", "backend", "init_from")  # keys about the machine that trained
if not (to or push_to or weights_only_to):
    raise UsageError("nothing to do: name a new folder, --to=my-gpt, or a new file, --weights_only_to=my-gpt.pt")
if weights_only_to and not weights_only_to.endswith(".pt"):
    raise UsageError(f"weights_only_to must end in .pt, not {weights_only_to!r}")
for path in filter(None, (to, weights_only_to)):
    refuse_to_replace(path)

# ---- the checkpoint ----------------------------------------------------------------------------------------
name = checkpoint.name_of_model(out_dir)
source = os.path.join(out_dir, name)
saved = {key: value for key, value in checkpoint.load(out_dir, name).items() if key in KEPT}
saved["config"] = {
    key: value for key, value in saved["config"].items() if key not in NOT_FOR_OTHERS and not key.startswith("wandb")
}
if weights_only_to:
    with whole_or_not_at_all(weights_only_to) as part, open(part, "wb") as file:
        torch.save(saved, file)
    print(f"{source} -> {weights_only_to}: {os.path.getsize(weights_only_to) / 2**20:.1f} MiB")

if to or push_to:
    model = models.build(GPT, GPTConfig, saved["model_args"])
    models.load_weights(model, saved, source)
    del saved["model"]
    dataset = saved["config"].get("dataset")
    data_dir = dataset and os.path.join("data", dataset)
    with tempfile.TemporaryDirectory() as unnamed:
        folder = to or os.path.join(unnamed, "model")
        title = push_to or os.path.basename(os.path.abspath(to))
        difference = huggingface.export(model, saved, folder, title, data_dir, keep_padding)
        print(f"{source} -> {to or push_to}: transformers' logits differ from ours by at most {difference:.1e}")
        if push_to:
            print(f"pushed to {huggingface.push(folder, push_to)}")
