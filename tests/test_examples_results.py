"""The committed results are what the scripts make of the committed records."""

import json
import re
import shlex
import shutil
import sys
from unittest import mock

import own_heads
import pytest
import reproduce
from readme import README

ROOT = README.parent
PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^    python (examples/reproduce\.py .*--out examples/results.*)$", PAGE, re.MULTILINE
)


def test_the_page_names_a_command_for_every_folder_of_results():
    named = {re.search(r"--out (\S+)", command).group(1) for command in COMMANDS}
    there = {
        str(path.parent.relative_to(ROOT))
        for path in (ROOT / "examples" / "results").rglob("cifar100*.json")
    }
    assert there
    assert there == named


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_are_made_of_the_records_beside_them(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    folder = ROOT / words[words.index("--out") + 1]
    copy = shutil.copytree(folder, tmp_path / "copy")
    tables = {path: path.read_bytes() for path in copy.glob("*.*") if path.suffix != ".png"}
    words[words.index("--out") + 1] = str(copy)
    monkeypatch.chdir(ROOT)
    with mock.patch.object(sys, "argv", [*words, "--render-only"]):
        reproduce.main()
    assert {path: path.read_bytes() for path in tables} == tables


def test_the_table_of_own_heads_is_made_of_its_records():
    lines = (ROOT / "examples/results/own_heads_digits_dev.jsonl").read_text("utf-8").splitlines()
    assert own_heads.table([json.loads(line) for line in lines]) in PAGE


@pytest.mark.parametrize("page", [README, ROOT / "examples" / "README.md"])
def test_tables_in_a_page_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    tables = {
        path.read_text(encoding="utf-8").split("\n\n")[1]
        for path in (ROOT / "examples" / "results").rglob("cifar100*.md")
    }
    assert tables
    shown = re.findall(r"(?:^\| .*\|$\n?)+", text, re.MULTILINE)
    with_spread = [table.strip() for table in shown if " ± " in table and "method" in table]
    assert with_spread
    assert set(with_spread) <= tables
