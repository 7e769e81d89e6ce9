"""Every error that roundwise raises on purpose.

    RoundwiseError
    ├── UsageError            bad argument, bad input, nothing has been started          exit code 2
    │   ├── ConfigError       a setting that cannot be, or does not fit the model
    │   ├── CheckpointError   a model folder that is missing, damaged or unsafe to open
    │   ├── CalibrationError  text that is empty, unreadable or too short
    │   ├── StrictError       --strict, and something cannot go as asked
    │   └── OutputError       an output folder that holds something else, or is in use
    └── RunError              the work itself failed                                     exit code 1
        ├── NumericalError    NaN, infinity, or a scale that does not fit its type
        │   └── SingularError a Hessian that is zero or stays indefinite: the layer falls back
        ├── FallbackError     --strict, and a layer did not go as asked
        ├── StorageError      the disk is full or failed
        ├── Interrupted       Ctrl-C or SIGTERM; what is finished is kept
        └── VerificationError the finished files are not what was computed

Each message is one sentence that names the thing and, where there is one, the fix.
"""


class RoundwiseError(Exception):
    """Base of all errors below; its message is meant for the user, without a traceback."""

    exit_code = 1


class UsageError(RoundwiseError):
    """The call cannot work as given; nothing has been started."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting that cannot be, or that does not fit this model."""


class CheckpointError(UsageError):
    """A model folder that is missing, damaged, or unsafe to open."""


class CalibrationError(UsageError):
    """Calibration text that is empty, unreadable or too short."""


class StrictError(UsageError):
    """A strict run in which something cannot go as asked; nothing has been started."""


class OutputError(UsageError):
    """An output folder that holds something else or is in use by another process."""


class RunError(RoundwiseError):
    """The work was started and failed; finished blocks are kept."""


class NumericalError(RunError):
    """NaN, infinity, or a scale that does not fit its type."""


class SingularError(NumericalError):
    """A Hessian that is zero or stays indefinite; a run rounds that layer to nearest and says so."""


class FallbackError(RunError):
    """A strict run in which a layer did not go as asked."""


class StorageError(RunError):
    """A write failed, most often because the disk is full."""


class Interrupted(RunError):
    """The user or the system stopped the run; it can be resumed."""


class VerificationError(RunError):
    """What is on disk is not what was computed."""
