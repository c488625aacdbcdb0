"""The memory of a worker's KV cache on a CPU, which vLLM's sleep mode leaves out: freed and taken back under the tensors, which stay.

Both run in vLLM's worker, which hands over a wrapper of itself.
"""

from typing import Any


def drop_kv_cache(worker: Any) -> None:
    """Free the cache's memory."""
    worker = getattr(worker, "worker", worker)
    storages = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
    worker.dropped_bytes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)


def restore_kv_cache(worker: Any) -> None:
    """Take it back, empty; nothing to do for a worker that has not dropped it."""
    worker = getattr(worker, "worker", worker)
    for cache, nbytes in zip(worker.model_runner.kv_caches, vars(worker).pop("dropped_bytes", []), strict=False):
        cache.untyped_storage().resize_(nbytes)
        cache.zero_()  # kernels read whole blocks, and what lies there may be no number
