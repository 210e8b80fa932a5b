"""Who compiles, and why: facts and measurements in, a verdict with its reason out."""

from dataclasses import replace

import pytest

from nanofit.autofit.compiling import SHORT_RUN_SECONDS, may_compile, pays_off, refuse_mode, too_short
from nanofit.autofit.plan import Trial
from nanofit.units import duration

GPU = dict(asked=True, device_type="cuda", capability=(8, 0), sm_count=108, min_sms=68, has_triton=True,
           platform="linux")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict", "why"),
    [
        (dict(), "yes", "108 SMs"),  # A100
        (dict(capability=(9, 0), sm_count=132), "yes", "132 SMs"),  # H200
        (dict(capability=(8, 6), sm_count=82), "yes", "82 SMs"),  # RTX 3090
        (dict(capability=(7, 5), sm_count=68), "yes", "68 SMs"),  # RTX 2080 Ti
        (dict(capability=(7, 5), sm_count=40), "prove", "40 SMs are fewer than compile_min_sms=68"),  # T4
        (dict(capability=(8, 6), sm_count=28), "prove", "28 SMs are fewer"),  # RTX 3060
        (dict(capability=(8, 9), sm_count=46), "prove", "46 SMs are fewer"),  # RTX 4070
        (dict(sm_count=14), "prove", "14 SMs are fewer"),  # A100 MIG 1g.5gb
        (dict(sm_count=42), "prove", "42 SMs are fewer"),  # A100 MIG 3g.20gb
        (dict(sm_count=28, min_sms=20), "yes", "compile_min_sms=20"),
        (dict(capability=(6, 1), sm_count=28), "no", "capability 7.0, this GPU has 6.1"),  # GTX 1080 Ti
        (dict(capability=(6, 0), sm_count=80), "no", "capability 7.0"),  # P100, were it larger
        (dict(platform="win32", has_triton=False), "no", "no Triton for win32"),
        (dict(has_triton=False), "no", "Triton is not installed"),
        (dict(asked=False), "no", "compile=False"),
        (dict(device_type="cpu", capability=(0, 0), sm_count=0), "prove", "on a CPU"),
        (dict(device_type="mps", capability=(0, 0), sm_count=0), "no", "prototype"),
    ],
)
def test_who_may_compile(changes, verdict, why):
    got, reason = may_compile(**{**GPU, **changes})
    assert got == verdict
    assert why in reason


def test_max_autotune_is_refused_on_small_gpus():
    assert "needs a GPU of compile_min_sms=68 SMs, this one has 28" in refuse_mode("max-autotune", 28, 68)
    assert refuse_mode("max-autotune-no-cudagraphs", 28, 68)
    assert not refuse_mode("max-autotune", 68, 68)
    assert not refuse_mode("reduce-overhead", 28, 68)


def test_compiling_must_save_more_than_it_costs():
    eager = Trial(8, tokens_per_second=1000.0)
    compiled = Trial(8, compiled=True, tokens_per_second=1250.0, compile_seconds=60.0)
    worth, why = pays_off(eager, compiled, tokens_left=1_000_000)  # 1,000 s without, 800 s with
    assert worth
    assert why == "compiling takes 1.0 min and saves 3.3 min of 16.7 min"
    assert not pays_off(eager, compiled, tokens_left=250_000)[0]
    assert not pays_off(eager, replace(compiled, tokens_per_second=900.0), 10**12)[0]


def test_a_run_shorter_than_compiling_takes_is_too_short():
    eager = Trial(8, tokens_per_second=1000.0)
    assert too_short(eager, tokens_left=32_000) == "the run takes 32 s without"
    assert too_short(eager, tokens_left=1000 * SHORT_RUN_SECONDS) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1.0 min"), (198, "3.3 min"), (63_000, "17.5 h"),
                          (-90, "-1.5 min")]
)  # fmt: skip
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
