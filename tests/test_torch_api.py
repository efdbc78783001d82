"""Torch's private names: all that the packages use are listed, and work as we rely on."""

import ast
import re
from pathlib import Path

import pytest
import torch
from sources import FOLDERS, ROOT, files, imported_names, used_names
from torch_api import CANARIES, Canary, explanation

LISTED = {name for canary in CANARIES for name in canary.names}

# Names with an underscore that are neither ours nor torch's.
OTHERS = {"_compile_kwargs", "_getframe", "_operator", "_joules", "_transpose"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-z]\w*", name) is not None


def own_names(tree: ast.AST) -> set[str]:
    """Names of functions, classes, arguments, variables and attributes that a file defines."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{node.attr}":
            names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return names


def private_names(path: Path, own: set[str]) -> set[str]:
    """The private names of torch that a file uses, as `torch_api` writes them."""
    tree = ast.parse(path.read_text())
    dotted = {
        name
        for name in imported_names(path) | used_names(path)
        if re.fullmatch(r"torch(\.\w+)+", name)
        and any(is_private(part) or part == "experimental" for part in name.split("."))
    }
    found = {n for n in dotted if not any(other.startswith(f"{n}.") for other in dotted)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("torch."):
            found |= {f".{node.attr}"} if is_private(node.attr) else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {f".{node.value}"} if is_private(node.value) else set()
            found |= {node.value} if re.fullmatch(r"torch\._\w[\w.]*", node.value) else set()
        if isinstance(node, ast.Subscript | ast.Call) and (key := meta_key_maybe(node)):
            found.add(f"meta.{key}")
    return found - {f".{name}" for name in own | OTHERS}


def meta_key_maybe(node: ast.Subscript | ast.Call) -> str | None:
    """The key in `x.meta[key]` or `x.meta.get(key)`, if it is a literal."""
    if isinstance(node, ast.Subscript):
        owner, key = node.value, node.slice
    elif isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        owner, key = node.func.value, node.args[0]
    else:
        return None
    is_meta = isinstance(owner, ast.Attribute) and owner.attr == "meta"
    return key.value if is_meta and isinstance(key, ast.Constant) else None


def all_private_names() -> set[str]:
    paths = [path for package in FOLDERS for path in files(package)]
    own = set().union(*(own_names(ast.parse(path.read_text())) for path in paths))
    return set().union(*(private_names(path, own) for path in paths))


def users(name: str) -> list[str]:
    """Files whose text contains a listed name."""
    word = re.compile(rf"\b{name.split('.')[-1]}\b")
    paths = [path for package in FOLDERS for path in files(package)]
    return [path.relative_to(ROOT).as_posix() for path in paths if word.search(path.read_text())]


def test_every_private_name_is_listed() -> None:
    missing = sorted(all_private_names() - LISTED)
    assert not missing, f"give these a canary in tests/support/torch_api/: {missing}"


def test_every_listed_name_is_used() -> None:
    # Search the text: some names have no underscore, such as attributes of fake modes.
    assert [name for name in LISTED if not users(name)] == []


def test_private_names_are_found_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import torch\n"
        "from torch._guards import detect_fake_mode\n"
        "from torch.fx.experimental import proxy_tensor\n"
        "def f(self, node, gm):\n"
        "    torch._inductor.config.debug = True\n"
        "    self._mine = gm._theirs\n"
        "    getattr(gm, '_named')\n"
        "    return node.meta['key'], node.meta.get('other'), 'torch._dynamo.eval_frame'\n"
    )
    assert private_names(path, own_names(ast.parse(path.read_text()))) == {
        "torch._guards.detect_fake_mode",
        "torch.fx.experimental.proxy_tensor",
        "torch._inductor.config.debug",
        "torch._dynamo.eval_frame",
        "._theirs",
        "._named",
        "meta.key",
        "meta.other",
    }


def run(canary: Canary) -> None:
    try:
        canary.check()
    except Exception as error:
        found = sorted({path for name in canary.names for path in users(name)})
        raise AssertionError(explanation(canary, found)) from error


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.check.__name__)
def test_torch_does_what_is_relied_on(canary: Canary) -> None:
    run(canary)


def test_a_canary_that_fails_explains_itself() -> None:
    def check() -> None:
        raise ImportError("no _thing in torch")

    canary = Canary(("torch._ops.OpOverload",), "It does this.", check)
    message = (
        rf"torch {re.escape(torch.__version__)} has changed torch._ops.OpOverload\."
        r".* passes/ssprop_passes/graph/rewrite.py rely on this: It does this\."
    )
    with pytest.raises(AssertionError, match=message):
        run(canary)
