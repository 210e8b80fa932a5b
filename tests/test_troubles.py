"""TROUBLES.md, in two languages, is held to what the code says and what doctor.py looks for."""

import ast
import re
import shlex
from dataclasses import dataclass

import pytest
from conftest import ROOT
from test_interface import listed

from nanofit.tools.doctor.checks import CHECKS
from nanofit.tools.doctor.run import STEPS

LANGUAGES = ("TROUBLES.md", "TROUBLES.ja.md")
OURS = ("here", "doctor")  # who says it, where that is us


@dataclass
class Row:
    title: str
    quotes: list  # (who says it, what)
    command: str
    check: str
    text: str


def rows(name):
    """The Rows of a file, in order."""
    found = []
    whole = (ROOT / name).read_text(encoding="utf-8").replace("\n- 本プロジェクト: ", "\n- here: ")
    for section in whole.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        [command] = re.findall(r"^```\n(.+)\n```$", text, re.MULTILINE)
        quotes = [(who, said) for who, _, said in re.findall(r"^- ([\w, ]+): (`+)(.+)\2$", text, re.MULTILINE)]
        check = re.search(r"^doctor.py: `(.+)`$", text, re.MULTILINE)
        found.append(Row(title, quotes, command, check[1] if check else "", text))
    return found


FIELD = "\0"  # what is filled in


def text_of(node):
    """The text of a string in the code, FIELD in the place of each value; of a choice, all there is to choose from."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else FIELD
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value)
    return text_of(node.body) + text_of(node.orelse) if isinstance(node, ast.IfExp) else FIELD


SAID = {
    text_of(node)
    for path in [*ROOT.glob("*.py"), *(ROOT / "nanofit").rglob("*.py")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, (ast.Constant, ast.JoinedStr))
}


def is_said(quote):
    """Whether the code has a text in which the words of a quotation stand, in turn and with a value at each …."""
    pattern = re.compile(rf"[^{FIELD}]*{FIELD}+".join(map(re.escape, quote.strip("…").split("…"))))
    return any(pattern.search(text) for text in SAID)


@pytest.mark.parametrize("name", LANGUAGES)
def test_what_is_quoted_of_us_is_said_by_us(name):
    ours = [said for row in rows(name) for who, said in row.quotes if who in OURS]
    assert len(ours) > 30
    assert [said for said in ours if not is_said(said)] == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_check_of_the_doctor_has_its_row(name):
    assert {row.check for row in rows(name)} - {""} == {"run", *CHECKS, *STEPS} - {"system"}


def test_both_languages_have_the_same_rows():
    english, japanese = map(rows, LANGUAGES)
    for ours, theirs in zip(english, japanese, strict=True):
        assert (ours.quotes, ours.command, ours.check) == (theirs.quotes, theirs.command, theirs.check)
        assert re.search("[ぁ-ん]", theirs.text)
        assert not re.search("[ぁ-ん]", ours.text)


def test_commands_name_what_is_there():
    keys = set(listed("train.py")[0])
    for row in rows(LANGUAGES[0]):
        program, *arguments = shlex.split(row.command)
        if program in ("python", "torchrun"):
            assert all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".py")), row.command
        if "train.py" in arguments:
            ours = arguments[arguments.index("train.py") :]
            named = {argument[2:].split("=")[0] for argument in ours if argument.startswith("--")}
            assert named <= keys | {"help"}, row.command
