"""Config files and --key=value."""

import subprocess
import sys

import pytest
from conftest import ROOT, environment

from configurator import at_least, configure, one_of
from nanofit.errors import UsageError


def script(**keys):
    return {"__file__": "train.py", "__name__": "__main__", "batch_size": 12, "learning_rate": 6e-4, "compile": True,
            "out_dir": "out", "print": print, **keys}  # fmt: skip


def configured(*argv, **keys):
    names = script(**keys)
    _, given = configure(names, argv)
    return names, given


def test_the_later_wins_whichever_kind_it_is(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 5 * 8\nimport time\nout_dir = 'a' + str(time.time())[:0]\n")
    names, given = configured("--batch_size=1", "a.py")
    assert (names["batch_size"], names["out_dir"]) == (40, "a")
    assert given == {"batch_size", "out_dir"}
    assert configured("a.py", "--batch_size=1")[0]["batch_size"] == 1


def test_a_file_may_run_another(tmp_path):
    (tmp_path / "base.py").write_text("batch_size = 7\n")
    (tmp_path / "a.py").write_text("exec(open('base.py').read())\n")
    assert configured("a.py")[0]["batch_size"] == 7


def test_a_key_that_a_file_sets_to_its_default_counts_as_given(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 12\n")
    assert configured("a.py")[1] == {"batch_size"}


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--batch_size=2e1", "batch_size", 20),
        ("--compile=false", "compile", False),
        ("--compile=1", "compile", True),
        ("--out_dir=5", "out_dir", "5"),
        ("--out_dir='x y'", "out_dir", "x y"),
        ("--out_dir=a=b", "out_dir", "a=b"),
    ],
)
def test_types_bend_where_nothing_is_lost(argument, key, value):
    got = configured(argument)[0][key]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--batchsize=3", "train.py has no key 'batchsize': did you mean 'batch_size'"),
        ("--top_k=3", "train.py has no key 'top_k': it belongs to sample.py"),
        ("--batch_size=1.5", "batch_size must be a whole number .its default is 12., not 1.5"),
        ("--batch_size=True", "batch_size must be a whole number"),
        ("--batch_size=many", "batch_size must be a whole number .*not 'many'"),
        ("--learning_rate=fast", "learning_rate must be a number"),
        ("--compile=2", "compile must be True or False"),
        ("--compile", "'--compile' has no value: write --compile=value"),
        ("batch_size=3", "'batch_size=3' is neither a config file nor an override: write --batch_size=3"),
        ("nowhere.py", "config file 'nowhere.py' does not exist"),
    ],
)
def test_mistakes_are_value_errors_with_a_sentence(argument, sentence):
    with pytest.raises(ValueError, match=sentence):
        configured(argument)


def test_a_missing_file_gets_its_nearest_neighbour():
    with pytest.raises(UsageError, match="did you mean '.*train_gpt2.py'"):
        configured(str(ROOT / "config" / "trian_gpt2.py"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("batch_size = (", "a.py, line 1: .*a config file is Python"),
        ("\nbatch_size = 1 / 0", "a.py, line 2: ZeroDivisionError"),
        ("batch_size = 'x'", "a.py: batch_size must be a whole number"),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, text, sentence):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        configured("a.py")


def test_an_unknown_key_in_a_file_is_warned_about_and_another_scripts_is_not(tmp_path, capsys):
    (tmp_path / "a.py").write_text("bacth_size = 3\ntop_k = 5\n_mine = 1\ndef helper(): pass\nprint = 3\n")
    names, _ = configured("a.py")
    error = capsys.readouterr().err
    assert "a.py: no script knows the key 'bacth_size': did you mean 'batch_size'?" in error
    for word in ("top_k", "_mine", "helper"):
        assert word not in error
    assert names["print"] is print, "a config file may not replace the script's functions"
    assert names["bacth_size"] == 3, "helpers are kept, as in nanoGPT"


def test_nanogpts_way_by_exec(tmp_path):
    (tmp_path / "use.py").write_text(
        "a = 1\nb = 'x'\nkeys = [k for k in ('a', 'b')]\nexec(open(PATH).read())\nprint(a, b)\n".replace(
            "PATH", repr(str(ROOT / "configurator.py"))
        )
    )

    def run(*argv):
        command = [sys.executable, "use.py", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH=""))

    done = run("--a=2", "--b=y")
    assert done.stdout.splitlines()[-1] == "2 y"
    wrong = run("--c=2")
    assert wrong.returncode == 1
    assert "has no key 'c'" in wrong.stderr


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        configured("--help")
    assert stop.value.code == 0
    assert "--batch_size=12" in capsys.readouterr().out


def test_limits():
    at_least(1, {"a": 1}, "a")
    with pytest.raises(UsageError, match="a must be at least 1, not 0"):
        at_least(1, {"a": 0}, "a")
    with pytest.raises(UsageError, match="a must be at least 0, not nan"):
        at_least(0, {"a": float("nan")}, "a")
    with pytest.raises(UsageError, match="dtype must be one of 'x', 'y', not 'z'"):
        one_of(("x", "y"), {"dtype": "z"}, "dtype")
