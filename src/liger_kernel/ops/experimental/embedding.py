"""Upstream's path of LigerEmbeddingFunction."""

from liger_kernel.ops.embedding import LigerEmbeddingFunction  # noqa: F401
