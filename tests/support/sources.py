"""What the tests read from the sources of both packages."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"ssprop_fx": ROOT / "ssprop_fx", "ssprop_passes": ROOT / "passes" / "ssprop_passes"}


def files(package: str) -> list[Path]:
    found = sorted(FOLDERS[package].rglob("*.py"))
    assert found
    return found


def imported_names(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import, line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used_names(path: Path) -> set[str]:
    """Dotted names that a file uses as attributes, such as `torch._inductor.config`."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
