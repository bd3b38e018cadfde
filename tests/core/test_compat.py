"""Only nnU-Net releases that can find our trainers are accepted."""

import pytest

from nnunetv2_ext.core import compat


@pytest.mark.parametrize("found", ["2.8", "2.8.0", "2.8.1", "2.8.1.dev3+g0e49", "2.9.0rc1", "2.10.0", "2.99"])
def test_supported_releases_pass(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    compat.require_supported_nnunet()


@pytest.mark.parametrize("found", ["2.7.0", "2.7.99", "1.7.1", "3.0.0", "3.0.0a1", "unknown"])
def test_other_releases_are_one_clear_line(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    with pytest.raises(ValueError) as caught:
        compat.require_supported_nnunet()
    message = str(caught.value)
    assert found in message and 'pip install "nnunetv2>=2.8,<3"' in message and "\n" not in message


def test_a_missing_nnunet_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise compat.PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", missing)
    with pytest.raises(ValueError, match="nnunetv2 is not installed"):
        compat.require_supported_nnunet()
