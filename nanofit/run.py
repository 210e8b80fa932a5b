"""The state of a run: what a checkpoint holds, how it is saved, how a run resumes from it."""

import math
import shlex
import sys
import threading
import time
from dataclasses import asdict

from nanofit import autofit, checkpoint, machine, models, optimizers, sharding
from nanofit.errors import first_line, usage_errors

WAIT_FOR_FILES = ("cpu",)  # devices on which a copy and its writer would take memory and cores from training


class Run:
    """A run between two iterations, in its folder. All ranks must call each of its methods.

    iter_num: the next iteration. best_val_loss: in nats; as in nanoGPT, with always_save it is the last one. unsaved:
    why the last checkpoint could not be written, or ''.
    """

    def __init__(self, folder, world, device, config, model_args, levers, model, optimizer, scaler, batches, metrics):
        self.folder, self.world, self.device = folder, world, device
        self.config, self.model_args, self.levers = config, model_args, levers
        self.model, self.optimizer, self.scaler, self.batches, self.metrics = model, optimizer, scaler, batches, metrics
        self.iter_num, self.best_val_loss = 0, 1e9
        self.unsaved = self._failure = ""
        self._saving = self._saved_iter = -1  # iterations of the last checkpoint begun, and of the last one written
        self._saved_at, self._begun = time.monotonic(), 0
        self._writer = None  # the thread that writes a checkpoint, on rank 0
        self._never_finite = models.not_finite(model)

    def begin_iteration(self, signal=0):
        """Keep the state of the random generators and of the data, with which a checkpoint of this iteration resumes.

        So an evaluation is repeated on resuming, with the same batches. Saves if save_minutes have passed. signal: the
        number of the signal that this rank has received, or 0. Returns that of any rank.
        """
        self._begun += 1
        if self._begun == 2:  # an optimizer has its state now
            self.rehearse()
        self._random = {"data": self.batches.state_dict(), "generators": machine.rng_state(self.device)}
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self.world.is_main and 0 < self.config["save_minutes"] <= minutes
        asked = self.world.all_reduce_max(2 * signal + due)  # one message for both
        if asked == 1 and self.iter_num > 0:
            self.save(self._place())
        return asked // 2

    def snapshot(self):
        """What a checkpoint holds: the run at the beginning of iteration iter_num."""
        return {
            "model": sharding.whole_model(self.model, self.world),
            "optimizer": sharding.whole_optimizer(self.optimizer, self.world),
            "model_args": self.model_args,
            "activation": models.activation_of(self.model),
            "iter_num": self.iter_num,
            "best_val_loss": self.best_val_loss,
            "config": self.config,
            "data": self.batches.fingerprints,
            "scaler": self.scaler.state_dict(),
            "metrics": self.metrics.state(self.iter_num),
            "rng": self.world.all_gather(self._random),  # of each rank
            "split": {
                "of": [self.batches.batch_size, self.batches.per_iter * self.world.size],  # as configured
                "into": [self.batches.micro_batch_size, self.batches.micro_steps * self.world.size],
                "levers": asdict(self.levers),
            },
        }

    def restore(self, saved):
        """Resume from a checkpoint. What it lacks, such as nanoGPT's does, begins anew."""
        if not saved:
            return
        self.iter_num, self.best_val_loss = saved["iter_num"], float(saved["best_val_loss"])
        self._saving = self._saved_iter = self.iter_num - 1
        for split, known in self.batches.fingerprints.items():
            if saved.get("data", {}).get(split, known) != known:
                print(
                    f"{split}.bin is not what it was when the checkpoint was saved: the run goes on with what is there"
                )
        cropped = saved["model_args"].get("block_size") != self.model_args["block_size"]
        optimizers.load(self.optimizer, saved["optimizer"], cropped)
        with usage_errors(LookupError, TypeError, RuntimeError, prefix="the checkpoint's scaler or rng is damaged: "):
            if self.scaler.is_enabled() and saved.get("scaler"):
                self.scaler.load_state_dict(saved["scaler"])
            ranks = saved.get("rng", ())
            if self.world.rank < len(ranks):
                machine.set_rng_state(ranks[self.world.rank]["generators"], self.device)
            if ranks:
                place = ranks[0]["data"]  # all ranks share one stream
                # Version 0.1 kept a bare tensor.
                place = place if isinstance(place, dict) else {"before": place}
                self.batches.load_state_dict(place, drawn=saved["config"].get("batch_size"))

    def rehearse(self):
        """Raise a UsageError on all ranks if a checkpoint of this run could not be saved or read again."""
        entries = ("iter_num", "best_val_loss", "config", "model_args")
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.world.agree(lambda: checkpoint.rehearse({**parts, **{name: getattr(self, name) for name in entries}}))
        if not self._begun and self.world.is_main and not self.config["eval_only"]:
            size = checkpoint.size_of(parts)
            if says := checkpoint.short_of_room(self.folder.out_dir, size, self.config["keep"]):
                print(f"warning: {says}")

    def save(self, name=checkpoint.NAME, goes_on=True):
        """Write a checkpoint, in the background if the run goes on. written() gives the result."""
        self.written()
        self._saving, self._saved_at = self.iter_num, time.monotonic()
        if goes_on:
            print(f"saving checkpoint to {self.folder.out_dir}")
        # A weight that was not finite from the start is meant so, for example a mask.
        if self.world.all_reduce_max(len(models.not_finite(self.model) - self._never_finite)):
            self._note("not saved: the weights are not finite; a checkpoint that is there stays as it is", goes_on)
            return
        snapshot = self.snapshot()
        if self.world.is_main:
            copy = checkpoint.on_host(snapshot) if goes_on and self.device.type not in WAIT_FOR_FILES else None
            self._writer = threading.Thread(
                target=self._write, args=(copy or snapshot, name, goes_on), name="checkpoint"
            )
            self._writer.start()
            if copy is None:  # training would move its tensors
                self._writer.join()

    def _write(self, snapshot, name, goes_on):
        try:
            self.folder.save(snapshot, name, self.config["keep"])
            self._note("", False)
        except Exception as e:  # nobody else hears of a thread's error
            said = str(e) if isinstance(e, checkpoint.SaveError) else f"not saved: {type(e).__name__}: {first_line(e)}"
            self._note(said, goes_on)

    def _note(self, failure, goes_on):
        self._failure = failure
        if failure and goes_on:
            print(f"{failure}; training goes on")

    def written(self):
        """Wait until the last checkpoint is written. Returns '' or why it could not be written, as in unsaved."""
        if self._writer:
            self._writer.join()
        self._writer, self.unsaved = None, self.world.all_gather(self._failure)[0]
        if not self.unsaved:
            self._saved_iter = self._saving
        return self.unsaved

    def _place(self):
        self.written()  # what is being written may become ckpt.pt, and be the best
        return self.folder.place_to_stop(self.config["always_save_checkpoint"])

    def evaluated(self, val_loss, always_save):
        """Save after an evaluation if it is the best so far, or with always_save or keep; never at iteration 0.

        Returns whether the run ends: after patience evaluations in a row without a better loss.
        """
        best = val_loss < self.best_val_loss or always_save or math.isnan(self.best_val_loss)
        if best:
            self.best_val_loss = val_loss
        if self.iter_num > 0 and (best or self.config["keep"]):
            self.save(checkpoint.NAME if best else self._place())
        since, patience = self.metrics.evaluations_since_best(self.iter_num), self.config["patience"]
        if ends := 0 < patience <= since:
            print(f"no better val loss in {since} evaluations in a row, patience={patience}: {self.stop()}")
        return ends

    def stop(self):
        """Save when a run stops, beside the best checkpoint if only that is kept. Returns a sentence about it."""
        if self.iter_num == 0:
            return "nothing is trained yet, and nothing saved"
        self.written()
        if self._saved_iter != self.iter_num:
            self.save(self._place(), goes_on=False)
        return self.written() or f"checkpoint saved to {self.folder.out_dir}; {self.way_on()}"

    def way_on(self):
        """A sentence with the command that resumes from the last checkpoint, or that there is none."""
        if self._saved_iter < 0:
            return "nothing is saved yet"
        several = f"--nproc_per_node={self.world.local_size}"
        if self.world.local_size < self.world.size:
            several += " (and the others of its options)"
        launcher = "python" if self.world.size == 1 else f"torchrun --standalone {several}"
        longer = "with a larger --max_iters, " if self.iter_num > self.config["max_iters"] else ""
        script, out_dir = shlex.quote(sys.argv[0]), shlex.quote(self.folder.out_dir)
        return f"{longer}this goes on: {launcher} {script} --out_dir={out_dir} --init_from=resume"  # the last, to copy

    def note_smaller(self, batch_size, size):
        """Let the next start of a sharded run begin with micro-batches of this size; one rank may call it alone."""
        autofit.note_smaller(self.folder.out_dir, batch_size, size)

    def end(self):
        """After the last iteration: save, unless only this iteration would be lost."""
        self.written()
        if self._saved_iter < self.iter_num - 1:
            self.begin_iteration()
            print(f"iteration {self.iter_num - 1} was the last: {self.stop()}")
        print(f"python report.py {shlex.quote(self.folder.out_dir)} shows this run")
