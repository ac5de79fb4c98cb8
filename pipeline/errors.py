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


class LeaseError(HedgehogError):
    """Another process works in the same stage's folder, or has taken it over from this one."""


class Interrupted(HedgehogError):
    """A signal asked the run to stop, and it did. The message says what is saved; the same command goes on there."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: nothing is wrong, try again. Ctrl-C alone has a shell's 130."""

    def __init__(self, saved: str, *, signals: tuple[str, ...] = (), requeue: bool = False) -> None:
        super().__init__(saved)
        self.signals = signals
        """Names of what was received ("SIGUSR2"), on any rank."""
        self.requeue = requeue
        """Whether the signal among them is the one that asks for the Slurm job to be queued again."""
        self.goes_on_by_itself = False
        """Slurm starts the job again: nobody has to repeat the command."""
        if signals == ("SIGINT",):
            self.exit_code = 130
