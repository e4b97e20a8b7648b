"""A process that has loaded what takes long, and forks programs: one JSON line of a request, one of its answer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self


class ForkServer:
    """Runs ``module`` of the tests, which answers requests until there are no more; ``environment``: variables beside
    this process's own."""

    def __init__(self, module: str, **environment: str) -> None:
        root = Path(__file__).parents[2]
        path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def ask(self, *request: object) -> Any:
        """The answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())
