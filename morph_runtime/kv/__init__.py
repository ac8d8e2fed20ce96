"""The paged KV cache: block ids (`BlockPool`), their memory (`KVCache`), and its shape (`KVLayout`)."""

from morph_runtime.kv.cache import KVCache
from morph_runtime.kv.layout import KVLayout
from morph_runtime.kv.pool import BlockPool, CannotShrink, NoFreeBlocks

__all__ = ["BlockPool", "CannotShrink", "KVCache", "KVLayout", "NoFreeBlocks"]
