"""Whether to use torch.compile. Pure: facts and measurements come in, a verdict with its reason goes out."""

from nanofit.units import duration

TRITON_CAPABILITY = (7, 0)  # the oldest GPUs that Triton makes kernels for
SHORT_RUN_SECONDS = 3000  # compiling takes a minute or so: to try it would take more than 2% of a shorter run


def may_compile(*, asked, device_type, capability, sm_count, min_sms, has_triton, platform):
    """(verdict, why): 'yes', 'no', or 'prove' where compiling must pay for itself in a trial.

    capability: CUDA compute capability (major, minor). min_sms: Inductor tunes matrix products from 68 streaming
    multiprocessors on, and so do we take it for granted from there that compiling pays.
    """
    if not asked:
        return "no", "compile=False"
    if device_type == "mps":
        return "no", "torch.compile on mps is a prototype"
    if device_type == "cpu":
        return "prove", "on a CPU compiling pays in long runs alone"
    if capability < TRITON_CAPABILITY:
        return "no", f"Triton needs compute capability 7.0, this GPU has {capability[0]}.{capability[1]}"
    if not has_triton:
        return "no", f"there is no Triton for {platform}" if platform == "win32" else "Triton is not installed"
    if sm_count < min_sms:
        return "prove", f"{sm_count} SMs are fewer than compile_min_sms={min_sms}"
    return "yes", f"{sm_count} SMs, compile_min_sms={min_sms}"


def refuse_mode(mode, sm_count, min_sms):
    """A sentence where the GPU is too small for this mode of torch.compile, else ''."""
    if mode.startswith("max-autotune") and sm_count < min_sms:
        return (
            f"compile_mode={mode!r} needs a GPU of compile_min_sms={min_sms} SMs, this one has {sm_count}: Inductor "
            "would only warn and not tune matrix products; set compile_mode to 'default' or 'reduce-overhead'"
        )
    return ""


def too_short(eager, tokens_left):
    """Why compiling needn't even be tried, where the run takes less than it would: a sentence, else ''."""
    seconds = tokens_left / eager.tokens_per_second
    return f"the run takes {duration(seconds)} without" if seconds < SHORT_RUN_SECONDS else ""


def judge(verdict, why, eager, compiled, tokens_left):
    """(whether to compile, why): may_compile's 'yes' or 'prove' in the light of an eager and a compiled Trial."""
    if not compiled.fits:
        return False, f"the compiled trial failed: {compiled.failure or 'it does not fit'}"
    if verdict == "prove":
        worth, sums = pays_off(eager, compiled, tokens_left)
        return worth, f"{why}, and {sums}"
    if compiled.micro_batch_size < eager.micro_batch_size and compiled.tokens_per_second <= eager.tokens_per_second:
        return False, f"compiled, batch_size {eager.micro_batch_size} does not run, and a smaller one is slower"
    return True, why


def pays_off(eager, compiled, tokens_left):
    """(whether compiling saves more time over tokens_left than it costs, why): two Trials of one size."""
    without, cost = tokens_left / eager.tokens_per_second, compiled.compile_seconds
    saved = without - tokens_left / compiled.tokens_per_second
    return saved > cost, f"compiling takes {duration(cost)} and saves {duration(saved)} of {duration(without)}"
