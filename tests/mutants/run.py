"""Delete each security check of the protocol core in turn, and see a test go red.

    make mutants        or, for some of them:  .venv/bin/python tests/mutants/run.py participant codec

A check is an `if` that only raises, or a call that does nothing but check; both are found in the syntax tree, so a new
check is covered without being listed.  A mutant that no test notices is printed, and the exit status is 1.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "secureagg"
TESTS = ["tests/attacks", "tests/secureagg"]
CHECKS = {
    *("verify", "check_signature", "check_share", "check_share_commitments", "check_thresholds", "check"),
    *("_need", "begin", "answer", "agree"),
}


@dataclass(frozen=True)
class Mutant:
    """One check deleted: the lines of a file, from ``first`` to ``last``, are replaced by ``text``."""

    file: Path
    first: int
    last: int
    text: str
    shown: str

    def apply(self, root: Path) -> None:
        """Write the file without the check into the tree at ``root``."""
        lines = (ROOT / self.file).read_text().splitlines()
        lines[self.first - 1 : self.last] = self.text.splitlines()
        (root / self.file).write_text("\n".join(lines) + "\n")


def mutants(file: Path) -> Iterator[Mutant]:
    """Every check of one file."""
    source = (ROOT / file).read_text()
    for node in ast.walk(ast.parse(source)):
        shown = ast.get_source_segment(source, node) or ""
        indent = " " * getattr(node, "col_offset", 0)
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise):
            named = [name.target for name in ast.walk(node.test) if isinstance(name, ast.NamedExpr)]
            text = "".join(f"{indent}{name.id} = None\n" for name in named) + f"{indent}pass"
            yield Mutant(file, node.lineno, node.end_lineno or node.lineno, text, shown.split(":\n")[0])
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in CHECKS:
                yield Mutant(file, node.lineno, node.end_lineno or node.lineno, f"{indent}pass", shown.split("\n")[0])


def survives(mutant: Mutant) -> bool:
    """Whether all tests pass without this check, in a copy of the tree of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in (PACKAGE, "tests", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
            else:
                shutil.copy(source, root / name)
        mutant.apply(root)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.file}:{mutant.first}: the tests did not run\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0


def main(wanted: list[str]) -> int:
    """Run the mutants of the wanted files, all without any; returns the exit status."""
    files = sorted(path.relative_to(ROOT) for path in (ROOT / PACKAGE).glob("*.py"))
    found = [mutant for file in files if not wanted or file.stem in wanted for mutant in mutants(file)]
    alive: list[Mutant] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (mutant, lives) in enumerate(zip(found, pool.map(survives, found), strict=True), start=1):
            told = "SURVIVED" if lives else "noticed"
            sys.stdout.write(f"{number}/{len(found)} {told} {mutant.file}:{mutant.first} {mutant.shown}\n")
            sys.stdout.flush()
            alive += [mutant] * lives
    sys.stdout.write(f"{len(found)} checks, {len(alive)} of them deleted without a test noticing\n")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
