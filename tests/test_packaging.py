"""What a source distribution and a wheel hold, and what they say of themselves."""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from resnet_fused import __version__

ROOT = Path(__file__).parents[1]
NAME = f"resnet_fused-{__version__}"
NOT_IN_SDIST = {".gitignore"}


def build(kind: str, tree: Path, out: Path, **environment: str) -> Path:
    """What setuptools builds of `tree`, as pip and build ask it to; `kind`: "sdist" or "wheel"."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", code, out], cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (result,) = out.iterdir()
    return result


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The repository's files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sdist(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy without leftovers: setuptools would take what an earlier list of its own names."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    return build("sdist", folder / "tree", folder / "dist", RESNET_FUSED_NO_EXTENSION="1")


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # of Python >= 3.10.12 and 3.11.4
        archive.extractall(folder)
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Of the source distribution, without the extension."""
    out = tmp_path_factory.mktemp("wheel") / "dist"
    return zipfile.ZipFile(build("wheel", unpacked, out, RESNET_FUSED_NO_EXTENSION="1"))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    return email.parser.Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())


def test_sdist_holds_the_repository(sdist: Path, tracked: set[str]) -> None:
    assert sdist.name == f"{NAME}.tar.gz"
    with tarfile.open(sdist) as archive:
        held = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("resnet_fused.egg-info/")}
    assert held - made == tracked - NOT_IN_SDIST


def test_wheel_of_the_sdist_holds_the_package_alone(wheel: zipfile.ZipFile, tracked: set[str]) -> None:
    held = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    assert held == {name for name in tracked if name.startswith("resnet_fused/")}
    assert {"resnet_fused/py.typed", "resnet_fused/_C.pyi"} <= held


def test_metadata(metadata: email.message.Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("resnet_fused", __version__)
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"]
    assert metadata["Summary"]
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [need for need in metadata.get_all("Requires-Dist") or () if "extra ==" not in need]
    assert sorted(needed) == ["filelock", "torch>=2.10"]
    assert metadata.get_all("Project-URL") is None, "no address is known to be real"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


def test_licence_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert wheel.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (?:\d{4}-\d\d-\d\d|Unreleased)", heading) for heading in headings]
    assert all(found), headings
    versions = [match[1] for match in found if match]
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda v: [int(part) for part in v.split(".")], reverse=True)


@pytest.mark.slow
def test_wheel_of_the_sdist_with_its_extension(unpacked: Path, tmp_path: Path) -> None:
    """CPU-only; its tag, and a block trained with nothing but what is in it."""
    path = build("wheel", unpacked, tmp_path / "dist", RESNET_FUSED_CPU_ONLY="1")
    assert re.fullmatch(rf"{NAME}-cp310-abi3-linux_\w+\.whl", path.name)
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    code = """if True:
        import torch, resnet_fused
        from resnet_fused import plans
        print(resnet_fused.__file__, resnet_fused._C.__file__)
        assert not plans.has_cuda()
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        resnet_fused.BasicBlock(8, 8)(x).sum().backward()
        assert x.grad.abs().sum() > 0
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    files = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True).split()
    assert [Path(file).parent for file in files] == [tmp_path / "site/resnet_fused"] * 2
