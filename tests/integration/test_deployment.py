"""The units and the container file in deploy/ are such as systemd and the command line take them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from sites import cli

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy").glob("*.service"))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_start_what_there_is(path: Path) -> None:
    """Each unit starts a command of ours with options that it has, stays down after its end, and leaves no core."""
    text = path.read_text()
    found = re.search(r"^ExecStart=\S+/secureagg (\S+) (.*)$", text, re.MULTILINE)
    assert found is not None
    command = typer.main.get_command(cli.app).commands[found[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    given = {word for word in found[2].split() if word.startswith("--")}
    assert given <= known
    needed = {parameter.opts[0] for parameter in command.params if parameter.required and parameter.opts[0][0] == "-"}
    assert needed <= given
    for line in ("Restart=on-failure", "LimitCORE=0", "NoNewPrivileges=yes", "ProtectSystem=strict", "UMask=0077"):
        assert f"\n{line}\n" in text


ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYZE is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_understands_the_units(path: Path, tmp_path: Path) -> None:
    """systemd finds nothing to complain about."""
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace("/opt/secureagg/bin/secureagg", "/bin/true"))
    checked = subprocess.run([ANALYZE, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_image_has_all_packages() -> None:
    """What the wheel is made of is copied into the image, and the program does not run as root."""
    text = (ROOT / "deploy" / "Containerfile").read_text()
    for package in ("secureagg", "dp", "transport", "sites"):
        assert f"\nCOPY {package} /src/{package}\n" in text
    assert text.index("\nUSER secureagg\n") < text.index("\nENTRYPOINT ")
