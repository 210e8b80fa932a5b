"""Train a GPT. On one device:

    python train.py config/train_shakespeare_char.py --compile=False

On 4 GPUs of one machine (torchrun --help tells how to join several machines):

    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
"""

import math
import os
import signal
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
import nanofit
from nanofit import autofit

nanofit.start(ctrl_c_ends_at_once=True)  # until StopSignals listens: then it saves
trials = autofit.Trials(begins="--auto_fit=True" in sys.argv)  # their process starts while this one imports torch
import torch

from configurator import configure, keys_of
from model import GPT, GPTConfig
from nanofit import checkpoint, gradients, machine, models, settings, sharding
from nanofit.batches import SAMPLINGS, Batches
from nanofit.codec import differs, load_meta
from nanofit.compiling import compiled
from nanofit.errors import PatientOutput, UsageError
from nanofit.folder import RunFolder
from nanofit.hellaswag import HellaSwag
from nanofit.metrics import Metrics, open_readers, require_readers, run_facts
from nanofit.optimizers import allocate_state, make_optimizer, set_learning_rate
from nanofit.ranks import World
from nanofit.recovery import Recovery, StopRequested, StopSignals, Watch
from nanofit.run import Run
from nanofit.step import accumulate, clip, evaluate, mean_losses, more_figures, update
from nanofit.tokens import open_data

# ---- the keys of a run: a config file or --key=value overrides them ----------------------------------------
# files and evaluation
out_dir = "out"
eval_interval = 2000  # iterations between evaluations; a checkpoint is written after one
log_interval = 1  # iterations between lines
eval_iters = 200  # batches of each split in an evaluation
eval_only = False  # evaluate once and stop
hellaswag = ""  # path of a hellaswag_val.jsonl: each evaluation measures the accuracy on it, too
always_save_checkpoint = True  # False: save only if the validation loss is the best so far
save_minutes = 0.0  # minutes between checkpoints that are written between evaluations; 0: none
keep = 0  # how many of the last checkpoints stay as ckpt-ITERATION.pt, beside ckpt.pt
patience = 0  # how many evaluations in a row without a better validation loss end the run; 0: never
init_from = "scratch"  # or 'resume'; 'auto' (resume if there is a checkpoint); 'gpt2' to 'gpt2-xl'; a .pt; a folder
# where figures go beside out_dir/metrics.jsonl: Weights & Biases, TensorBoard
wandb_log = False
wandb_project = "owt"
wandb_run_name = "gpt2"
tensorboard_log = False
# data
dataset = "openwebtext"  # a folder in data/
gradient_accumulation_steps = 5 * 8  # micro-steps of an iteration, over all GPUs together
batch_size = 12  # sequences in a micro-step
block_size = 1024  # tokens in a sequence
sampling = "random"  # sequences begin anywhere; 'epoch': each block of the text once before any twice
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; finetuning may want 0.1 or more
bias = False  # in LayerNorm and Linear
# optimizer
optimizer = "adamw"  # as model.py configures it; or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 6e-4  # the largest of the schedule
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient, 0 for any
# learning rate schedule
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000  # about max_iters, after Chinchilla
min_lr = 6e-5  # about learning_rate / 10, after Chinchilla
# machine
backend = "nccl"  # or 'gloo': how the ranks of a multi-GPU run talk
wait_minutes = 180.0  # how long ranks wait for one that doesn't answer
device = machine.best_device()  # 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = machine.best_dtype(device)  # 'float32', 'bfloat16', 'float16'
compile = True
compile_mode = "auto"  # the faster of 'default' and 'reduce-overhead'; or a mode of torch.compile's
# speed for memory
recompute = False  # blocks compute their activations again in the backward pass: less memory, slower
optimizer_state = "float32"  # '8bit' (torchao; changes the numbers a little), 'offload' (to the machine's memory)
shard = False  # several ranks share one model (FSDP2), if it is too large for one GPU
gather_once = False  # with shard: gather weights once an iteration: faster, more memory
loss_chunk_mb = 0  # MiB of logits that exist at a time, 0: by the memory there is
# fitting the GPU
auto_fit = False  # split batch_size x gradient_accumulation_steps so that it fits; the product stays the same
memory_limit_gb = 0.0  # GiB that training may take, 0 for all that is free
compile_min_sms = 68  # under auto_fit, a GPU with fewer SMs compiles only if that pays
dry_run = False  # print auto_fit's plan and stop; it takes seconds
gpu = ""  # print the plan for a card that need not be here: 'RTX 3060', 'A100 80GB', or by its memory '12GB'
ranks = 1  # with gpu: how many of these cards
sys.stdout = output = PatientOutput(sys.stdout)  # if it can't be written, training goes on
defaults = keys_of(globals())
own_fields = models.own_fields(GPTConfig, but=globals())  # those that nanoGPT's lacks are keys too
config, given = configure(globals(), more=own_fields)

# ---- checks: all that can fail quickly is tried here, before anything is written -----------------------------
world = World.of_torchrun()
folder = RunFolder(out_dir, world)
init_from = config["init_from"] = folder.settle(init_from)
saved = folder.load() if init_from == "resume" else None
origin = saved or checkpoint.load_model(init_from)  # whose model the run begins with
taken = settings.go_on_with(saved, config, given, world.size)  # keys of the checkpoint, or of a plan
config |= taken
globals().update(taken)
settings.check(config, world)
dtype = config["dtype"] = settings.dtype(config, {*given, *taken})
data_dir = os.path.join("data", dataset)
meta = load_meta(data_dir)
model_args = models.sizes_of(init_from, config, origin, meta, own_fields)
trained_with = model_args["block_size"]
block_size = model_args["block_size"] = settings.cropped_to(config, given, trained_with)
models.config_of(GPTConfig, {**model_args, "block_size": trained_with})  # raises if no model can have these sizes
iter_num = saved["iter_num"] if saved else 0
if not gpu:
    device = world.init(backend, device, wait_minutes, settings.shared(config))
if not world.is_main:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # one voice: the ranks would print the same lines
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size  # of all ranks together
opening = settings.opening_lines(config, given, device, dtype, model_args, tokens_per_iter, iter_num, meta)
without_effect = settings.without_effect(config, given, GPTConfig, world.size)
print(*opening, *without_effect, *models.lacks(GPT), *differs(meta, model_args["vocab_size"]), sep="\n")
if not dry_run:  # which needs no data and writes nothing
    require_readers(config, world)
    data = open_data(data_dir, block_size, model_args["vocab_size"])
    if not eval_only:  # which changes no file
        folder.take()
    if block_size < trained_with:
        folder.begin_anew()  # a cropped model is another run
    # functions of the model that return {name: number}: more figures for an evaluation
    at_evaluation = [HellaSwag(hellaswag, data_dir, model_args, world, device, dtype)] if hellaswag else []
    readers = open_readers(config, folder, iter_num) if world.is_main else []

# ---- fit the device, before weights take its memory --------------------------------------------------------
plan = autofit.choose(trials, world, device, config, given, model_args, (GPT, GPTConfig), iter_num, saved)
if dry_run:
    world.leave()  # ends the process
machine.set_device(device, plan.limit_bytes)
levers = plan.levers.within(plan.limit_bytes or machine.total_memory_bytes(device), device.type)

# ---- model, optimizer, and the place in the data -----------------------------------------------------------
torch.manual_seed(1337 + world.rank)
if origin or init_from == "scratch":
    model = models.build(GPT, GPTConfig, {**model_args, "block_size": trained_with}, empty=levers.shard and world.rank)
else:
    model = models.pretrained(GPT, init_from, dropout)
    model_args |= {name: getattr(model.config, name) for name in model_args if name != "block_size"}
if origin:
    models.load_weights(model, origin, out_dir if saved else init_from)
    print(*settings.beginning(init_from, origin, config, given), sep="\n")
models.crop(model, trained_with, block_size)
models.apply_levers(model, levers)
sharding.place(model, world, device, dtype, levers)  # with the weights of rank 0: each rank has drawn its own
of_group = dict(weight_decay=weight_decay, learning_rate=learning_rate, betas=(beta1, beta2), device=device)
optimizer = make_optimizer(model, levers.optimizer_state, **of_group, name=config["optimizer"])
scaler, autocast = machine.grad_scaler(device, dtype), machine.autocast(device, dtype)
per_rank = gradient_accumulation_steps // world.size
shares = dict(per_iter=per_rank, rank=world.rank, ranks=world.size, micro_batch_size=plan.micro_batch_size)
state = world.all_gather(torch.get_rng_state())[0]  # where nanoGPT draws its first batch
batches = Batches(data, batch_size=batch_size, device=device, state=state, starts=SAMPLINGS[sampling](), **shares)
own_gradients = gradients.of(model, world, levers)
raw_model = model  # without torch.compile's wrapper
mfu_of = models.mfu_of(model, batch_size * per_rank, device, dtype)
metrics = Metrics(device, iter_num, max_iters, eval_interval, tokens_per_iter, mfu_of, saved)
run = Run(folder, world, device, config, model_args, levers, model, optimizer, scaler, batches, metrics)
run.restore(saved)
saved = origin = None  # frees a whole second model
machine.empty_cache(device)

# ---- what a run survives -----------------------------------------------------------------------------------
signals = StopSignals()
recovery = Recovery(world, device, batches, model, scaler, run.stop, run.note_smaller)
watch = Watch("the gradient's norm", run.way_on, scaled=scaler.is_enabled())
for attempt in recovery.attempts():  # one, unless memory runs out: then again, and then with smaller micro-batches
    with attempt:
        allocate_state(optimizer)
run.rehearse()  # tells now if a checkpoint could not be saved later
if plan.compile and settings.anything_left(config, iter_num):
    for attempt in recovery.attempts():
        with attempt:
            model = compiled(raw_model, device, batches.like_current, autocast, compile_mode, world.size)


# ---- the loop ----------------------------------------------------------------------------------------------
def get_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """Learning rate of iteration it: linear warm-up, cosine decay to min_lr, then min_lr."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


metrics.start(readers, run_facts(device, world, config, defaults, model_args, plan, levers))
with signals.listening():
    while eval_only or run.iter_num <= max_iters:
        if stop := run.begin_iteration(signals.received):
            print(f"{signal.Signals(stop).name} before iteration {run.iter_num}: {run.stop()}")
            world.leave(128 + stop)

        it = run.iter_num
        lr = get_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters) if decay_lr else learning_rate
        set_learning_rate(optimizer, lr)

        if eval_only or it % eval_interval == 0:
            with metrics.paused():
                watch.check()
                try:
                    for attempt in recovery.attempts():
                        with attempt:
                            own = evaluate(model, batches, eval_iters, autocast, world, signals.check)
                except StopRequested:
                    continue  # the beginning of the loop stops the run
                losses = mean_losses(own, world)
                metrics.evaluated(it, lr, losses, **more_figures(raw_model, at_evaluation, world))
                if eval_only or run.evaluated(losses["val"], always_save_checkpoint):  # saves; true if patience is over
                    break

        for attempt in recovery.attempts():
            with attempt:
                loss = accumulate(model, scaler, batches, autocast, own_gradients)  # forward and backward passes
                norm = clip(model, optimizer, scaler, grad_clip)
        update(optimizer, scaler, norm)
        watch.note(it, norm)

        if it % log_interval == 0:
            world.all_reduce_mean([loss])
            metrics.iterated(it, lr, loss, norm, **batches.figures)  # waits for the GPU
            watch.check()
        run.iter_num += 1
    watch.check()
    if not eval_only:
        run.end()

folder.release()
world.destroy()
if run.unsaved or output.failure:
    raise UsageError(run.unsaved or f"standard output could not be written ({output.failure}); all else was done")
