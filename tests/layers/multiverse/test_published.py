"""The published builder (github.com/Infini-AI-Lab/Multiverse) as an oracle, read by path.

`HACKLE_MULTIVERSE=<folder>` names a checkout, whose `train/utils.py` is run as it is.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from hackle.layers.multiverse import branch_structure
from tests.layers.multiverse.documents import ID, ids, random_documents
from tests.layers.multiverse.test_state import spell
from tests.layers.multiverse.test_structure import dense

FOLDER = os.environ.get("HACKLE_MULTIVERSE")

pytestmark = pytest.mark.skipif(FOLDER is None, reason="HACKLE_MULTIVERSE names no checkout")


class Tokenizer:
    def convert_tokens_to_ids(self, text):
        return ID[text]


@pytest.fixture(scope="module")
def published():
    """The module; of trl it needs two classes to inherit from."""
    stub = types.ModuleType("trl")
    stub.DataCollatorForCompletionOnlyLM = stub.SFTTrainer = object
    path = Path(str(FOLDER)) / "train" / "utils.py"
    spec = importlib.util.spec_from_file_location("multiverse_train", path)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("trl")
    sys.modules["trl"] = stub
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["trl"]
        if before is not None:
            sys.modules["trl"] = before
    return module


def built(module, tokens):
    tokens = [int(token) for token in tokens]
    mask = module.generate_multiverse_attention_mask(tokens, Tokenizer())
    positions = module.generate_multiverse_position_ids(tokens, Tokenizer())
    return (mask == 0).numpy(), positions.tolist()


@pytest.mark.parametrize("newlines", [0, 1])
@pytest.mark.parametrize("think", [False, True])
def test_masks_and_positions_are_equal(published, newlines, think):
    nested = 0
    how = dict(layout="published", newlines=newlines, think=think, most=150)
    for tokens in random_documents(500, seed=10 + newlines, **how):
        mask, positions = built(published, ids(tokens))
        found = branch_structure(ids(tokens), layout="published", depth=4)
        np.testing.assert_array_equal(dense(found), mask)
        assert found.position.tolist() == positions
        nested += found.block[1].any()
    assert nested > 50


def test_the_strict_layout_is_the_published_one_without_separators(published):
    for tokens in random_documents(200, seed=12, newlines=0, most=150):
        mask, positions = built(published, ids(tokens))
        found = branch_structure(ids(tokens), depth=4)
        np.testing.assert_array_equal(dense(found), mask)
        assert found.position.tolist() == positions


@pytest.mark.parametrize(
    "text, theirs, ours",
    [
        ("PGO.og-A.a-Cc", False, False),  # open at the end
        ("PGO.og-A.", False, False),
        (".a", False, False),  # closed, never opened
        (".p", False, False),
        (".A.a", False, False),  # a path outside of a block
        ("PGO.og-A.a-Ccp", True, True),  # one path
        ("PGgA.a-A.a-Ccp", True, True),  # no outlines
        ("PG" + "O.o" * 25 + "g" + "A.a" * 25 + "Ccp", True, True),
        # Theirs masks what has no goal and leaves its positions sequential, and takes blocks
        # without paths or conclusion for text: ours refuses them.
        ("PA.a-A.a-Ccp", True, False),
        ("PGO.ogCcp", True, False),
        ("PGgA.a-A.a-p", True, False),
        ("PGO.og-A.a-A.a-Ccp", True, False),  # it never counts outlines
    ],
)
def test_what_is_refused(published, text, theirs, ours):
    tokens = spell(text)

    def takes(call):
        try:
            call()
        except ValueError:  # BranchError is one
            return False
        return True

    assert takes(lambda: built(published, tokens)) == theirs
    assert takes(lambda: branch_structure(tokens, layout="published")) == ours
