"""Photographs with their pool of scans."""

from tests.data.test_pool import colours  # noqa: F401 - fixture
