"""What a model remembers while it generates."""

from hackle.layers.cache.key_value import KeyValueCache, key_value_cache

__all__ = ["KeyValueCache", "key_value_cache"]
