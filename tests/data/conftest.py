"""Result folders as nnU-Net leaves them, for the finder."""

from tests.compare.conftest import world  # noqa: F401 - fixture
