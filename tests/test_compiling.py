"""Which mode of torch.compile trains. What a failed attempt leaves is in test_step.py."""

import pytest
import torch

from nanofit.compiling import compile_to_train, faster_mode


def modes(monkeypatch, seconds, launching, graphs, fails=None):
    """(mode that is chosen, modes that were tried) where a step takes so many seconds."""
    tried = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)

    def attempt(mode):
        tried.append(mode)
        if mode == "reduce-overhead" and isinstance(fails, Exception):
            raise fails
        return mode, (fails or "") if mode == "reduce-overhead" else ""

    def timed(mode):
        return (graphs, graphs) if mode == "reduce-overhead" else (seconds, launching)

    chosen, failure = faster_mode(attempt, timed)
    assert failure == ""
    return chosen, tried


@pytest.mark.parametrize(
    ("figures", "chosen", "told"),
    [
        (dict(seconds=0.012, launching=0.012, graphs=0.0067), "reduce-overhead", "1.79 times as fast"),
        (dict(seconds=0.012, launching=0.012, graphs=0.012), "default", "1.00 times as fast"),
        (dict(seconds=0.100, launching=0.015, graphs=0.050), "default", "launching takes 15% of a step"),
        (dict(seconds=0.012, launching=0.012, graphs=0.006, fails="Error: no"), "default", "fail (Error: no)"),
        (dict(seconds=0.012, launching=0.012, graphs=0.006, fails=torch.OutOfMemoryError("x")), "default", "ran out"),
    ],
    ids=["faster", "no faster", "the GPU is busy", "they fail", "no memory"],
)
def test_cuda_graphs_where_launching_takes_most_of_a_step(figures, chosen, told, monkeypatch, capsys):
    found, tried = modes(monkeypatch, **figures)
    assert found == chosen
    assert ("reduce-overhead" in tried) == (figures["launching"] > figures["seconds"] / 2)
    assert tried[-1] == chosen, "what trains was compiled last"
    said = capsys.readouterr().out
    assert said.startswith(f"compile_mode {chosen}: ")
    assert told in said


def test_auto_is_default_where_no_gpu_is(monkeypatch):
    asked = []
    monkeypatch.setattr("nanofit.compiling.try_compile", lambda *_, mode, **__: (asked.append(mode), ""))
    compile_to_train(None, torch.device("cpu"), None, None, "auto")
    compile_to_train(None, torch.device("cuda"), None, None, "auto", ranks=2)
    compile_to_train(None, torch.device("cpu"), None, None, "max-autotune")
    assert asked == ["default", "default", "max-autotune"]
