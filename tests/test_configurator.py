"""Config files and --key=value."""

import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from configurator import configure
from nanofit.errors import UsageError


def script(**keys):
    return {"__file__": "train.py", "__name__": "__main__", "batch_size": 12, "learning_rate": 6e-4, "compile": True,
            "out_dir": "out", "print": print, **keys}  # fmt: skip


def configured(*argv, more=None, **keys):
    names = script(**keys)
    _, given = configure(names, argv, more)
    return names, given


def test_the_later_wins_whichever_kind_it_is(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 5 * 8\nout_dir = 'a' + str(time.time())[:0]\ncompile = True")
    names, given = configured("--batch_size=1", "a.py")
    assert (names["batch_size"], names["out_dir"]) == (40, "a")
    assert given == {"batch_size", "out_dir", "compile"}, "which was True before, too"
    assert configured("a.py", "--batch_size=1")[0]["batch_size"] == 1


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
        ("--top_k=3", "train.py has no key 'top_k': --help lists the keys"),
        ("--batch_size=1.5", "batch_size must be a whole number .its default is 12., not 1.5"),
        ("--batch_size=True", "batch_size must be a whole number"),
        ("--batch_size=many", "batch_size must be a whole number .*not 'many'"),
        ("--learning_rate=fast", "learning_rate must be a number"),
        ("--compile=2", "compile must be True or False"),
        ("--batch_size=" + "9" * 5000, "batch_size must be a whole number"),
        ("--batch_size=" + "(" * 300, "batch_size must be a whole number"),
        ("--compile", "'--compile' is neither a config file nor --key=value: write --compile=True"),
        ("--out-dir", "write --out_dir=value"),
        ("-compile", "'-compile' is neither .* write --compile=True"),
        ("batch_size=3", "'batch_size=3' is neither a config file nor --key=value: write --batch_size=3"),
        (".", "'.' is a folder, not a config file: to name a run's folder, write --out_dir=."),
        ("nowhere.py", "config file 'nowhere.py' does not exist"),
    ],
)
def test_mistakes_are_value_errors_with_a_sentence(argument, sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        configured(argument)
    assert len(str(told.value)) < 400


def test_numbers_of_numpy_and_torch_are_kept_as_pythons(tmp_path):
    (tmp_path / "a.py").write_text(
        "import numpy as np, torch, pathlib\nbatch_size = np.int64(6)\nlearning_rate = np.float64(0.5)\n"
        "compile = np.bool_(False)\nn_kv_head = torch.tensor(2)\nout_dir = pathlib.Path('a') / 'b'\n"
    )
    names, _ = configured("a.py", more={"n_kv_head": (int, None)})
    expected = dict(batch_size=6, learning_rate=0.5, compile=False, n_kv_head=2, out_dir="a/b")
    assert {key: names[key] for key in expected} == expected
    assert [type(names[key]) for key in expected] == [int, float, bool, int, str]
    (tmp_path / "b.py").write_text("import numpy as np\nbatch_size = np.float32(1.5)\n")
    with pytest.raises(UsageError, match="batch_size must be a whole number"):
        configured("b.py")


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    (tmp_path / "a.py").write_text("out_dir = '~/a'\n")
    assert configured("a.py")[0]["out_dir"] == "/home/ada/a"
    assert configured("--out_dir=~/b")[0]["out_dir"] == "/home/ada/b"
    assert configured("--out_dir=b~/c")[0]["out_dir"] == "b~/c"
    assert configured("--start=~/b", start="x")[0]["start"] == "~/b", "a prompt is no path"


@pytest.mark.parametrize("name", ["train.py", "sample.py", "bench.py", "export.py"])
def test_the_configs_that_scripts_share_warn_in_none(name, capsys):
    source = (ROOT / name).read_text().split("configure(globals()")[0]
    keys = re.findall(r"^([a-z]\w*) = ", source, re.MULTILINE)
    for path in (ROOT / "config").glob("*.py"):
        values = runpy.run_path(str(path))
        configure({"__file__": name, **{key: values.get(key, 0) for key in keys}}, [str(path)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("batch_size = (", "a.py, line 1: .*a config file is Python"),
        ("\nbatch_size = 1 / 0", "a.py, line 2: ZeroDivisionError"),
        ("batch_size = 'x'", "a.py: batch_size must be a whole number"),
        ("batch_size = 10 ** 5000", "a.py: batch_size takes whole numbers of at most 64 bits"),
        ("raise SystemExit", "a.py, line 1: SystemExit"),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, text, sentence):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        configured("a.py")


def test_a_misspelt_key_in_a_file_is_warned_about_and_another_scripts_is_not(tmp_path, capsys):
    (tmp_path / "a.py").write_text("bacth_size = 3\ntop_k = 5\nbatch = 2\n_mine = 1\ndef helper(): pass\nprint = 3\n")
    names, _ = configured("a.py")
    error = capsys.readouterr().err
    assert "a.py: train.py has no key 'bacth_size': did you mean 'batch_size'?" in error
    for word in ("top_k", "'batch'", "_mine", "helper"):
        assert word not in error
    assert names["print"] is print, "a config file may not replace the script's functions"
    assert names["bacth_size"] == 3, "helpers are kept, as in nanoGPT"


THEIRS = """
a = 1
b = 'x'
compile = True  # a key of nanoGPT's scripts, and a function of Python's
keys = [k for k in ('a', 'b')]
exec(open('configurator.py').read())
print(a, b, {k: globals()[k] for k in keys})
"""


@pytest.mark.parametrize("folder", ["checkout", "elsewhere"])
def test_nanogpts_way_by_exec(workplace, folder):
    """The current folder is the checkout, and the script that was written for nanoGPT in it or anywhere."""
    (workplace / "elsewhere").mkdir()
    checkout = workplace / "checkout"
    checkout.mkdir()
    for name in ("configurator.py", "nanofit", "train.py", "sample.py", "bench.py"):
        (checkout / name).symlink_to(ROOT / name)
    (workplace / folder / "use.py").write_text(THEIRS)
    (checkout / "a.py").write_text("a = 3\n")

    def run(*argv):
        command = [sys.executable, str(workplace / folder / "use.py"), *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment(PYTHONPATH=""))

    done = run("a.py", "--b=y")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 y {'a': 3, 'b': 'y'}"
    wrong = run("--c=2")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: use.py has no key 'c': --help lists the keys\n"


MORE = {"n_kv_head": (int, None), "rotary": (bool, False), "exits": (list, None)}  # fields that a fork's GPTConfig has


def test_a_field_of_the_models_own_is_a_key_that_may_have_no_value(tmp_path):
    assert configured(more=MORE)[0]["n_kv_head"] is None
    assert configured("--n_kv_head=4", "--n_kv_head=None", more=MORE)[0]["n_kv_head"] is None
    (tmp_path / "a.py").write_text("n_kv_head = None\nrotary = True\n")
    for argv, value in ((["--n_kv_head=2", "--rotary=1"], 2), (["a.py"], None)):
        names, given = configured(*argv, more=MORE)
        assert (names["n_kv_head"], names["rotary"], given) == (value, True, {"n_kv_head", "rotary"})
    assert configure(script(), ["--n_kv_head=3"], MORE)[0]["n_kv_head"] == 3, "it is among the keys that come back"
    assert [configured(f"--exits={text}", more=MORE)[0]["exits"] for text in ("[2, 4]", "2,4")] == [[2, 4]] * 2
    with pytest.raises(UsageError, match="exits must be a list"):
        configured("--exits=2", more=MORE)
