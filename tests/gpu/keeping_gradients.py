"""``megatron-ogpsa`` on one rank that also keeps the first refresh's reference gradients: ``gradients.pt`` in its folder."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from megatron_ogpsa.cli import launching, main

if "RANK" in os.environ:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.plugin import ogpsa

    attach = ogpsa.attach

    def attach_keeping(optimizer: Any, model: Any, *args: Any, **kwargs: Any) -> ogpsa.OGPSA:
        plugin = attach(optimizer, model, *args, **kwargs)
        chunks = model if isinstance(model, list) else [model]
        kept: dict[str, dict[str, torch.Tensor]] = {}
        capture, finish = plugin.capture, plugin.finish_refresh

        def keeping(name: str, *, loss_scale: float | None = None) -> None:
            if name not in kept:
                parameters = [item for chunk in chunks for item in chunk.named_parameters()]
                kept[name] = {
                    key.replace("module.", ""): parameter.main_grad.float()
                    .cpu()
                    .clone()  # wrappers differ with precision
                    for key, parameter in parameters
                }
            capture(name)

        def finishing() -> bool:
            torch.save(kept, "gradients.pt")
            return finish()

        plugin.capture, plugin.finish_refresh = keeping, finishing  # type: ignore[method-assign]
        return plugin

    ogpsa.attach = attach_keeping

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.gpu.keeping_gradients"
    sys.exit(main.main())
