"""Deprecations that our own calls cause are errors in these tests, others are shown."""

from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_deprecations_of_our_calls_are_errors(kind: type[Warning]) -> None:
    for module in ("adaskip", "adaskip.session", "adaskip.profiling.clock"):
        with pytest.raises(kind, match="old"):
            warnings.warn_explicit("old", kind, "file.py", 1, module=module)


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_deprecations_of_others_are_shown(kind: type[Warning]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("old", kind, "file.py", 1, module="torch.nn")
    assert [warning.category for warning in seen] == [kind]
