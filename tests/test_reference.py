"""What `make docs` builds: its first page runs, and its reference has everything public."""

import pkgutil
import re
from types import ModuleType

import pytest
from sources import ROOT

import ssprop_fx


def documented() -> set[int]:
    """Ids of all objects that a page names, and of the exports of modules that it names."""
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("reference-*.md"))]
    assert len(pages) > 1
    found: set[int] = set()
    for name in re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE):
        # Modules of optional extras export nothing that the package exports.
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
    call = "ssprop_compile(network, scheduler, config=SparsityConfig(gate=False))"
    assert call in program
    # This compiles quickly.
    exec(program.replace(call, f'{call[:-1]}, backend="aot_eager")'), {})
    assert "1 of 2 sites sparse" in capsys.readouterr().out
