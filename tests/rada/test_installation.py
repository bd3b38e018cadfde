"""What ``nnUNetv2_ext doctor`` says of CLIP's weights."""

import huggingface_hub
import pytest

from nnunetv2_ext.core.outside import OK, WARN
from nnunetv2_ext.rada.installation import findings


@pytest.mark.parametrize("there", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", None])
def test_weights_are_looked_for_in_the_cache_only(monkeypatch: pytest.MonkeyPatch, there: str | None) -> None:
    asked = []

    def cached(repository: str, name: str) -> str | None:
        asked.append(repository)
        return f"/cache/{name}" if name == there else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    [finding] = findings()
    assert set(asked) == {"timm/vit_base_patch16_clip_224.openai"}
    assert finding.status == (OK if there else WARN)
    assert ("create_model('ViT-B-16-quickgelu', pretrained='openai')" in finding.remedy) == (there is None)
