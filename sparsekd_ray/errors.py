"""Errors that a user may meet. Each message says what was found, what is allowed, and what to do."""


class SparseKDError(Exception):
    """Base of every error that this package raises on purpose. It is picklable: Ray carries it between processes."""


class ConfigError(SparseKDError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class CorpusError(SparseKDError):
    """A text source is empty, unreadable, or smaller than its share of the corpus."""


class ModelError(SparseKDError):
    """A model is not supported, or does not match its record, its tokenizer or its teacher."""


class ClusterError(SparseKDError):
    """Ray cannot be reached or started, or lacks resources that the run asks for."""


class StoreError(SparseKDError):
    """The store cannot be reached, written or read, or another process holds the run."""


class IntegrityError(SparseKDError):
    """A stored file, shard or checkpoint differs from its record."""
