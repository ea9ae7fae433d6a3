"""Tests mirror the tree; `tests/house` holds those about the project itself."""
