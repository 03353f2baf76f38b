"""What the tests of trainings share."""

from __future__ import annotations

import pytest

from tests.training.small import Whole, training


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Do not write into its folder."""
    folder = tmp_path_factory.mktemp("whole")
    run = training()
    start = run.state
    return Whole(folder, start, run.run(folder))
