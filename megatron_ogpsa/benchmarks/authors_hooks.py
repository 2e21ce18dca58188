"""The projection as the authors' released code applies it, for comparisons of cost (arXiv:2602.07892, its trainer).

Every rank keeps k whole copies of the model's tensors in host memory. A hook on each parameter brings that tensor's copies
to the gradient's device on every micro-batch, orthonormalises two of them anew, and projects the local gradient before it
is accumulated. Sums are in the gradient's dtype, and a test of a norm makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_EPSILON = 1e-8
_SMALLEST_NORM = 1e-6


class AuthorsHooks:
    """Hooks on the gradients of ``parameters``, with one or two reference gradients of each.

    Args:
        references: for each parameter its reference gradients, in its shape; kept in host memory.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], references: Iterable[Sequence[Tensor]]) -> None:
        self.bytes_held = 0
        self._handles: list[RemovableHandle] = []
        self._hooks: list[tuple[torch.nn.Parameter, Callable[[Tensor], Tensor]]] = []
        for parameter, own in zip(parameters, references, strict=True):
            copies = [reference.to("cpu") for reference in own]
            self.bytes_held += sum(copy.nbytes for copy in copies)
            self._hooks.append((parameter, _projecting(copies)))

    def attach(self) -> None:
        """Project the gradient of every micro-batch from now on."""
        self._handles = [parameter.register_hook(hook) for parameter, hook in self._hooks]

    def detach(self) -> None:
        """Let gradients through as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _projecting(copies: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    def project(gradient: Tensor) -> Tensor:
        first, *others = (copy.to(gradient.device) for copy in copies)
        unit = first / (first.norm() + _EPSILON)
        projected = gradient - (gradient * unit).sum() * unit
        for other in others:
            rest = other - (other * unit).sum() * unit
            norm = rest.norm() + _EPSILON
            if norm >= _SMALLEST_NORM:
                second = rest / norm
                projected = projected - (gradient * second).sum() * second
        return projected

    return project
