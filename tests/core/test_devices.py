"""Devices that torch cannot use."""

import pytest
import torch

from nnunetv2_ext.core.devices import check_device


def test_what_is_there_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device("cpu")
    for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(backend, "is_available", lambda: True)
        check_device(name)
        monkeypatch.setattr(backend, "is_available", lambda: False)
        with pytest.raises(ValueError, match=f"^-device {name}: torch .*sees no .*GPU; use -device cpu"):
            check_device(name)
