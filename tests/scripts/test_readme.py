"""What the pages say is true: commands parse, what is named exists, generated tables are those of the data."""

import argparse
import ast
import builtins
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

import dataloader
import engine
import eval_cifar10
import eval_ilsvrc
import models
import train_cifar10
import train_ilsvrc
from engine import cli, lists, originals
from models import registry
from reporting import __main__ as reporting_command
from reporting import pages

ROOT = Path(__file__).parents[2]
WRITTEN = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*WRITTEN, ROOT / "results" / "README.md"]
SCRIPTS = {f"{script.__name__}.py": script for script in (train_cifar10, train_ilsvrc, eval_cifar10, eval_ilsvrc)}
#: packages that are commands
PACKAGES = (["-m", "benchmarks"], ["-m", "reporting"])
#: what a reader brings to a page's Python: images, networks and programs of their own
READERS_OWN = {"images", "batches", "training_batches", "held_out", "data", "model", "queue", "take"}
READERS_OWN |= {"MyNetwork", "MyObjective"}
#: flags of other programs: torchrun, docker
FOREIGN = {"max_restarts", "nproc_per_node", "require_hashes", "shm_size"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page, language):
    """The lines of a page's fenced blocks in a language; a backslash continues a line on the next."""
    inside = None
    for line in page.read_text().replace("\\\n", "").splitlines():
        if line.startswith("```"):
            inside = line[3:].strip() if inside is None else None
        elif inside == language:
            yield line


def inline(page):
    """What stands between single backticks, on one line each."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`(?!`)([^`]+)`", page.read_text())]


def commands(page):
    """The words behind `python3` or `torchrun` of each command in a page's blocks and inline code."""
    for line in [*blocks(page, ""), *blocks(page, "bash"), *inline(page)]:
        if re.match(r"(\w+=\S* )*(python3|torchrun) ", line) and "*.py" not in line:
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield from of_ours(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            yield from of_ours(words)


def of_ours(words):
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["torchrun"]:
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        yield words[start:]
    elif words[:1] == ["python3"] and (words[1].endswith(".py") or words[1:3] in PACKAGES):
        yield words[1:]


class Parsed(Exception):
    """A command line was understood."""


def mistake(words, monkeypatch, capsys):
    """Parse a command as its script does, without running it: "", or what the script says is wrong."""
    script, argv = words[0], [word for word in words[1:] if word != "..."]
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    try:
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(lists, "show", lambda asked, datasets: None)
            if script in SCRIPTS:
                cli.parse(SCRIPTS[script].SCRIPT, argv)
                return ""
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            patch.setattr(cli, "run", lambda main: main())
            patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
            patch.setattr(sys, "argv", words)
            if script == "-m":
                patch.setattr(sys, "argv", words[1:])
                patch.delitem(sys.modules, f"{words[1]}.__main__", raising=False)  # runpy warns about it
                runpy.run_module(words[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed:
        return ""
    except SystemExit as end:
        return capsys.readouterr().err if end.code else ""
    return "it does not parse its arguments"


def test_readme_begins_with_install_and_test_commands():
    _, first, _ = (ROOT / "README.md").read_text().split("```", 2)
    install, test = first.strip().splitlines()  # .ci/run runs the second one
    assert install == "python3 -m pip install -r requirements.txt && bash recipes/demo.sh"
    assert test == "python3 -m pip install -r requirements-dev.txt && python3 -m pytest"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_line_of_a_page_is_longer_than_120(page):
    assert [line for line in page.read_text().splitlines() if len(line) > 120] == []


@every_page
def test_every_command_parses(page, monkeypatch, capsys):
    said = {shlex.join(words): mistake(words, monkeypatch, capsys) for words in commands(page)}
    assert not {command: error for command, error in said.items() if error}


@pytest.mark.parametrize("command", ["train_cifar10.py --lamdaR=10", "-m reporting tabels", "-m reporting keep only"])
def test_a_command_that_does_not_parse_is_found(command, monkeypatch, capsys):
    assert mistake(command.split(), monkeypatch, capsys)


def known_flags(capsys):
    texts = [path.read_text() for folder in ("benchmarks", "tools") for path in (ROOT / folder).glob("*.py")]
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            cli.parse(script.SCRIPT, ["--help"])
        texts.append(capsys.readouterr().out)
    texts += [reporting_command.command_line().format_help(), (ROOT / "reporting" / "__main__.py").read_text()]
    names = set(re.findall(r"--(\w+)", "\n".join(texts)))
    for entry in registry.entries():
        names |= {flag.name for flag in (*entry.model_flags(), *entry.objective_flags())}
    return names | {f"no_{name}" for name in names} | FOREIGN | originals.TRANSLATED


def test_every_flag_that_is_named_exists(capsys):
    known = known_flags(capsys)
    wrong = []
    for page in PAGES:
        flags = [flag for code in inline(page) for flag in re.findall(r"(?<!\S)--([A-Za-z][\w-]*)", code)]
        named = {flag.replace("-", "_") for flag in flags}
        wrong += [f"{page.name}: --{name}" for name in sorted(named - known)]
    assert not wrong, "\n".join(wrong)


@every_page
def test_every_file_that_is_named_exists(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    made = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}  # by runs, such as reports/
    rooms = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in made)
    named = re.findall(rf"`((?:{rooms})/[\w./*-]+)`", text)
    wrong = [link for link in links if link and not (page.parent / link).exists()]
    wrong += [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert not wrong


@every_page
def test_every_piece_of_python_is_python(page):
    ast.parse("\n".join(blocks(page, "python")))


@every_page
def test_every_name_in_a_page_comes_from_somewhere(page):
    given, used = {*dir(builtins), *READERS_OWN}, set()
    for node in ast.walk(ast.parse("\n".join(blocks(page, "python")))):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name):
                given.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=name):
                given.add(name)
            case ast.alias(name=name, asname=other):
                given.add(other or name.partition(".")[0])
    assert not used - given


@pytest.mark.xdist_group("published")  # where its rows have been counted already
def test_a_folder_of_photos_is_learnt_as_the_page_says(tmp_path, monkeypatch, capsys):
    """The part of docs/python.md, with four folders of plain colours."""
    monkeypatch.chdir(tmp_path)
    for split, name, grey in itertools.product(("train", "val"), ("a b", "b", "c", "d"), (40, 200)):
        Path("photos", split, name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (50, 40), grey).save(f"photos/{split}/{name}/{grey}.png")
    page = (ROOT / "docs" / "python.md").read_text()
    (part,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "new_head" in part)
    names = {"dataloader": dataloader, "engine": engine, "models": models}
    exec(part.replace('"photos", 32,', '"photos", 4,'), names)
    assert names["model"].classes == ["a b", "b", "c", "d"]
    assert engine.evaluate(names["model"], names["data"].test)[0].images == 8
    assert "fresh weights for fc.weight, fc.bias" in capsys.readouterr().out


def test_results_are_not_stale():
    assert (ROOT / "results" / "README.md").read_text() == pages.results_page(), "run: python3 -m reporting page"
    assert (ROOT / "README.md").read_text() == pages.front_page(), "run: python3 -m reporting page"
