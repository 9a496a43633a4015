"""Exit codes: what an error tells the user and the launcher, which may start the command again."""

import errno
import re
import socket

from lmjax.errors import Fault, UserError
from lmjax.runtime.files import Busy, of_the_system

# Errors of files that trying again will not mend: exception classes, error numbers, the fix.
LASTING = (
    ((FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError),
     (errno.ENAMETOOLONG, errno.ELOOP), "check the path"),
    ((PermissionError,), (errno.EROFS,), "correct its permissions, or write elsewhere"),
    ((), (errno.ENOSPC, errno.EDQUOT), "make room"),
    ((), (errno.EFBIG,), "raise the limit of a file's size (ulimit -f)"),
    ((), (errno.EMFILE,), "raise the limit of open files (ulimit -n)"),
)
NETWORK = (ConnectionError, TimeoutError, socket.gaierror, socket.herror)
# an OSError raised by lmjax, whose message is complete
WORDED = re.compile(r"\bexpected\b.*\bgot\b")
NETWORK_LIBRARIES = ("requests", "urllib", "urllib3")


def explain(error: BaseException) -> tuple[int, str]:
    """Gives the exit code and the one line of an error that ended a command.

    Returns:
      The code (2: cannot run as asked; 1: a fault, or an error that the next try may not meet; 130:
      interrupted) and the line.
    """
    error = of_the_system(error)
    message = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and message.startswith("RESOURCE_EXHAUSTED"):
        return 2, str(UserError(
            "the command to fit in the device's memory", f"{message:.300}",
            "lower the batch size, raise train.microbatches, set model.remat=full, or split "
            "weights over more devices (mesh.fsdp); `lmjax plan` tells before a run starts"))
    if isinstance(error, OSError) and not WORDED.search(message):
        message = _describe(error, message)
    if isinstance(error, (OSError, UserError)):
        return 1 if is_transient(error) else 2, message
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    return code, f"{type(error).__name__}: {message}"[:500]


def is_transient(error: BaseException) -> bool:
    """Whether trying again may succeed.

    True if a network, disk or mount failed, for a `Fault`, or if another process works in the same
    place.
    """
    error = of_the_system(error)
    cause = error.__cause__
    # A reader that names its file raises a UserError from the system's error.
    if isinstance(error, UserError) and isinstance(cause, OSError) and cause.errno:
        error = cause
    if isinstance(error, Busy | Fault):
        return True
    return isinstance(error, OSError) and _lasting_fix(error) is None


def _lasting_fix(error: OSError) -> str | None:
    """The fix of an error that trying again will not mend; None for any other."""
    return next((fix for classes, numbers, fix in LASTING
                 if isinstance(error, classes) or error.errno in numbers), None)


def _describe(error: OSError, message: str) -> str:
    got = message or type(error).__name__
    if fix := _lasting_fix(error):
        return str(UserError("to read and write files", got, fix))
    if isinstance(error, NETWORK) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES:
        return str(UserError("an answer over the network", f"{got:.400}",
                             "check the network and start again"))
    return str(UserError("to read and write files", got,
                         "check the disk or its mount and start again"))
