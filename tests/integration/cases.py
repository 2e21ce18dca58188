"""Jobs of the harness for fine-tuning."""

from __future__ import annotations

import torch

from megatron_ogpsa.data import attention_mask_from_documents
from tests.core.layouts import LAYOUTS
from tests.core.megatron_model import build
from tests.core.oracle import ModelShape, random_weights


def packed_logits(layout: str) -> float:
    """Largest difference between logits of documents in a pack and of the same documents alone."""
    shape = ModelShape(**LAYOUTS[layout].model)
    module = build(LAYOUTS[layout], random_weights(shape, seed=1)).chunks[0].module.eval()
    lengths = (5, 7, 3)
    tokens = torch.randint(0, shape.vocabulary, (1, shape.positions), generator=torch.Generator().manual_seed(0))
    ids = [document for document, length in enumerate(lengths) for _ in range(length)]
    documents = torch.tensor([ids + [-1] * (shape.positions - len(ids))])
    positions = torch.cat([torch.arange(n) for n in (*lengths, shape.positions - len(ids))])[None]
    with torch.no_grad():
        packed = module(tokens, positions, attention_mask_from_documents(documents))
        worst, start = 0.0, 0
        for length in lengths:
            part = slice(start, start + length)
            alone = module(tokens[:, part], torch.arange(length)[None], None)
            worst = max(worst, float((packed[:, part] - alone).abs().max()))
            start += length
    return worst
