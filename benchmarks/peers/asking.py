"""Starts the script of a peer in its own environment and asks it; the scripts' side is ``answering``."""

import json
import os
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-peers"
NOT_INSTALLED = "not installed; make bench-peers"


class PeerUnavailable(Exception):
    """A peer that cannot be asked: its environment is missing or its script does not start or has ended."""


class PeerRefused(Exception):
    """A question that the peer's own code ended with an error."""


class Peer:
    """A running script; ``versions`` of what it drives.  Raises PeerUnavailable if there is nothing to ask."""

    def __init__(self, name: str, *, environments: Path = ENVIRONMENTS, scripts: Path = HERE) -> None:
        self._name = name
        python = environments / name / "bin" / "python"
        if not python.exists():
            raise PeerUnavailable(NOT_INSTALLED)
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())  # some write where they are started
            self._said = stack.enter_context(tempfile.TemporaryFile())
            surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            self._process = subprocess.Popen(
                [python, scripts / f"drive_{name}.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                cwd=folder,
                env=surroundings,
                text=True,
            )
            stack.callback(self._stop)
            self.versions: dict[str, str] = self._next("ready")["ready"]
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """The answer; raises PeerRefused with the peer's error, PeerUnavailable if it has ended."""
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerUnavailable(self._last_words()) from None
        reply = self._next("answer", "error")
        if "error" in reply:
            raise PeerRefused(reply["error"])
        return reply["answer"]

    def _next(self, *kinds: str) -> dict[str, Any]:
        """The next line that is an answer: while it is imported a system may print what it likes."""
        for line in self._process.stdout:
            try:
                reply = json.loads(line)
            except ValueError:
                continue
            if isinstance(reply, dict) and reply.keys() & set(kinds):
                return reply
        raise PeerUnavailable(self._last_words())

    def _last_words(self) -> str:
        self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines() or [""]
        return f"{self._name} ended with {self._process.returncode}: {lines[-1][:200]}"

    def _stop(self) -> None:
        with suppress(BrokenPipeError):  # it has ended, and a question was left
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
