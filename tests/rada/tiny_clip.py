"""A CLIP model of a few thousand weights besides its vocabulary, its files, and Alpha-CLIP weights made from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class TinyClip:
    """Random weights on purpose; they are read by the code that reads real ones.

    Attributes:
        folder: of all files.
        name: registered with open_clip in this process.
        plain: the same with the plain GELU.
        weights, alpha_weights: files.
        state: what is in `weights`.
    """

    folder: Path
    name: str
    plain: str
    weights: Path
    alpha_weights: Path
    state: dict[str, Tensor]

    @property
    def local_dir(self) -> str:
        """open_clip's name of the folder with configuration and weights: known to other processes too."""
        return f"local-dir:{self.folder / 'model'}"


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> TinyClip:
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    (folder / "model").mkdir()
    (folder / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    name, plain = "rada-tiny-quickgelu", "rada-tiny"
    for registered, quick in ((name, True), (plain, False)):
        (folder / f"{registered}.json").write_text(json.dumps({**CONFIG, "quick_gelu": quick}))
        open_clip.add_model_config(folder / f"{registered}.json")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip warns on the root logger that this model is random
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False)
    root.setLevel(level)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights, alpha_weights = folder / "model" / "open_clip_model.safetensors", folder / "alpha.pth"
    save_file(state, weights)
    visual = {key.removeprefix("visual."): t for key, t in state.items() if key.startswith("visual.")}
    torch.save(as_alpha_clip(visual), alpha_weights)
    return TinyClip(folder, name, plain, weights, alpha_weights, state)


def as_alpha_clip(visual: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's visual weights under Alpha-CLIP's names, with a random kernel for the mask."""
    colour = visual["conv1.weight"]
    generator = torch.Generator().manual_seed(1)
    alpha = torch.randn(colour.shape[0], 1, *colour.shape[2:], generator=generator) * 0.1
    renamed = {f"module.{name.replace('in_proj_', 'in_proj.')}": tensor for name, tensor in visual.items()}
    return {**renamed, "module.conv1_alpha.weight": alpha}


@pytest.fixture
def said() -> tuple[list[str], Callable[[str], None]]:
    """Lines that were logged, and the function that logs them."""
    lines: list[str] = []
    return lines, lines.append
