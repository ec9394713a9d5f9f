# SPDX-License-Identifier: Apache-2.0
"""What a user sees of the package first: its names, their types, and how soon it answers."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing

import pytest

import dit_sparse
from tests.floors import FLOORS

FOLDERS = [name for names in FLOORS for name in names]


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_dir_shows_the_public_names_and_no_others():
    assert dir(dit_sparse) == sorted(dit_sparse.__all__)
    for name in dit_sparse.__all__:
        assert getattr(dit_sparse, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dit_sparse.nothing


def test_no_public_function_hides_a_module():
    for name in FOLDERS:
        package = importlib.import_module(f"dit_sparse.{name}")
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        assert not modules & set(getattr(package, "__all__", ()))


def functions():
    for name in dit_sparse.__all__:
        found = getattr(dit_sparse, name)
        members = vars(found).items() if inspect.isclass(found) else [("", found)]
        for member, value in members:
            inner = value.fget if isinstance(value, property) else value
            function = getattr(inner, "__func__", inner)
            shown = not member.startswith("_") or member == "__init__"
            if shown and inspect.isfunction(function):
                yield f"{name}.{member}".strip("."), function


def test_type_hints_can_be_read():
    known = dict(functions())
    assert {"enable", "profile", "BlockPlan.load", "Runtime.attend"} <= set(known)
    for name, found in known.items():
        hints = typing.get_type_hints(found)
        named = {
            each
            for each, parameter in inspect.signature(found).parameters.items()
            if each != "self" and parameter.annotation is not inspect.Parameter.empty
        }
        assert named <= set(hints), name
    for name in dit_sparse.__all__:
        if inspect.isclass(found := getattr(dit_sparse, name)):
            typing.get_type_hints(found)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["vbench", "--help"]]
)
def test_help_loads_neither_torch_nor_diffusers(arguments):
    code = (
        "import sys; from dit_sparse.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    python("-c", code, *arguments)


@pytest.mark.parametrize(
    "code",
    [
        "import dit_sparse; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import dit_sparse",
        "import dit_sparse.attach.engine; from diffusers import DiffusionPipeline",
    ],
)
def test_pipelines_have_their_methods_whichever_comes_first(code):
    shown = python(
        "-W",
        "ignore",
        "-c",
        f"{code}; from diffusers import ModularPipeline\n"
        "for P in (DiffusionPipeline, ModularPipeline):\n"
        "    print(P.enable_sparse_attention.__module__, P.disable_sparse_attention.__name__,"
        " type(P.sparse_attention).__name__)",
    )
    assert shown.splitlines() == ["dit_sparse.attach.apply disable property"] * 2


def test_importing_it_loads_nothing_heavy():
    code = "import sys, dit_sparse; print(*{'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    assert not python("-c", code).split()
