"""What a release contains: wheel, source archive and metadata, built as `pip` builds them."""

import re
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from sources import FOLDERS, ROOT

import ssprop_fx


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    (path,) = WheelBuilder(str(ROOT)).build(
        directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]
    )
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_string(wheel.read(name).decode())


def test_the_version_is_the_packages(metadata: Message) -> None:
    assert metadata["Version"] == ssprop_fx.__version__
    assert version("ssprop-fx") == ssprop_fx.__version__, "install again: the version has changed"


def test_the_wheel_holds_every_file_of_both_packages_and_no_other(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cpp") or path.name == "py.typed"
    }
    assert {"ssprop_fx/py.typed", "ssprop_passes/py.typed"} <= expected
    assert any(name.endswith(".cpp") for name in expected)
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_library_needs_torch_alone(metadata: Message) -> None:
    needed = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert [re.match(r"[\w-]+", text).group() for text in needed] == ["torch"]


def test_the_source_archive_holds_the_tests_but_no_results(tmp_path: Path) -> None:
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CITATION.cff", "pyproject.toml"} <= names
    assert "tests/test_packaging.py" in names
    assert "passes/ssprop_passes/kernels/conv_grad_weight.cpp" in names
    assert "benchmarks/study/page.md" in names
    assert (ROOT / "benchmarks" / "results").is_dir()
    assert [name for name in names if "/results/" in name] == []
