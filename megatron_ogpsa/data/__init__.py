"""Conversations and preference pairs: sources, tokenizers, loss masks, truncation, packing.

Plain torch, datasets and transformers: nothing here imports Megatron.
"""

from megatron_ogpsa.data.attention import attention_mask_from_documents
from megatron_ogpsa.data.dataset import TokenizedChatDataset, build_chat_dataset
from megatron_ogpsa.data.loading import load_chat_tokenizer
from megatron_ogpsa.data.preference_dataset import TokenizedPreferenceDataset, build_preference_dataset
from megatron_ogpsa.data.preferences import source_kind
from megatron_ogpsa.data.tokenizer import ChatTokenizer

__all__ = [
    "ChatTokenizer",
    "TokenizedChatDataset",
    "TokenizedPreferenceDataset",
    "attention_mask_from_documents",
    "build_chat_dataset",
    "build_preference_dataset",
    "load_chat_tokenizer",
    "source_kind",
]
