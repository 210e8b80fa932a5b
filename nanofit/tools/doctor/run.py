"""What would stop the run that is asked about: train.py's own steps up to its first iteration, by its own functions.

The sentence with which a function refuses is what train.py would end with. What is found stays as it is.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import urllib.request
from pathlib import Path

import torch

from nanofit import autofit, machine, models, settings
from nanofit.codec import load_meta
from nanofit.errors import UsageError, first_line
from nanofit.folder import LOCK, RunFolder
from nanofit.metrics import require_readers
from nanofit.ranks import ALONE
from nanofit.tokens import open_data
from nanofit.tools.doctor.checks import OK, STOP, WARNING, Verdict, size_of
from nanofit.units import CONTEXT_BYTES, GIB, GPT2_SIZES, PADDED_VOCAB_SIZE, memory_limit

LOOKED_AT = 8  # batches of each split whose tokens are looked at
CHECKPOINTS_AT_ONCE = 3  # the last, the one before, and the one that is being written
REACHED_SECONDS = 5


class Run:
    """verdicts: {name of a step: its Verdict}, of those that have one.

    config, given: train.py's keys, and those of them that were named. own: models.own_fields of config_class.
    """

    def __init__(self, config, given, model_class, config_class, own):
        self.config, self.given, self.own, self.verdicts = dict(config), given, own, {}
        self.model_class, self.config_class = model_class, config_class
        self.folder = RunFolder(config["out_dir"])
        self.data_dir = os.path.join("data", config["dataset"])
        self.of_checkpoint = self.meta = self.data = self.sizes = None  # as the steps find them out

    def look(self):
        """Take the steps in turn. One that needs what another has failed to find out has nothing to say."""
        for name, step in STEPS.items():
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # what training would tell
                    found = step(self)
            except (UsageError, OSError) as e:
                found = Verdict(STOP, str(e))
            if found:
                self.verdicts[name] = found
            if name == "keys" and found:
                return

    def _checkpoint(self):
        config = self.config
        config["init_from"] = self.folder.settle(config["init_from"])
        if config["init_from"] != "resume":
            return None
        saved = self.folder.load()
        config |= settings.go_on_with(saved, config, self.given)
        self.of_checkpoint = {"model_args": saved["model_args"]}  # all of it is a whole second model
        return Verdict(OK, f"goes on at iteration {saved['iter_num']:,}")

    def _keys(self):
        config = self.config
        settings.check({**config, "shard": False}, ALONE)  # how many ranks torchrun would start isn't known
        if "dtype" in self.given or machine.is_here(config["device"]):
            config["dtype"] = settings.dtype(config, self.given)

    def _no_effect(self):
        told = settings.without_effect(self.config, self.given, self.config_class, ALONE.size)
        return Verdict(WARNING, "\n".join(told), "leave them out") if told else None

    def _kernels(self):
        if self.config["device"].startswith("cuda") and not settings.is_elsewhere(self.config):
            machine.require_kernels(machine.find_device(self.config["device"]))

    def _data(self):
        self.meta = load_meta(self.data_dir)
        if self.config["dry_run"]:  # which reads none
            return None
        own = self.of_checkpoint and "block_size" not in self.given
        block_size = (self.of_checkpoint["model_args"] if own else self.config)["block_size"]
        vocab_size = self.meta["vocab_size"] if self.meta else PADDED_VOCAB_SIZE
        if self.of_checkpoint:
            vocab_size = self.of_checkpoint["model_args"]["vocab_size"]
        self.data = open_data(self.data_dir, block_size, vocab_size)
        counts = ", ".join(f"{file.tokens:,} {split} tokens" for split, file in self.data.items())
        return Verdict(OK, f"{self.config['dataset']}: {counts}")

    def _model(self):
        init_from = self.config["init_from"]
        if init_from == "resume" and not self.of_checkpoint:
            return
        sizes = models.sizes_of(init_from, self.config, self.of_checkpoint, self.meta, self.own)
        models.config_of(self.config_class, sizes)
        sizes["block_size"] = settings.cropped_to(self.config, self.given, sizes["block_size"])
        self.sizes = sizes

    def _vocabulary(self):
        """Whether the tokens of some batches are the model's, by the look that a run takes at each."""
        if not (self.data and self.sizes):
            return None
        model_has = self.sizes["vocab_size"]
        for file in open_data(self.data_dir, self.sizes["block_size"], model_has).values():
            file.read(file.draw(LOOKED_AT * self.config["batch_size"], torch.Generator()))
        has = self.meta["vocab_size"] if self.meta else model_has
        if has == model_has:
            return Verdict(OK, f"the model's vocabulary has {model_has}")
        says = f"meta.pkl of the data names {has} symbols, the model's vocabulary has {model_has}"
        do = f"python data/{self.config['dataset']}/prepare.py, or --out_dir=... of a model of this data set"
        return Verdict(WARNING, says, do)

    def _weights(self):
        """Whether the weights that a run starts from, where they aren't a checkpoint's, can be had."""
        name = self.config["init_from"]
        if name in ("scratch", "resume") or not self.sizes:
            return None
        if name not in GPT2_SIZES:
            there = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]
            return None if there else Verdict(STOP, f"{name} holds no weights: neither .safetensors nor .bin")
        if not importlib.util.find_spec("huggingface_hub"):
            return Verdict(STOP, f"init_from={name!r} fetches weights by huggingface_hub", "pip install transformers")
        from huggingface_hub import constants, try_to_load_from_cache

        files = ("model.safetensors", "pytorch_model.bin")
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return Verdict(OK, f"the weights of {name} are in the hub's cache")
        address = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
        try:
            if constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set")
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACHED_SECONDS).close()
        except OSError as e:
            says = f"the weights of {name} are not in the hub's cache, and {address} can't be reached ({first_line(e)})"
            return Verdict(WARNING, says, "--init_from=... a folder with a copy of them")
        return Verdict(OK, f"the weights of {name} are fetched from the hub")

    def _readers(self):
        if not self.config["dry_run"]:
            require_readers(self.config, ALONE)

    def _folder(self):
        """Take the folder as a run does, and give it back as it was."""
        if self.config["eval_only"] or self.config["dry_run"]:  # which write nothing there
            return None
        path = Path(os.path.abspath(self.folder.out_dir))
        made = [place for place in (path, *path.parents) if not os.path.lexists(place)]
        lock = [] if os.path.lexists(self.folder.path(LOCK)) else [self.folder.path(LOCK)]
        try:
            self.folder.take()
        finally:
            self.folder.release()
            with contextlib.suppress(OSError):  # it was never made, or somebody else uses it by now
                for file in lock:
                    os.remove(file)
                for place in made:
                    os.rmdir(place)
        return Verdict(OK, f"{self.folder.out_dir} can be written to")

    def _disk(self):
        """Whether there is room for checkpoints, each with AdamW's two moments."""
        path = Path(os.path.abspath(self.folder.out_dir))
        place = next((folder for folder in (path, *path.parents) if os.path.isdir(folder)), None)
        if not self.sizes or not place:
            return None
        try:
            with torch.device("meta"):
                model = self.model_class(models.config_of(self.config_class, self.sizes))
        except Exception as e:  # a model that reads values while it is built
            return Verdict(WARNING, f"what a checkpoint takes isn't known ({first_line(e)})")
        needed, free = 3 * sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(place).free
        says = f"{size_of(free)} are free where out_dir is, a checkpoint takes about {size_of(needed)}"
        if free < needed:
            return Verdict(STOP, f"{says}: none could be written", "--out_dir=... on a larger disk")
        if free < CHECKPOINTS_AT_ONCE * needed:
            says += f", and {CHECKPOINTS_AT_ONCE} are there while one is written"
            return Verdict(WARNING, says, "--out_dir=... on a larger disk")
        return Verdict(OK, says)

    def _fit(self):
        """Whether the batch fits, by the plan of --dry_run=True; always simulated."""
        if not self.sizes or any(found.level == STOP for found in self.verdicts.values()):
            return None
        config, free = self.config, None
        if not settings.is_elsewhere(config):
            try:
                free = machine.free_memory_bytes(machine.find_device(config["device"]))
            except (UsageError, RuntimeError) as e:
                return Verdict(WARNING, f"what is free isn't known, and so not what fits ({first_line(e)})")
        card = config["memory_limit_gb"]
        if free is not None:
            holds = config["auto_fit"] or config["device"].startswith("cuda")
            limit = memory_limit(free, card if holds else 0.0)
            # From a simulated card, CUDA's context and the margin are taken off: this card leaves the limit.
            card = (limit + min(limit / 19, GIB) + CONTEXT_BYTES * config["device"].startswith("cuda")) / GIB
        asked = {**config, "memory_limit_gb": card, "dry_run": True, "shard": False}
        try:
            classes = self.model_class, self.config_class
            plan = autofit.fit(ALONE, config["device"], asked, self.given, self.sizes, classes, config["max_iters"])
        except UsageError as e:
            if "nothing fits" in str(e):
                return Verdict(STOP, str(e))
            return Verdict(WARNING, f"whether it fits can't be simulated: {e}")
        except Exception as e:  # a model that can't be simulated
            return Verdict(WARNING, f"whether it fits can't be simulated: {type(e).__name__}: {first_line(e)}")
        return self._judged(plan)

    def _judged(self, plan):
        size, limit = self.config["batch_size"], f"{size_of(plan.limit_bytes)} may be taken, simulated"
        if plan.micro_batch_size >= size and plan.levers.recompute == self.config["recompute"]:
            what = "it" if plan.micro_batch_size == size else f"even {plan.micro_batch_size}"
            return Verdict(OK, f"batch_size {size} fits: {what} takes {size_of(plan.peak_bytes)}, {limit}")
        if self.config["auto_fit"]:
            return Verdict(OK, f"auto_fit makes it fit: {plan}; {limit}")
        told = (
            f"batch_size {size} would not fit, {plan.micro_batch_size} would with {size_of(plan.peak_bytes)}; {limit}"
        )
        return Verdict(WARNING, told, "--auto_fit=True")


STEPS = {  # in train.py's order, but for what takes longest
    "checkpoint": Run._checkpoint,
    "keys": Run._keys,
    "no effect": Run._no_effect,
    "kernels": Run._kernels,
    "data": Run._data,
    "model": Run._model,
    "vocabulary": Run._vocabulary,
    "weights": Run._weights,
    "readers": Run._readers,
    "folder": Run._folder,
    "disk": Run._disk,
    "fit": Run._fit,
}
