"""What `make docs` makes: its first page runs, and its reference leaves out nothing public."""

import pkgutil
import re
from types import ModuleType

import pytest
from sources import ROOT

import ssprop_fx


def documented() -> set[int]:
    """Ids of all objects that a page names, or that a module named by one exports."""
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("reference-*.md"))]
    assert len(pages) > 1
    found: set[int] = set()
    for name in re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE):
        # Those of an extra, which not everyone has, export nothing that the package does.
        if name.endswith((".lightning", ".huggingface")):
            continue
        value = pkgutil.resolve_name(name)
        exported = value.__all__ if isinstance(value, ModuleType) else ()
        found |= {id(value), *(id(getattr(value, inner)) for inner in exported)}
    return found


def test_every_public_name_is_in_the_reference() -> None:
    known = documented()
    assert [name for name in ssprop_fx.__all__ if id(getattr(ssprop_fx, name)) not in known] == []


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f" {p.name}\n" not in menu] == []


def test_the_program_of_the_first_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "index.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    call = "ssprop_compile(network, scheduler)"
    assert call in program
    # Quick to compile.
    exec(program.replace(call, f'{call[:-1]}, backend="aot_eager")'), {})
    assert "1 of 2 sites sparse" in capsys.readouterr().out
