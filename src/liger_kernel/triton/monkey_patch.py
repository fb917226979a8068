"""A cache of compiled kernels for many processes that share one directory, also on a network file system."""

from __future__ import annotations

import os
import tempfile

from triton.runtime.cache import FileCacheManager


class LigerTritonFileCacheManager(FileCacheManager):
    """Triton's cache of files, without its temporary directories: one process's clean-up takes away another's."""

    def put(self, data, filename, binary=True) -> str:
        """Write `data` whole or not at all under `filename` in the cache's directory; its path."""
        os.makedirs(self.cache_dir, exist_ok=True)
        target = self._make_path(filename)
        handle, beside = tempfile.mkstemp(prefix=f"{filename}.", dir=self.cache_dir)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data if isinstance(data, bytes) else str(data).encode())
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
        return target


def apply_liger_triton_cache_manager() -> None:
    """Make Triton keep kernels by LigerTritonFileCacheManager, in this process and those it starts, from now on."""
    os.environ["TRITON_CACHE_MANAGER"] = f"{__name__}:{LigerTritonFileCacheManager.__name__}"
