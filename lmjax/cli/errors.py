"""Exit codes: what an error that ends a command tells the user and the launcher."""

import errno
import re
import socket

from lmjax.errors import UserError
from lmjax.runtime.files import Busy

# Of errors of files, what trying again does not mend: the class or the number, and what does.
LASTING = (
    ((FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError), (errno.ENAMETOOLONG, errno.ELOOP),
     "check the path"),
    ((PermissionError,), (errno.EROFS,), "correct its permissions, or write elsewhere"),
    ((), (errno.ENOSPC, errno.EDQUOT), "make room"),
)
NETWORK = (ConnectionError, TimeoutError, socket.gaierror, socket.herror)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error that ended a command, and its one line.

    2: what was asked cannot be. Such errors say what was expected and what was got; a ValueError that does not is a
    fault, 1, as is whatever the next try may not meet.
    """
    message = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and message.startswith("RESOURCE_EXHAUSTED"):
        return 2, (f"expected what was asked to fit in the device's memory, got {message:.300}; lower the batch size, "
                   "raise train.microbatches, set model.remat=full, or split weights over more devices (mesh.fsdp); "
                   "`lmjax plan` tells beforehand")
    told = isinstance(error, UserError) or re.search(r"\bexpected\b.*\bgot\b", message)
    if isinstance(error, OSError) and not told:
        message = of_the_system(error, message)
    if isinstance(error, OSError) or isinstance(error, ValueError) and told:
        return 1 if passing(error) else 2, message
    return 130 if isinstance(error, KeyboardInterrupt) else 1, f"{type(error).__name__}: {message}"[:500]


def passing(error: BaseException) -> bool:
    """Whether trying again may mend it: the network, a disk or mount that does not answer, who else is at work."""
    cause = error.__cause__
    if isinstance(error, ValueError) and isinstance(cause, OSError) and cause.errno:  # a reader that names its file
        error = cause
    return isinstance(error, Busy) or isinstance(error, OSError) and lasting(error) is None


def lasting(error: OSError) -> str | None:
    return next((fix for kinds, numbers, fix in LASTING if isinstance(error, kinds) or error.errno in numbers), None)


def of_the_system(error: OSError, message: str) -> str:
    got = message or type(error).__name__
    if fix := lasting(error):
        return f"expected to read and write files, got {got}; {fix}"
    if isinstance(error, NETWORK) or type(error).__module__.partition(".")[0] in ("requests", "urllib", "urllib3"):
        return f"expected an answer over the network, got {got:.400}; check the network and start again"
    return f"expected to read and write files, got {got}; check the disk or its mount and start again"
