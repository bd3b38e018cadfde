"""Forward hooks that hold under torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import nn


def register_forward_hook(module: nn.Module, hook: Callable[..., Any]) -> torch.utils.hooks.RemovableHandle:
    """``module.register_forward_hook(hook)``, obeyed also where this process has compiled a network of the same class.

    torch.compile keeps its code by function and does not look for hooks that came later
    (``torch._dynamo.config.skip_nnmodule_hook_guards``): a network with hooks would run the code of one without,
    silently. So compiled code is forgotten here; a network that was compiled before is compiled once more when called.
    """
    torch._dynamo.reset()
    return module.register_forward_hook(hook)
