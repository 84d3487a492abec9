from collections.abc import Iterator

import pytest
import torch

from tests.pool import Pool

torch.set_num_threads(1)  # the tests are small: more threads would only wait for each other


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The worker processes of the parallel tests; see tests/pool.py."""
    workers = Pool()
    yield workers
    workers.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("pool"))  # one process has the workers
