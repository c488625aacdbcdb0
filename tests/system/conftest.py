"""One Ray for all tests here that start ranks and engines from this process; commands in processes of their own start theirs."""

from collections.abc import Iterator

import pytest

from tests.helpers.engines import private_ray


@pytest.fixture(scope="package")
def one_ray() -> Iterator[None]:
    """A Ray that `eureka_megatron.run.cluster.start_ray` finds as well."""
    with private_ray(store_mib=1024):
        yield
