"""What README and docs/ say about the code is so."""
import argparse
import ast
import functools
import importlib
import re

import pytest

from conftest import ROOT

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
SCRIPT = r"\b(train|eval|predict|app|bench|data|report)\.py|-m ((?:paper|readers)\.\w+)"


# ---------------------------------------------------------------------------------------------------------------------
# Links

def links(page):
    """[(the text of a link, the file it leads to, its #heading or "")] of a page, but those into the web."""
    found = re.findall(r"\[([^\]]*)\]\(((?!http)[^)#\s]*)(#[^)]*)?\)", PAGES[page])
    return [(text, (ROOT / page).parent / file if file else ROOT / page, heading) for text, file, heading in found]


def headings(text):
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for text, file, heading in links(page):
        assert file.exists(), f"{page}: {text}: there is no {file}"
        assert not heading or heading in headings(file.read_text()), f"{page}: {file.name} has no heading {heading}"


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page not in reached:
            reached.add(page)
            files = [file.resolve().relative_to(ROOT).as_posix() for _, file, _ in links(page)]
            todo += [file for file in files if file in PAGES]
    assert reached == set(PAGES)


# ---------------------------------------------------------------------------------------------------------------------
# Functions and classes, and the lines that the walk quotes

@functools.cache
def symbols(file):
    """The names that a file defines: functions, classes, constants, and Class.method."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            found.update(name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found.update(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_symbols_are_in_the_files_that_are_named(page):
    named = [(text[1:-1], file) for text, file, _ in links(page) if file.suffix == ".py" and text.startswith("`")]
    for name, file in named:
        if not name.endswith(".py"):
            assert name in symbols(file), f"{page}: {file.name} has no {name}"
    assert len(named) > 20 or page not in ("docs/walk.md", "docs/decisions.md")


def test_lines_that_the_walk_quotes_are_in_the_code():
    """Each block of code is of a file that is linked in the text before it."""
    *stops, _ = PAGES["docs/walk.md"].split("\n```\n")
    assert len(stops) > 8
    for stop in stops:
        text, quoted = stop.split("```python\n")
        files = set(re.findall(r"\]\(\.\./([\w/]+\.py)\)", text))
        lines = {line.strip() for file in files for line in (ROOT / file).read_text().splitlines()}
        for line in quoted.splitlines():
            assert line.strip() in lines, f"docs/walk.md: not a line of {', '.join(sorted(files))}: {line}"


# ---------------------------------------------------------------------------------------------------------------------
# Commands

class Caught(Exception):
    """Carries the parser out of a script's main()."""


@functools.cache
def flags_of(script):
    """{subcommand, or "": the flags that a script takes}; those of "" are what all its subcommands take together."""
    def catch(parser):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        importlib.import_module(script).main()
    actions = caught.value.args[0]._actions
    found = {name: set(parser._option_string_actions) for a in actions if isinstance(a, argparse._SubParsersAction)
             for name, parser in a.choices.items()}
    return found | {"": {flag for a in actions for flag in a.option_strings}.union(*found.values())}


def code_of(text):
    """The indented lines of a page, and its `code`; without comments."""
    text = text.replace("\\\n", " ")
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]
    return [re.split(r"\s#\s", line)[0] for line in re.findall(r"^(?: {4}|\t|srun )(.*)$", text, re.M) + spans]


def commands(text):
    """[(script, subcommand or "", its flags)] of every command in a page."""
    found = []
    for line in code_of(text):
        for match in re.finditer(SCRIPT, line):
            own, _, behind = line[match.end():].partition(" -- ")
            word = re.match(r" (\w+)", own)
            flags = lambda part: re.findall(r"(?<!\S)--[a-z][a-z-]*", part)
            found.append((match[1] or match[2], word[1] if word else "", flags(own)))
            found.append(("train", "", flags(behind)))  # eval.py --tables ... -- flags of train.py
    return [command for command in found if command[2]]


def test_commands_are_found():
    """Of this test."""
    text = ("    python eval.py --tables 3 \\\n        --out x -- --lr 1   # and --no-more\n"
            "`torchrun --nproc_per_node 8 train.py\n--light`, `python -m paper.tables table1 a=b --out c`, `data.py`")
    assert commands(text) == [("eval", "", ["--tables", "--out"]), ("train", "", ["--lr"]), ("train", "", ["--light"]),
                              ("paper.tables", "table1", ["--out"])]


@pytest.mark.parametrize("file", [*PAGES, "Makefile", "docs/train.sbatch"])
def test_every_flag_of_a_command_exists(file):
    for script, word, flags in commands((ROOT / file).read_text()):
        known = flags_of(script)
        for flag in flags:
            assert flag in known.get(word, known[""]), f"{file}: {script} {word} has no {flag}"
    assert commands((ROOT / file).read_text()) or file not in ("README.md", "Makefile", "docs/train.sbatch")


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_stands_alone_exists(page):
    known = set().union(*(flags_of(script)[""] for script in ("train", "eval", "predict", "data", "bench", "report")))
    for span in code_of(PAGES[page]):
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span) if span.startswith("--") else ():
            assert flag in known, f"{page}: no script has {flag}"


# ---------------------------------------------------------------------------------------------------------------------

def test_the_repository_names_no_machine():
    """Paths of a developer's machine do not belong into the repository."""
    for file in [*ROOT.glob("*.py"), *(f for room in ("ops", "readers", "paper") for f in ROOT.glob(f"{room}/*")),
                 *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        if file.is_file():
            assert not re.search(r"/(work|root|home)/", file.read_text()), file
