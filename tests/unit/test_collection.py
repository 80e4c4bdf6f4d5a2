"""`make test` collects every folder of tests: pytest leaves out some names by default."""

from __future__ import annotations

import pytest

FOLDERS = {"browser", "cli", "dist", "e2e", "gpu", "multinode", "recipes", "slurm", "unit"}


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    left_out = set(pytestconfig.getini("norecursedirs"))
    assert not FOLDERS & left_out, "pytest's default list names `dist`"
    found = {
        path.parent.relative_to(pytestconfig.rootpath / "tests").parts[0]
        for path in (pytestconfig.rootpath / "tests").rglob("test_*.py")
    }
    assert found == FOLDERS
