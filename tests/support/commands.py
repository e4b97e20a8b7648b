"""The command line, run in the tests' own process."""

import sys

import pytest

from sites import cli


def run_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `secureagg` with these arguments; never a traceback."""
    monkeypatch.setattr(sys, "argv", ["secureagg", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return int(ended.value.code or 0), captured.out, captured.err
