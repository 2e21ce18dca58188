"""Projection in Megatron-Bridge's training loop; importable where Bridge is."""

from megatron_ogpsa.integration.bridge.callback import OGPSACallback

__all__ = ["OGPSACallback"]
