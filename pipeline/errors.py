"""The errors a user can cause. The CLI shows them as one message without a traceback and exits with code 2."""

from __future__ import annotations


class HedgehogError(Exception):
    """A user's mistake or a fault of the user's machine: the message says what is wrong, where, and what cures it."""

    exit_code = 2


class ConfigError(HedgehogError):
    """The configuration is wrong. The message names every offending key, with suggestions."""


class DataError(HedgehogError):
    """A dataset file or row cannot be used. The message names the file and the line or row."""


class ModelError(HedgehogError):
    """A base model, tokenizer or quantization cannot be used. The message names the file or the setting."""


class CheckpointError(HedgehogError):
    """A checkpoint or artifact is missing, torn, or belongs to another config, input or world size."""


class ResourceError(HedgehogError):
    """The machine refused: disk full, no write permission, out of memory."""


class NonFiniteLossError(HedgehogError):
    """Training met a NaN or infinite loss. The last good checkpoint was kept; the message names the place and step."""
