"""Delete each check of the protocol core, of the transport and of the privacy budget in turn, and see a test go red.

    make mutants        or, for some of them:  .venv/bin/python tests/mutants/run.py participant codec

A check is an `if` that raises or notes a problem, or a call that does nothing but check; they are found in the syntax
tree, so a new check is covered without being listed.  A mutant that no test notices is printed, with exit status 1.
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
PACKAGES = ("secureagg", "dp", "transport")
CORE_TESTS = ["tests/attacks", "tests/secureagg"]
# A file of dp/ -> the files of tests/dp that are to notice; those of its own name, if it is not here.
TESTS = {
    "chain": "ledger",
    "rows": "ledger",
    "divergences": "divergences accountants",
    "events": "accountants divergences",
    "integer_noise": "integer_noise shared",
    "training": "training patients gradients",
    "canaries": "canaries audit",
    "audit": "audit canaries",
}
NOTES = {"_note"}  # what a check calls that records a problem where it could raise
CHECKS = {
    *("verify", "check_signature", "check_share", "check_share_commitments", "check_thresholds", "check"),
    *("_need", "begin", "answer", "agree", "check_filling", "check_neighbours", "check_drawn", "_check_statement"),
    *("_check_inclusion", "_check", "_check_seal", "_check_relayed", "_check_secrets", "check_fresh"),
}


@dataclass(frozen=True)
class Mutant:
    """A file without the check that begins in line ``line``."""

    file: Path
    line: int
    shown: str
    source: str


def mutants(file: Path) -> Iterator[Mutant]:
    """Every check of one file."""
    source = (ROOT / file).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and not node.orelse and (isinstance(node.body[-1], ast.Raise) or notes(node.body)):
            # What the condition names is used behind it.
            named = [name.target.id for name in ast.walk(node.test) if isinstance(name, ast.NamedExpr)]
            instead = [f"{name} = None" for name in named] or ["pass"]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and called(node.value.func) in CHECKS:
            instead = ["pass"]
        else:
            continue
        lines = source.splitlines(keepends=True)
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in instead]
        shown = (ast.get_source_segment(source, node) or "").partition("\n")[0].removesuffix(":")
        yield Mutant(file, node.lineno, shown, "".join(lines))


def called(function: ast.expr) -> str:
    """The name of a called function or method."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def notes(body: list[ast.stmt]) -> bool:
    """Whether a block records a problem."""
    calls = [statement.value for statement in body if isinstance(statement, ast.Expr)]
    return any(isinstance(call, ast.Call) and called(call.func) in NOTES for call in calls)


def tests_of(file: Path) -> list[str]:
    """The tests that are to notice what happens to a file."""
    if file.parts[0] == "dp":
        return [f"tests/dp/test_{name}.py" for name in TESTS.get(file.stem, file.stem).split()]
    return ["tests/transport"] if file.parts[0] == "transport" else CORE_TESTS


def survives(mutant: Mutant) -> bool:
    """Whether all tests pass without this check, in a copy of the tree of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("secureagg", "dp", "sites", "transport", "tests", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
            else:
                shutil.copy(source, root / name)
        (root / mutant.file).write_text(mutant.source)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
        command += tests_of(mutant.file)
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.file}:{mutant.line}: the tests did not run\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0


def main(wanted: list[str]) -> int:
    """Run the mutants of the wanted files, all without any; returns the exit status."""
    files = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).glob("*.py"))
    found = [mutant for file in files if not wanted or file.stem in wanted for mutant in mutants(file)]
    alive: list[Mutant] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (mutant, lives) in enumerate(zip(found, pool.map(survives, found), strict=True), start=1):
            told = "SURVIVED" if lives else "noticed"
            sys.stdout.write(f"{number}/{len(found)} {told} {mutant.file}:{mutant.line} {mutant.shown}\n")
            sys.stdout.flush()
            alive += [mutant] * lives
    sys.stdout.write(f"{len(found)} checks, {len(alive)} of them deleted without a test noticing\n")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
