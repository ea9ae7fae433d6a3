"""A wheel, an editable install and a bare clone hold the same modules, once each."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools

from tests.house.tree import PACKAGES, ROOT, module_name, project_files, python_files

EXTRAS = {"cpu", "tpu", "cuda12", "cuda13", "train", "hf", "dev"}

# Runs without the site folders, so that no other install of hackle is seen.
PROBE = """
import site, sys
kind, place, *libraries = sys.argv[1:]
if kind == "editable":
    site.addsitedir(place)
else:
    sys.path.insert(0, place)
sys.path += libraries
import importlib
import hackle, hackle.layers, hackle.zoo, hackle.pjit_configs
from hackle import layers
from hackle.layers import norm
from hackle.layers.norm import RMSNorm
assert layers is hackle.layers is importlib.import_module("hackle.layers")
assert sys.modules["hackle.layers.norm"] is norm and norm.RMSNorm is RMSNorm is layers.RMSNorm
from hackle.zoo.dense.modeling import DenseLM
assert hackle.zoo.registry.entry("dense-tiny").model_class is DenseLM
assert hackle.pjit_configs.preset("cpu1").name == "cpu1"
assert not {"layers", "zoo", "pjit_configs"} & set(sys.modules)
for name in ("layers", "zoo", "pjit_configs"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise AssertionError(f"bare import of {name} works")
print(hackle.__file__, hackle.__version__)
"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def probe(kind: str, place: Path, cwd: Path) -> tuple[Path, str]:
    paths = sysconfig.get_paths()
    libraries = [str(cwd)] if kind == "clone" else []
    libraries += [paths["purelib"], paths["platlib"]]
    ran = subprocess.run(
        [sys.executable, "-S", "-c", PROBE, kind, str(place), *libraries],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    file, version = ran.stdout.split()[-2:]
    return Path(file), version


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the project as git would check it out."""
    folder = tmp_path_factory.mktemp("clone")
    for path in project_files():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_symlink() or path.parts[0] not in ("tests", "reports"):
            shutil.copy2(ROOT / path, target, follow_symlinks=False)
    for package in PACKAGES:  # links to folders are not files
        if not (folder / "hackle" / package).is_symlink():
            (folder / "hackle" / package).symlink_to(f"../{package}")
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(clone))
    (found,) = folder.glob("*.whl")
    return found


def test_every_folder_with_python_files_is_a_package():
    folders = {path.parent for path in python_files(*PACKAGES)}
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), folder
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(setuptools.find_packages(str(ROOT), include=config["packages"]["find"]["include"]))
    assert listed == {"hackle", *(".".join(("hackle", *folder.parts)) for folder in folders)}


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {f"hackle/{path.as_posix()}" for path in python_files(*PACKAGES)}
    modules |= {path.as_posix() for path in python_files("hackle")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "hackle/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hackle"}
    cards = {path for path in project_files() if path.parts[0] == "zoo" and path.suffix == ".md"}
    assert {f"hackle/{path.as_posix()}" for path in cards} <= names


def test_wheel_gives_one_module_object(wheel, tmp_path):
    place = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(place), str(wheel))
    file, version = probe("wheel", place, tmp_path)
    assert file == place / "hackle" / "__init__.py"
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_editable_install_gives_one_module_object(clone, tmp_path):
    place = tmp_path / "site"
    arguments = ("install", "--no-deps", "--no-build-isolation", "--target", str(place))
    pip(*arguments, "--editable", str(clone))
    file, _ = probe("editable", place, tmp_path)
    assert file.resolve() == clone / "hackle" / "__init__.py"
    # A module made after the install is found without another one.
    late = clone / "layers" / "made_later.py"
    late.write_text('"""Made later."""\n')
    try:
        code = (
            "import site, sys; site.addsitedir(sys.argv[1]); sys.path += sys.argv[2:]\n"
            "import hackle.layers.made_later"
        )
        library = sysconfig.get_paths()["purelib"]
        command = [sys.executable, "-S", "-c", code, str(place), library]
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True)
    finally:
        late.unlink()


def test_clone_gives_one_module_object(clone):
    file, _ = probe("clone", clone, clone)
    assert file.resolve() == clone / "hackle" / "__init__.py"


def test_extras_and_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == EXTRAS
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "Apache-2.0"
    needed = {line.split(">")[0] for line in project["dependencies"]}
    assert needed == {"jax", "flax", "ml_dtypes", "numpy"}


def test_every_module_has_one_name():
    names = [module_name(path) for path in python_files(*PACKAGES)]
    assert len(names) == len(set(names))
