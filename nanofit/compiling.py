"""torch.compile for training: kept only if it runs, in the faster mode."""

import warnings

import torch

from nanofit import machine
from nanofit.errors import first_line, is_out_of_memory
from nanofit.gradients import Gradients
from nanofit.models import loss_of
from nanofit.progress import waiting

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile
MOSTLY_LAUNCHING = 0.5  # of a step's time; below that, launching hides behind the GPU's work
WORTH_GRAPHS = 1.01  # times as fast, at least
DRY_STEPS = 4  # timed steps, of which the fastest counts: CUDA graphs are recorded in the first ones


def dry_step(model, batch, autocast):
    """All that training does with a model, without an update: two micro-steps and an evaluation.

    Two, because some of torch.compile's modes fail only when gradients accumulate.
    """
    Gradients(model).begin(2)
    for _ in range(2):
        with autocast:
            loss = loss_of(model, *batch)
        loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    try:
        with torch.no_grad(), autocast:
            loss_of(model, *batch)
    finally:
        model.train()


def compiled(model, *how):
    """compile_to_train with lines about it. Returns the compiled model, or the model itself if that fails."""
    print("compiling the model... (takes a minute or so; Ctrl-C ends it)")
    with waiting("compiling"):
        model, failure = compile_to_train(model, *how)
    if failure:
        print(f"compile failed, training goes on without it ({failure}); python doctor.py looks for the cause")
    return model


def compile_to_train(model, device, batch, autocast, mode, ranks=1):
    """try_compile for training on micro-batches of batch's size, for which the kernels are made.

    mode: one of torch.compile's, or 'auto': 'reduce-overhead' if one GPU trains and CUDA graphs make it faster, else
    'default'.
    """

    def step(compiled):
        dry_step(compiled, batch, autocast)

    def attempt(mode):
        return try_compile(model, step, device, mode=mode, dynamic=False)

    def timed(compiled):
        state = machine.rng_state(device)
        found = min(machine.seconds_of(lambda: step(compiled), device) for _ in range(DRY_STEPS))
        machine.set_rng_state(state, device)
        return found

    if mode != "auto":
        return attempt(mode)
    return faster_mode(attempt, timed) if device.type == "cuda" and ranks == 1 else attempt("default")


def faster_mode(attempt, timed):
    """(model, failure) in the faster mode of torch.compile. CUDA graphs are tried if launching takes most of a step.

    attempt(mode): (model, failure). timed(model): (seconds of a step, seconds until it is launched).
    """
    model, failure = attempt("default")
    if failure:
        return model, failure
    seconds, launching = timed(model)
    told = f"launching takes {launching / seconds:.0%} of a step"
    if launching < MOSTLY_LAUNCHING * seconds:
        print(f"compile_mode default: {told}, too little for CUDA graphs to gain much")
        return model, ""
    try:
        graphs, failure = attempt("reduce-overhead")
        gain = 0.0 if failure else seconds / timed(graphs)[0]
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        gain, failure = 0.0, "memory ran out"
    why = f"CUDA graphs fail ({failure})" if failure else f"CUDA graphs make it {gain:.2f} times as fast"
    if gain > WORTH_GRAPHS:
        print(f"compile_mode reduce-overhead: {told}, and {why}")
        return graphs, ""
    print(f"compile_mode default: {told}, but {why}")
    torch.compiler.reset()  # frees the memory of the graphs; the kernels stay in the compiler's cache
    return attempt("default")


def try_compile(model, trial, device, **options):
    """torch.compile(model, **options), kept only if trial(compiled) runs: (model, failure).

    torch.compile fails only at the first call: without a C++ compiler or Triton, on old GPUs, on an unknown operation.
    Then the model is returned as it was, and failure is a sentence; else failure is ''. The state of random generators
    is kept. An error that says that memory ran out is raised.
    """
    state, training = machine.rng_state(device), model.training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.compile uses parts that torch deprecates
            compiled = torch.compile(model, **options)
            model.runs_in_cuda_graphs = options.get("mode") in CUDA_GRAPH_MODES
            trial(compiled)
        return compiled, ""
    except Exception as e:  # anything; the model's own mistakes show again without the compiler
        torch.compiler.reset()
        model.zero_grad(set_to_none=True)
        model.runs_in_cuda_graphs = False
        model.train(training)
        if is_out_of_memory(e):
            raise
        return model, f"{type(e).__name__}: {first_line(e)}"
    finally:
        machine.set_rng_state(state, device)
