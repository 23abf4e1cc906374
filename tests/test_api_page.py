"""docs/api.md is the public interface: every name with its present signature, and an example that runs."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from models import registry

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()
#: everything that these packages list, and further names
PACKAGES = ("models", "engine", "dataloader", "reporting")
FURTHER = {
    "models.profile": ("Latency", "count_macs", "count_params", "latency"),
    "models.query_table": ("Budget", "QueryTable"),
    "models.governor": ("Cost", "Governor"),
    "models.exits": ("early_exits",),
    "models.deploy.pair": ("write_pair",),
}
#: hooks for those who write a family are in CONTRIBUTING.md
HOOKS = (ROOT / "CONTRIBUTING.md").read_text()


def public():
    """Full names of everything public, and what they are."""
    modules = {name: importlib.import_module(name).__all__ for name in PACKAGES} | FURTHER
    full = [(module, name) for module, names in modules.items() for name in names]
    return {f"{module}.{name}": getattr(importlib.import_module(module), name) for module, name in full}


def signature(name, described):
    """How the page writes a function or a class: as it is defined, on one line where that fits."""

    def plain(annotation):
        return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def value(default):
        if isinstance(default, str):
            return f'"{default}"'
        return default.__name__ if callable(default) else repr(default)

    if inspect.isclass(described) and described.__init__ is torch.nn.Module.__init__:
        return f"{name}()"
    whole, parts, keywords = inspect.signature(described), [], False
    for parameter in whole.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parts.append("*")
            keywords = True
        mark = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        text = mark + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {plain(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {value(parameter.default)}"
        parts.append(text)
    returned = whole.return_annotation
    end = "" if inspect.isclass(described) or returned is whole.empty else f" -> {plain(returned)}"
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= 112 else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def section(name):
    """What the page says of a name; empty where it does not have it."""
    found = re.search(rf"^### `{re.escape(name)}`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def test_every_public_name_has_its_present_signature():
    missing = []
    for name, described in public().items():
        wanted = f"```\n{signature(name.rpartition('.')[2], described)}\n```" if callable(described) else ""
        if not section(name) or wanted not in section(name):
            missing.append(f"### `{name}`\n\n{wanted}")
    assert not missing, "docs/api.md lacks, or has otherwise:\n\n" + "\n\n".join(missing)


def test_no_name_on_the_page_is_gone():
    assert set(re.findall(r"^### `([\w.]+)`$", PAGE, re.MULTILINE)) == set(public())


@pytest.mark.parametrize("name", [name for name, described in public().items() if inspect.isclass(described)])
def test_the_methods_of_a_class_are_named(name):
    own = [key for key, value in vars(public()[name]).items() if not key.startswith("_") and not is_field(value)]
    unnamed = [key for key in own if not re.search(rf"`\.?{key}\b|\b{key}\(", section(name))]
    assert [key for key in unnamed if not re.search(rf"`{key}[`(]", HOOKS)] == []


def is_field(value):
    """Whether an attribute of a class is plain data: a default, or a constant."""
    return not callable(value) and not isinstance(value, (property, classmethod, staticmethod))


def test_every_name_has_an_example_and_all_of_them_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", {(entry.name, entry.dataset): entry for entry in registry.entries()})
    assert [name for name in public() if "```python" not in section(name)] == []
    torch.manual_seed(0)
    names: dict = {"__name__": "__main__"}  # a module that exists, for what registers itself
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/api.md", "exec"), names)
