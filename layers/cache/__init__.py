"""What a model remembers while it generates."""

from hackle.layers.cache.key_value import KeyValueCache, key_value_cache
from hackle.layers.cache.recurrent import RecurrentCache

__all__ = ["KeyValueCache", "RecurrentCache", "key_value_cache"]
