"""Logical axis names: every one in use is in the list, and every one in the list is in use."""

import ast

import pytest
from flax import nnx

from hackle.pjit_configs import AXES, rule_table
from hackle.zoo import registry
from tests.house.tree import parse, python_files

# Calls that take axis names: as one tuple, or as plain arguments.
TAKE_TUPLES = {"parameter", "Linear"}
TAKE_NAMES = {"constrain"}


def names_in(tree: ast.AST) -> dict[str, int]:
    """Axis name -> line, of the literal names in one file."""
    found: dict[str, int] = {}

    def literals(node: ast.AST) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                found.setdefault(part.value, part.lineno)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in TAKE_NAMES:
                for argument in node.args[1:]:
                    literals(argument)
            elif name in TAKE_TUPLES:
                for argument in [*node.args, *(k.value for k in node.keywords)]:
                    if isinstance(argument, ast.Tuple):
                        literals(argument)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == "axes":
                    literals(node.value)
    return found


def literal_names() -> dict[str, str]:
    return {
        name: f"{path}:{line}"
        for path in python_files("layers", "zoo")
        for name, line in names_in(parse(path)).items()
    }


def parameters(name: str) -> list[tuple[str, nnx.Variable]]:
    found = registry.entry(name)
    model = nnx.eval_shape(lambda: found.model_class(found.config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return [(".".join(map(str, path)), variable) for path, variable in flat]


def smallest_models() -> list[str]:
    """One name per family and per kind of tree."""
    return [name for name in registry.list_models() if "tiny" in name or name == "qwen2.5-7b"]


def test_literal_names_are_in_the_list():
    wrong = {name: place for name, place in literal_names().items() if name not in AXES}
    assert not wrong


def test_the_search_sees_names():
    source = 'parameter(r, (2,), ("x",), i)\nconstrain(y, "a", None)\naxes = ("b",)\nf("c")'
    assert set(names_in(ast.parse(source))) == {"x", "a", "b"}
    assert {"batch", "embed", "stream"} <= set(literal_names())


@pytest.mark.parametrize("name", smallest_models())
def test_every_parameter_names_its_dimensions(name):
    for path, variable in parameters(name):
        axes = variable.get_metadata("axes", None)
        assert axes is not None, f"{path} has no axes"
        assert len(axes) == len(variable.shape), (path, axes, variable.shape)
        assert set(axes) <= set(AXES), (path, axes)
        assert len(set(axes)) == len(axes), (path, axes)


def test_every_name_in_the_list_is_in_use():
    used = set(literal_names())
    for name in smallest_models():
        for _, variable in parameters(name):
            used.update(variable.get_metadata("axes"))
    assert set(AXES) - used == set()


def test_every_large_parameter_is_split_by_fully_sharded_training():
    rules = rule_table("fsdp")
    for path, variable in parameters("parscale-tiny-p4"):
        split = [axis for axis in variable.get_metadata("axes") if rules[axis] == "fsdp"]
        # Prefixes, scores and the biases that are added to heads are small.
        if "prefix" not in path and "bias" not in path and "output_weight" not in path:
            assert len(split) == 1, path
