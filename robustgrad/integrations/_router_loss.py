"""The load-balancing loss of a mixture of experts, which keeps its own gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..capture import Capture


@contextmanager
def keeping_router_loss(model: torch.nn.Module, capture: Capture) -> Iterator[None]:
    """The load-balancing loss of a mixture of experts belongs to no sample, though its shape may look so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "router_aux_loss_coef"):
        yield
        return

    def keep(module: Any, args: Any, output: Any) -> None:
        aux = getattr(output, "aux_loss", None)
        if isinstance(aux, Tensor) and aux.dim() == 0:
            capture.keep(aux)

    handle = model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
