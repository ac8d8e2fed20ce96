"""The page arena: physical memory that moves between weights and KV cache. Does not know what pages hold."""
