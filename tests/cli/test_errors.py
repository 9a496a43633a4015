"""The exit code tells a launcher whether to start again: 2 if that is useless, 1 if it may help."""

import errno
import re
import socket
import urllib.error

import pytest

from lmjax.cli import main as cli
from lmjax.errors import UserError
from lmjax.runtime.files import Busy

FILES = "expected to read and write files, got "
NETWORK = "expected an answer over the network, got "
PATH, ROOM = "; check the path", "; make room"
NO_RIGHTS = "; correct its permissions, or write elsewhere"
DISK = "; check the disk or its mount and start again"
CONNECTION = "; check the network and start again"
LASTING = {  # error -> how its line begins and ends
    FileNotFoundError(errno.ENOENT, "nothing there", "a"): (FILES, PATH),
    IsADirectoryError(errno.EISDIR, "a directory", "a"): (FILES, PATH),
    NotADirectoryError(errno.ENOTDIR, "no directory", "a"): (FILES, PATH),
    PermissionError(errno.EACCES, "denied", "a"): (FILES, NO_RIGHTS),
    OSError(errno.EROFS, "read-only"): (FILES, NO_RIGHTS),
    OSError(errno.ENOSPC, "no space left"): (FILES, ROOM),
    OSError(errno.EDQUOT, "quota exceeded"): (FILES, ROOM),
    OSError(errno.ENOSPC, "expected room, got none; make some"): (
        "[Errno 28] expected room", "; make some"),
    UserError("a text", "none", "give one", where="a"): ("a: expected a text", "; give one"),
}
PASSING = {
    ConnectionResetError(errno.ECONNRESET, "reset by peer"): (NETWORK, CONNECTION),
    TimeoutError("timed out"): (NETWORK, CONNECTION),
    socket.gaierror(-2, "Name or service not known"): (NETWORK, CONNECTION),
    urllib.error.URLError("no route to host"): (NETWORK, CONNECTION),
    OSError(errno.ESTALE, "Stale file handle"): (FILES, DISK),
    OSError(errno.EIO, "Input/output error"): (FILES, DISK),
    OSError("a cable is loose"): (FILES, DISK),
    OSError(errno.EIO, "expected a disk, got none; put one in"): (
        "[Errno 5] expected a disk", "; put one in"),
    Busy("nobody", "another process", "wait", where="a"): ("a: expected nobody", "; wait"),
}


@pytest.mark.parametrize("code, error", [
    (code, error) for code, errors in ((2, LASTING), (1, PASSING)) for error in errors], ids=repr)
@pytest.mark.parametrize("as_cause", (False, True), ids=("itself", "as a cause"))
def test_one_line_and_a_code(code, error, as_cause, monkeypatch, capsys):
    begin, end = {**LASTING, **PASSING}[error]
    if as_cause and not getattr(error, "errno", None):
        pytest.skip("only the cause's error number says whether trying again may help")

    def fail(*args):
        if not as_cause:
            raise error
        try:
            raise error
        except OSError as cause:
            raise UserError("readable files", "bad ones", "mend them", where="source a") from cause

    fails = cli.COMMANDS["train"]._replace(run=fail)
    monkeypatch.setitem(cli.COMMANDS, "train", fails)
    assert cli.main(["train", "--config", "configs/synthetic.py:tiny", "--workdir", "x"]) == code
    line, = capsys.readouterr().err.splitlines()
    if as_cause:
        begin, end = "source a: ", "; mend them"
    assert re.fullmatch(f"lmjax: error: {re.escape(begin)}.*{re.escape(end)}", line), line


def test_any_other_error_shows_its_traceback(monkeypatch):
    def fail(*args):
        raise ValueError("expected a, got b")

    monkeypatch.setitem(cli.COMMANDS, "report", cli.COMMANDS["report"]._replace(run=fail))
    with pytest.raises(ValueError, match="expected a, got b"):
        cli.main(["report", "--workdir", "x"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help_page(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0 and f"usage: lmjax {name}" in capsys.readouterr().out


def test_without_a_command_the_usage_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2 and "usage: lmjax" in capsys.readouterr().err
