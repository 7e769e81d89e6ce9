"""The exceptions that roundwise raises.

    RoundwiseError
    ├── UsageError            invalid argument or input; nothing has been started        exit code 2
    │   ├── ConfigError       a setting is invalid or does not fit the model
    │   ├── CheckpointError   a model folder is missing, damaged or unsafe to open
    │   ├── CalibrationError  calibration text is empty, unreadable or too short
    │   ├── StrictError       --strict: an option cannot be honoured
    │   └── OutputError       an output folder holds other files or is in use
    └── RunError              the work was started and failed                            exit code 1
        ├── NumericalError    NaN, infinity, or a scale outside the range of its type
        │   └── SingularError a Hessian is zero or stays indefinite: the layer falls back
        ├── FallbackError     --strict: a layer could not be quantized as requested
        ├── StorageError      the disk is full or failed
        ├── Interrupted       Ctrl-C or SIGTERM; finished blocks are kept
        └── VerificationError the finished files differ from what was computed

Each message is one sentence that names the cause and, if there is one, the fix.
"""

#: Longest text of a checkpoint that a message quotes.
MAX_QUOTED = 80
#: Longest line of another library's error in a message.
MAX_LINE = 400


class RoundwiseError(Exception):
    """Base class of all errors below; users see its message without a traceback."""

    exit_code = 1


class UsageError(RoundwiseError):
    """An argument or input is invalid; nothing has been started."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is invalid or does not fit the model."""


class CheckpointError(UsageError):
    """A model folder is missing, damaged or unsafe to open."""


class CalibrationError(UsageError):
    """Calibration text is empty, unreadable or too short."""


class StrictError(UsageError):
    """A strict run cannot honour an option; nothing has been started."""


class OutputError(UsageError):
    """An output folder holds other files or is in use by another process."""


class RunError(RoundwiseError):
    """The work was started and failed; finished blocks are kept."""


class NumericalError(RunError):
    """A value is NaN or infinite, or a scale is outside the range of its type."""


class SingularError(NumericalError):
    """A Hessian is zero or stays indefinite; a run rounds that layer to nearest and reports it."""


class FallbackError(RunError):
    """A strict run could not quantize a layer as requested."""


class StorageError(RunError):
    """A write failed, usually because the disk is full."""


class Interrupted(RunError):
    """The user or the system stopped the run; it can be resumed."""


class VerificationError(RunError):
    """The files on disk differ from what was computed."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, to quote it in a message of one sentence.

    It may hold texts of a checkpoint: a long one is cut.
    """
    line = str(error).strip().split("\n", 1)[0]
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def quoted(text: str) -> str:
    """Returns a text of a checkpoint for a message: in quotes, short, and without control characters."""
    return repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…")
