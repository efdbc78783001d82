"""Structure of the code: what may import what, and that documentation exists and runs."""

import doctest
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from sources import FOLDERS, ROOT, files, imported_names, used_names

import ssprop_fx

# Torch's private names, and the files that may use them: a new torch release may break these.
# `torch_api/` states what they rely on.
PRIVATE = ("_dispatch", "_dynamo", "_functorch", "_guards", "_inductor", "_subclasses")
USES_PRIVATE_TORCH = {
    "passes/ssprop_passes/cache_files.py",
    "passes/ssprop_passes/graph/graph_pass.py",
    "passes/ssprop_passes/graph/modes.py",
    "passes/ssprop_passes/graph/rewrite.py",
    "passes/ssprop_passes/kernels/cpp_loader.py",
    "passes/ssprop_passes/transforms/sample_inputs.py",
    "ssprop_fx/analysis/fake_capture.py",
    "ssprop_fx/compiler/dynamo_graph.py",
    "ssprop_fx/compiler/inductor.py",
    "ssprop_fx/named_backend/plugin.py",
}

# Modules that need an optional extra, and the package of the extra that they import.
NEEDS_EXTRA = {
    "ssprop_fx.integrations.huggingface": "transformers",
    "ssprop_fx.integrations.lightning": "lightning",
}


def is_private_torch(name: str) -> bool:
    first, second, *_ = [*name.split("."), "", ""]
    is_dispatch = name.startswith("torch.utils._python_dispatch")
    return first == "torch" and (second in PRIVATE or is_dispatch)


def module_paths() -> list[Path]:
    """Files of both packages, except `__main__`, which would run if imported."""
    return [path for package in FOLDERS for path in files(package) if path.stem != "__main__"]


def module_names() -> list[str]:
    def name(package: str, folder: Path, path: Path) -> str:
        parts = package, *path.relative_to(folder).with_suffix("").parts
        return ".".join(parts).removesuffix(".__init__")

    return [
        name(package, folder, path)
        for path in module_paths()
        for package, folder in FOLDERS.items()
        if path.is_relative_to(folder)
    ]


def test_the_checks_see_what_they_look_for(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import torch._guards\n"
        "from torch import _dynamo\n"
        "def f():\n"
        "    from ssprop_fx.compiler.slots import find_slots\n"
        "    torch._inductor.config.debug = True\n"
    )
    assert imported_names(path) == {
        "torch._guards",
        "torch._dynamo",
        "ssprop_fx.compiler.slots.find_slots",
    }
    assert "torch._inductor" in used_names(path)
    names = imported_names(path) | used_names(path)
    private = {name for name in names if is_private_torch(name)}
    assert {"torch._guards", "torch._dynamo", "torch._inductor"} <= private
    assert not is_private_torch("torch.fx._utils")
    assert not is_private_torch("torch._check")


def test_rooms_import_only_what_stands_below_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(cache_dir=None) == 0, "lint-imports says which import runs up"


def test_no_files_import_each_other_in_a_circle():
    """Imports for type checking count as well."""
    modules = dict(zip(module_names(), module_paths(), strict=True))
    imports = {
        name: {
            other
            for imported in imported_names(path)
            for other in (imported, imported.rpartition(".")[0])
            if other in modules and other != name
        }
        for name, path in modules.items()
    }
    assert sum(map(len, imports.values())) > 300
    order = tuple(TopologicalSorter(imports).static_order())
    assert order.index("ssprop_passes.errors") < order.index("ssprop_fx.compiler.backend")


def test_private_torch_stays_in_few_files():
    found = {
        path.relative_to(ROOT).as_posix()
        for package in FOLDERS
        for path in files(package)
        if any(is_private_torch(name) for name in imported_names(path) | used_names(path))
    }
    assert found == USES_PRIVATE_TORCH


@pytest.mark.parametrize("name", ssprop_fx.__all__)
def test_public_names_have_a_docstring(name):
    docstring = getattr(ssprop_fx, name).__doc__
    assert docstring
    # A dataclass without a docstring gets its signature as one.
    assert not docstring.startswith(f"{name}(")


@pytest.mark.parametrize("name", module_names())
def test_examples_in_docstrings_run(name):
    if name in NEEDS_EXTRA:
        pytest.importorskip(NEEDS_EXTRA[name], reason=f"the extra for {name}")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
