"""The import graph: who may import whom, and what an import of ours pulls in."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.house.tree import PACKAGES, ROOT, imports, imports_of, module_name, python_files

STDLIB = sys.stdlib_module_names
CORE = {"jax", "flax", "numpy"}
# Reads and writes bfloat16 files without jax, which depends on it.
CORE_OF_ZOO = {*CORE, "ml_dtypes"}
SCRIPTS = {path.stem for path in python_files("scripts")}
OURS = {"hackle"}
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "array_record": "array-record",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
}
NEVER = {"torch", "transformers", "tensorflow", "keras", "pandas", "scipy", "requests"}
# What `import flax` does not load, so that its absence can be seen in a running interpreter.
VISIBLE_EXTRAS = ("grain", "tensorflow_datasets", "tokenizers", "safetensors", "matplotlib", "tqdm")
VISIBLE_EXTRAS += ("transformers", "torch", "tensorflow")

# Folder -> what of ours the files in it may import (prefixes of module names).
ALLOWED = {
    "layers": ("hackle.layers",),
    "pjit_configs": ("hackle.pjit_configs",),
    "zoo": ("hackle.zoo", "hackle.layers"),
    "scripts": ("hackle",),
    "hackle": ("hackle",),
}
# Parts of the zoo that may read presets besides.
READS_PRESETS = ("zoo/train/",)
THIRD_PARTY = {"layers": CORE, "pjit_configs": {"jax"}}


def top(name: str) -> str:
    return name.split(".")[0]


def problems(path: str, names: set[str]) -> list[str]:
    """What is wrong with a file at `path` (relative, posix) that imports `names`."""
    folder = path.split("/")[0]
    found = []
    allowed = ALLOWED[folder]
    if path.startswith(READS_PRESETS):
        allowed += ("hackle.pjit_configs",)
    if re.fullmatch(r"zoo/\w+/modeling\.py", path):
        allowed = ("hackle.layers", "hackle.zoo.errors")
    if path.startswith("zoo/data/"):
        allowed = ("hackle.zoo.data", "hackle.zoo.errors", "hackle.zoo.local_path")
    for name in sorted(names):
        if name.startswith("."):
            found.append(f"relative import {name}")
        elif top(name) in PACKAGES or top(name) in ("tests", "scripts"):
            found.append(f"{name}: bare or backward import")
        elif top(name) in OURS and name != "hackle.__version__":
            inside = any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)
            if not inside:
                found.append(f"{name}: may import {', '.join(allowed)} only")
        elif top(name) in NEVER:
            found.append(f"{name}: not used by this project")
        elif folder in THIRD_PARTY and top(name) not in {*STDLIB, *THIRD_PARTY[folder], *OURS}:
            found.append(f"{name}: {folder} uses {', '.join(sorted(THIRD_PARTY[folder]))} only")
    return found


def test_dependency_direction():
    wrong = [
        f"{path}: {problem}"
        for path in python_files(*ALLOWED)
        for problem in problems(path.as_posix(), imports(path))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layers/norm.py", "import optax"),
        ("layers/norm.py", "from hackle.zoo import registry"),
        ("layers/norm.py", "from hackle import pjit_configs"),
        ("layers/norm.py", "def f():\n    import grain"),
        ("layers/norm.py", "from . import linear"),
        ("layers/norm.py", "from layers import linear"),
        ("pjit_configs/mesh.py", "import flax"),
        ("pjit_configs/mesh.py", "from hackle.layers import parameter"),
        ("zoo/dense/modeling.py", "from hackle.pjit_configs import preset"),
        ("zoo/dense/modeling.py", "from hackle.zoo.registry import create"),
        ("zoo/weights/load.py", "import hackle.pjit_configs.mesh"),
        ("zoo/data/files.py", "from hackle.layers import linear"),
        ("zoo/train/step.py", "import torch"),
        ("zoo/train/step.py", "from scripts import cli"),
        ("scripts/train.py", "from tests.house import tree"),
    ],
)
def test_each_wrong_import_is_seen(path, source):
    assert problems(path, imports_of(ast.parse(source)))


def test_every_third_party_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["train"], *extras["hf"]]
    names = {re.split(r"[^\w-]", line)[0].lower() for line in lines}
    wrong = []
    for path in python_files(*ALLOWED):
        for name in imports(path):
            package = top(name)
            if package in {*STDLIB, *OURS, *(SCRIPTS if path.parts[0] == "scripts" else ())}:
                continue
            if DISTRIBUTIONS.get(package, package) not in names:
                wrong.append(f"{path}: {package}")
    assert not wrong, "\n".join(wrong)


def closure(start: str) -> set[str]:
    """All that importing module `start` imports, as far as our own files go."""
    files = {module_name(path): path for path in python_files(*PACKAGES)}
    seen, waiting, found = set(), [start], set()
    while waiting:
        name = waiting.pop()
        # Importing a module imports the packages it lies in.
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module in files and module not in seen:
                seen.add(module)
                names = imports(files[module], at_import=True)
                found |= names
                waiting.extend(names)
    return found


@pytest.mark.parametrize("start", ["hackle.layers", "hackle.zoo", "hackle.pjit_configs"])
def test_package_import_needs_the_core_dependencies_only(start):
    reached = {top(name) for name in closure(start)}
    core = CORE_OF_ZOO if start == "hackle.zoo" else CORE
    assert reached - {*STDLIB, *core, *OURS} == set()
    assert "jax" in reached


def test_closure_follows_imports():
    assert "grain" not in {top(name) for name in closure("hackle.zoo")}
    assert "tensorflow_datasets" in {top(name) for name in closure("hackle.zoo.data.prepared")}


def test_a_running_interpreter_loads_no_extra():
    code = (
        "import sys, hackle.layers, hackle.zoo, hackle.pjit_configs\n"
        f"print(*(name for name in {VISIBLE_EXTRAS!r}"
        " if name in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == []
