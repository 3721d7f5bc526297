"""The public API's docstrings: shapes, dtypes, errors and parameters, as the signatures have them."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import resnet_fused
from resnet_fused import blocks, functional, models, reference

MODULES = (resnet_fused, blocks, functional, models, reference)
# "x: ...", "gamma, beta: ..." at the beginning of a line or sentence
_DOCUMENTED = re.compile(r"(?:^|[.;] )((?:`?[a-z]\w*`?, )*`?[a-z]\w*`?): ", re.MULTILINE)
_AS_ELSEWHERE = re.compile(r"(?:[Aa]rguments|[Kk]eywords|fields)[^.`]*`([\w.]+)`")


def public_names(module: ModuleType) -> list[str]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return list(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def public() -> Iterator[Any]:
    for module in MODULES:
        for name in public_names(module):
            value = getattr(module, name)
            if callable(value) and not isinstance(value, ModuleType):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


def documentation(value: Any) -> str:
    """Its own, not a base class's."""
    return inspect.cleandoc(vars(value).get("__doc__") or "" if isinstance(value, type) else value.__doc__ or "")


def parameters(value: Any) -> dict[str, str]:
    """Annotations by name; of a module those of its constructor and its call."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        calls = [value.__init__, value.forward]
    elif dataclasses.is_dataclass(value):
        return {field.name: str(field.type) for field in dataclasses.fields(value)}
    else:
        calls = [value]
    return {
        p.name: str(p.annotation)
        for call in calls
        for p in inspect.signature(call).parameters.values()
        if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def takes_tensors(value: Any) -> bool:
    return any("Tensor" in annotation for annotation in parameters(value).values())


def of_other(value: Any, text: str) -> set[str]:
    """Parameters that the docstring leaves to another's, which must have them."""
    found: set[str] = set()
    for name in _AS_ELSEWHERE.findall(text):
        other = pydoc.locate(name) or getattr(sys.modules[value.__module__], name, None)
        assert other is not None, f"{name} is not there"
        found |= set(parameters(other))
    return found


def mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){name}(?!\w)", text) is not None


EVERYTHING = list(public())
TENSORS = [each for each in EVERYTHING if takes_tensors(each.values[0])]


def test_the_whole_api_is_walked() -> None:
    names = {str(each.id).removeprefix("resnet_fused.") for each in EVERYTHING}
    assert {"fuse_", "Bottleneck", "functional.ConvBN", "models.resnet50", "reference.PaddedShortcut"} <= names
    assert len(TENSORS) > 30


@pytest.mark.parametrize("value", EVERYTHING)
def test_docstring(value: Any) -> None:
    text = documentation(value)
    assert len(text.splitlines()[0]) > 20
    assert text.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("value", EVERYTHING)
def test_every_parameter_is_described(value: Any) -> None:
    text = documentation(value)
    expected = set(parameters(value)) - of_other(value, text)
    assert not [name for name in expected if not mentions(text, name)]


@pytest.mark.parametrize("value", EVERYTHING)
def test_only_parameters_are_described(value: Any) -> None:
    text = documentation(value)
    named = {name.strip("`") for names in _DOCUMENTED.findall(text) for name in names.split(", ")}
    assert named <= set(parameters(value))


@pytest.mark.parametrize("value", TENSORS)
def test_shape_of_every_tensor(value: Any) -> None:
    """Within the sentence that names it."""
    sentences = re.split(r"[.;](?:\s|$)", documentation(value))
    elsewhere = of_other(value, documentation(value))
    for name, annotation in parameters(value).items():
        if "Tensor" in annotation and name not in elsewhere:
            about = " ".join(sentence for sentence in sentences if mentions(sentence, name))
            assert re.search(r"\[[NKC][,\]]|0-d", about), f"{name}: no shape in {about!r}"


@pytest.mark.parametrize("value", [each for each in TENSORS if ".reference." not in str(each.id)])
def test_dtypes(value: Any) -> None:
    """The reference takes what eager PyTorch takes."""
    assert re.search(r"dtypes?\b|[Dd]types\b|float32", documentation(value))


@pytest.mark.parametrize("value", EVERYTHING)
def test_errors(value: Any) -> None:
    """Whatever its own code raises is named."""
    raised = set(re.findall(r"^\s+raise (\w+)", inspect.getsource(value), re.MULTILINE))
    assert not [name for name in raised if not mentions(documentation(value), name)]


@pytest.mark.parametrize("value", [each for each in EVERYTHING if isinstance(each.values[0], type)])
def test_methods(value: type) -> None:
    """Those that nn.Module has mean the same here."""
    own = {
        name: member
        for name, member in vars(value).items()
        if not name.startswith("_") and not hasattr(nn.Module, name)
    }
    members = {name: getattr(member, "fget", member) for name, member in own.items()}
    assert not [name for name, member in members.items() if inspect.isfunction(member) and not member.__doc__]


def test_rendered(tmp_path: Path) -> None:
    """`make docs`: a page for each module, with everything public on it."""
    pytest.importorskip("pdoc")
    command = re.search(r"-m (pdoc .*)", (Path(__file__).parents[1] / "Makefile").read_text())
    assert command
    arguments = [word.strip("'") for word in command[1].replace("build/docs", str(tmp_path)).split()]
    run = subprocess.run([sys.executable, "-W", "error", "-m", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pages = {str(page.relative_to(tmp_path)): page.read_text() for page in tmp_path.rglob("*.html")}
    assert set(pages) == {"index.html", *(f"{module.__name__.replace('.', '/')}.html" for module in MODULES)}
    for module in MODULES:
        page = pages[f"{module.__name__.replace('.', '/')}.html"]
        submodules = [name for name in public_names(module) if isinstance(getattr(module, name), ModuleType)]
        names = set(public_names(module)) - set(submodules)
        assert not [name for name in names if f'<section id="{name}">' not in page]
