"""One Ray for all tests here that start ranks and engines from this process; commands in processes of their own start theirs."""

import os
from collections.abc import Iterator

import pytest

from tests.helpers.engines import private_ray


@pytest.fixture(scope="package")
def one_ray() -> Iterator[None]:
    """A Ray that `eureka_megatron.run.cluster.start_ray` finds as well."""
    with private_ray(store_mib=1024):
        yield


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a command called in this process leaves there, wandb its socket's name, a process started later must not inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
