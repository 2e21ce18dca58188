"""Where vectors of a shard's length are kept: beside the gradient, or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ogpsa.plugin.streaming import HostRows, host_rows
from megatron_ogpsa.projection.passes import combine
from megatron_ogpsa.projection.segments import Rows, SegmentLayout


class Storage:
    """Rows over the N elements of a shard.

    Args:
        layout: of the shard.
        dtype: of a basis; what is captured is fp32.
        on_host: ``--ogpsa-basis-device cpu``.
    """

    def __init__(self, layout: SegmentLayout, dtype: torch.dtype, *, on_host: bool) -> None:
        self._layout = layout
        self._dtype = dtype
        self._on_host = on_host

    def rows(self, num_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[num_rows, N], not initialised."""
        if self._on_host:
            return host_rows(num_rows, self._layout.num_elements, dtype, self._layout.device)
        return torch.empty(num_rows, self._layout.num_elements, dtype=dtype, device=self._layout.device)

    def within_reach(self, rows_KN: Tensor) -> Rows:
        """``rows_KN`` as passes on the gradient's device take it."""
        return HostRows(rows_KN, self._layout.device) if self._on_host else rows_KN

    def combined(self, rows_KN: Tensor, weights_BKK: Tensor) -> Tensor | HostRows:
        """Q = A·W in a basis's dtype; in A's own memory where it can be.

        Args:
            rows_KN: A, as :meth:`rows` made it.
        """
        num_rows = weights_BKK.shape[-1]
        fits = self._dtype == rows_KN.dtype and num_rows == rows_KN.shape[0]
        out_KN = rows_KN if fits else self.rows(num_rows, self._dtype)
        combine(self._layout, self.within_reach(rows_KN), weights_BKK, out_KN)
        return HostRows(out_KN, self._layout.device) if self._on_host else out_KN
