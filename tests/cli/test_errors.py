"""What launchers go by: 2 for what trying again does not mend, 1 for what it may."""

import errno
import re
import socket
import urllib.error

import pytest

from lmjax.cli import main as cli
from lmjax.runtime.files import Busy

FILES, NETWORK = "expected to read and write files, got ", "expected an answer over the network, got "
LASTING = {  # -> the beginning and the end of the line
    FileNotFoundError(errno.ENOENT, "nothing there", "a"): (FILES, "; check the path"),
    IsADirectoryError(errno.EISDIR, "a directory", "a"): (FILES, "; check the path"),
    NotADirectoryError(errno.ENOTDIR, "no directory", "a"): (FILES, "; check the path"),
    PermissionError(errno.EACCES, "denied", "a"): (FILES, "; correct its permissions, or write elsewhere"),
    OSError(errno.EROFS, "read-only"): (FILES, "; correct its permissions, or write elsewhere"),
    OSError(errno.ENOSPC, "no space left"): (FILES, "; make room"),
    OSError(errno.EDQUOT, "quota exceeded"): (FILES, "; make room"),
    OSError(errno.ENOSPC, "expected room, got none; make some"): ("[Errno 28] expected room", "; make some"),
}
PASSING = {
    ConnectionResetError(errno.ECONNRESET, "reset by peer"): (NETWORK, "; check the network and start again"),
    TimeoutError("timed out"): (NETWORK, "; check the network and start again"),
    socket.gaierror(-2, "Name or service not known"): (NETWORK, "; check the network and start again"),
    urllib.error.URLError("no route to host"): (NETWORK, "; check the network and start again"),
    OSError(errno.ESTALE, "Stale file handle"): (FILES, "; check the disk or its mount and start again"),
    OSError(errno.EIO, "Input/output error"): (FILES, "; check the disk or its mount and start again"),
    OSError("a cable is loose"): (FILES, "; check the disk or its mount and start again"),
    OSError(errno.EIO, "expected a disk, got none; put one in"): ("[Errno 5] expected a disk", "; put one in"),
    Busy("nobody", "another process", "wait", where="a"): ("a: expected nobody", "; wait"),
}


@pytest.mark.parametrize("code, error", [(code, error) for code, errors in ((2, LASTING), (1, PASSING))
                                         for error in errors], ids=repr)
@pytest.mark.parametrize("cause", (False, True), ids=("itself", "as a cause"))
def test_one_line_and_a_code(code, error, cause, monkeypatch, capsys):
    begin, end = {**LASTING, **PASSING}[error]
    if cause and not getattr(error, "errno", None):
        pytest.skip("a reader that raises a ValueError without an error of the system is believed")

    def fail(*args):
        if not cause:
            raise error
        try:
            raise error
        except OSError as of_the_system:
            raise ValueError("source a: expected readable files, got bad ones; mend them") from of_the_system

    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=fail))
    assert cli.main(["train", "--config", "configs/synthetic.py:tiny", "--workdir", "x"]) == code
    line, = capsys.readouterr().err.splitlines()
    if cause:
        begin, end = "source a: ", "; mend them"
    assert re.fullmatch(f"lmjax: error: {re.escape(begin)}.*{re.escape(end)}", line), line
