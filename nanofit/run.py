"""The state of a run: what a checkpoint holds, how it is saved, how a run goes on from it."""

import math
import shlex
from dataclasses import asdict

from nanofit import autofit, checkpoint, machine, models, optimizers, sharding
from nanofit.checkpoint import SaveError
from nanofit.errors import usage_errors


class Run:
    """A run between two iterations, in its folder. All ranks must call each of its methods.

    iter_num: the iteration that comes next. best_val_loss: nats. unsaved: why the last checkpoint could not be
    written, or ''.
    """

    def __init__(self, folder, world, device, config, model_args, levers, model, optimizer, scaler, batches, metrics):
        self.folder, self.world, self.device = folder, world, device
        self.config, self.model_args, self.levers = config, model_args, levers
        self.model, self.optimizer, self.scaler, self.batches, self.metrics = model, optimizer, scaler, batches, metrics
        self.iter_num, self.best_val_loss = 0, 1e9
        self.unsaved, self._saved_iter, self._begun = "", -1, 0
        self._never_finite = models.not_finite(model)

    def begin_iteration(self):
        """Keep where random numbers and the data stand: a checkpoint of this iteration begins here, however late it is.

        So an evaluation is repeated on resuming, with the same batches.
        """
        self._begun += 1
        if self._begun == 2:  # an optimizer has its state now
            self.rehearse()
        self._random = {"data": self.batches.state_dict(), "generators": machine.rng_state(self.device)}

    def snapshot(self):
        """What a checkpoint holds: the run as iteration iter_num began."""
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
        """Go on where a checkpoint was made. What it lacks, as nanoGPT's does, begins anew."""
        if not saved:
            return
        self.iter_num, self.best_val_loss = saved["iter_num"], float(saved["best_val_loss"])
        self._saved_iter = self.iter_num - 1
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
                place = ranks[0]["data"]  # the stream is one, of however many ranks
                # Version 0.1 kept a bare tensor.
                place = place if isinstance(place, dict) else {"before": place}
                self.batches.load_state_dict(place, drawn=saved["config"].get("batch_size"))

    def rehearse(self):
        """Raise a UsageError on all ranks if a checkpoint of this run could not be saved, or not be read again."""
        entries = ("iter_num", "best_val_loss", "config", "model_args")
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.world.agree(lambda: checkpoint.rehearse({**parts, **{name: getattr(self, name) for name in entries}}))

    def save(self, name=checkpoint.NAME):
        """Write a checkpoint; '' or why that failed, which ends no run."""
        try:
            # A weight that never was finite is meant so, as a mask.
            if self.world.all_reduce_max(len(models.not_finite(self.model) - self._never_finite)):
                raise SaveError("not saved: the weights are not finite; a checkpoint that is there stays as it is")
            self.folder.save(self.snapshot(), name)
            self.unsaved, self._saved_iter = "", self.iter_num
        except SaveError as e:
            self.unsaved = str(e)
        return self.unsaved

    def evaluated(self, val_loss, always_save):
        """Save after an evaluation, if it was the best so far or always_save; never at iteration 0."""
        if val_loss < self.best_val_loss or always_save or math.isnan(self.best_val_loss):
            self.best_val_loss = val_loss
            if self.iter_num > 0:
                print(f"saving checkpoint to {self.folder.out_dir}")
                if self.save():
                    print(f"{self.unsaved}; training goes on")

    def stop(self):
        """Save where a run stops, beside the best checkpoint where only that is kept; returns what to tell of it."""
        if self.iter_num == 0:
            return "nothing is trained yet, and nothing saved"
        over = self.iter_num > self.config["max_iters"]
        failure = self.save(self.folder.place_to_stop(self.config["always_save_checkpoint"]))
        how = "--init_from=resume with a larger --max_iters" if over else "--init_from=resume"
        return failure or f"checkpoint saved to {self.folder.out_dir}, {how} goes on"

    def note_smaller(self, batch_size, size):
        """Let the next start of a sharded run begin with micro-batches of this size; one rank may call it alone."""
        autofit.note_smaller(self.folder.out_dir, batch_size, size)

    def end(self):
        """After the last iteration: save, if more than this one isn't in a checkpoint."""
        if self._saved_iter < self.iter_num - 1:
            self.begin_iteration()
            print(f"iteration {self.iter_num - 1} was the last: {self.stop()}")
        print(f"python report.py {shlex.quote(self.folder.out_dir)} shows this run")
