"""Chat data for supervised fine-tuning: sources, tokenizers, loss masks, truncation, packing.

Plain torch, datasets and transformers: nothing here knows of Megatron.
"""

from megatron_ogpsa.data.attention import attention_mask_from_documents
from megatron_ogpsa.data.dataset import TokenizedChatDataset, build_chat_dataset
from megatron_ogpsa.data.loading import load_chat_tokenizer
from megatron_ogpsa.data.tokenizer import ChatTokenizer

__all__ = [
    "ChatTokenizer",
    "TokenizedChatDataset",
    "attention_mask_from_documents",
    "build_chat_dataset",
    "load_chat_tokenizer",
]
