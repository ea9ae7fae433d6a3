"""The tables: axes, rules, chips, precision and remat."""

import jax
import jax.numpy as jnp
import pytest

from hackle.layers import REMAT_POLICIES
from hackle.pjit_configs import (
    AXES,
    CHIPS,
    MESH_AXES,
    PRECISIONS,
    REMAT,
    RULES,
    ConfigError,
    Precision,
    chip_of,
    rule_table,
)


def test_axes_are_few_and_each_has_one_line():
    assert len(AXES) <= 20
    for meaning in [*AXES.values(), *REMAT.values()]:
        assert meaning and "\n" not in meaning


@pytest.mark.parametrize("name", RULES)
def test_table_rules_every_axis_over_known_mesh_axes(name):
    table = rule_table(name)
    assert set(table) == set(AXES)
    for entry in table.values():
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            assert mesh_axis in MESH_AXES


def test_a_table_is_a_copy():
    rule_table("fsdp")["embed"] = None
    assert rule_table("fsdp")["embed"] == "fsdp"


def test_unknown_table_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown rule table 'fspd'; did you mean fsdp"):
        rule_table("fspd")


def test_sharded_training_never_splits_the_width_of_activations_with_the_batch():
    for name, table in RULES.items():
        if name != "replicated":
            assert table["batch"] == ("data", "fsdp"), name
            assert table["length"] == "seq", name


def test_remat_names_are_those_that_layers_carry_out():
    assert tuple(REMAT) == REMAT_POLICIES


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_precisions_are_dtypes(precision):
    for name in (precision.params, precision.compute):
        assert jnp.dtype(name).name == name


def test_precision_refuses_what_is_no_dtype():
    with pytest.raises(ConfigError, match="precision compute is 'bf16'"):
        Precision("float32", "bf16")


def test_chip_is_found_by_its_exact_name_only():
    assert chip_of("NVIDIA H100 80GB HBM3").peak_flops == 989.4e12
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v5") is CHIPS["v5p"]
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100", "TPU v99", ""):
        assert chip_of(unknown) is None


def test_no_two_chips_share_a_name():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_no_peak_where_there_is_none():
    assert CHIPS["t4"].peak_flops is None
    assert CHIPS["cpu"].peak_flops is None and CHIPS["cpu"].hbm_bytes is None
    assert CHIPS["v5e"].hbm_bytes == 16 * 2**30


def test_the_cpu_of_this_run_is_known():
    assert chip_of(jax.devices("cpu")[0].device_kind) is CHIPS["cpu"]
