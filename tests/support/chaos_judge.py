"""What must hold of a federation whatever happens to its machines, judged from what all of them have written down.

The judge knows each site's encoded inputs and sums them itself.  Of the coordinator it believes only who survived.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dp.errors import LedgerUnavailable
from dp.ledger import read_ledger, verify
from secureagg import labels
from sites.manifest import Manifest
from support.chaos_programs import TAKEN, update_of, weight_of

TOLERANCE = 1e-5  # of a float32 model; a wrong sum is off by a tenth


class Violated(AssertionError):
    """Something that must hold does not."""


@dataclass(slots=True)
class _Lines:
    """The lines of a growing file, each once and only when it is whole."""

    path: Path
    place: int = 0

    def new(self) -> list[dict[str, Any]]:
        """Those since the last time."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.place)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.place += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


@dataclass(slots=True)
class Tally:
    """What the judge has seen."""

    rounds: int = 0
    released: int = 0
    interrupted: int = 0
    failed: int = 0
    exact: int = 0  # releases whose digest is that of the sum that the judge made itself
    models: int = 0  # models at a site that were the expected one
    went_back: int = 0  # sums that a site had and the coordinator, which crashed, did not count
    ledger_rows: int = 0
    draws: int = 0


@dataclass(slots=True)
class Judge:
    """Reads all logs of the consortium in ``folder``; ``seed``: of the sites' updates, None where a trainer made
    them."""

    folder: Path
    names: Sequence[str]
    manifest: Manifest
    seed: int | None
    tally: Tally = field(default_factory=Tally)
    _models: list[npt.NDArray[np.float32]] = field(default_factory=list)  # index: after which round
    _run: str = ""
    _inputs: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    _starts: dict[tuple[int, str], Any] = field(default_factory=dict)
    _results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _records: dict[int, dict[str, Any]] = field(default_factory=dict)
    _files: dict[str, tuple[_Lines, _Lines]] = field(default_factory=dict)
    _log: _Lines = field(init=False)
    _draws: dict[tuple[str, int], int] = field(default_factory=dict)
    _releases: dict[tuple[str, int], str] = field(default_factory=dict)
    _heads: dict[str, str] = field(default_factory=dict)
    _rows: dict[str, int] = field(default_factory=dict)
    _digests: dict[int, str] = field(default_factory=dict)
    _finals: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = sum(int(np.prod(tensor.shape)) for tensor in self.manifest.model.tensors)
        self._models.append(np.zeros(length, np.float32))
        self._files = {
            name: (_Lines(self.folder / name / TAKEN), _Lines(self.folder / name / "rounds.jsonl"))
            for name in self.names
        }
        self._log = _Lines(self.folder / "state" / "rounds.jsonl")

    def look(self) -> int:
        """Judge what is new; how many rounds have ended by now.  Raises Violated."""
        # First the coordinator's, so that the sites' lines of each of its rounds are there.
        records = self._log.new()
        for name, (taken, results) in self._files.items():
            for line in taken.new():
                self._take(name, line)
            self._results += [(name, line) for line in results.new()]
        for record in records:
            self._judge(record)
        self._judge_sites()
        return len(self._records)

    # --- what sites say ---

    def _take(self, name: str, line: dict[str, Any]) -> None:
        if line["what"] == "final":
            self._finals[name] = line["vector"]
            return
        number = line["round"]
        known: dict[tuple[int, str], Any] = {"sent": self._inputs, "start": self._starts}.get(line["what"], {})
        if (number, name) in known:
            raise Violated(f"{name}: {line['what']} twice in round {number}")
        if self._run and line["run"] != self._run:
            raise Violated(f"{name}: round {number} is of run {line['run']}, expected {self._run}")
        known[number, name] = line
        if line["what"] == "draw":
            self._draws[name, number] = self._draws.get((name, number), 0) + 1
        elif line["what"] == "release" and self._releases.setdefault((name, number), line["sha256"]) != line["sha256"]:
            raise Violated(f"{name}: two updates in round {number}")
        elif line["what"] == "sent" and self.seed is not None and (number, name) in self._starts:
            self._check_encoded(name, number, line["lanes"])

    def _check_encoded(self, name: str, number: int, lanes: Mapping[str, Any]) -> None:
        bits, _, vector = lanes["update"]
        value = _centred(np.array(vector, np.int64), bits) / weight_of(name) / self._scale
        expected = update_of(self.seed or 0, name, number, len(vector))
        if np.abs(value - expected).max() > 2 / self._scale + TOLERANCE:
            raise Violated(f"{name}: round {number} has encoded another update than the one it was given")

    def _judge_sites(self) -> None:
        """What sites hold at the start and the end of rounds whose record is there."""
        for (number, name), line in list(self._starts.items()):
            if line is not None and number in self._records:
                self._check_model(f"{name}, start of round {number}", line["vector"], number - 1)
                self._starts[number, name] = None
        left = []
        for name, result in self._results:
            record = self._records.get(result["number"])
            if record is None:
                left.append((name, result))
            elif result["result"] == "finished":
                self._check_finished(name, result, record)
        self._results = left

    def _check_finished(self, name: str, result: dict[str, Any], record: dict[str, Any]) -> None:
        number = record["number"]
        if record["error"] in ("interrupted", "unconfirmed"):
            self.tally.went_back += 1  # the model of the next round's start shows that it did
            return
        if record["error"]:
            raise Violated(f"{name}: finished round {number}, which the coordinator ended with {record['error']}")
        if result["survivors"] != len(record["survivors"]):
            raise Violated(f"{name}: round {number} with {result['survivors']} survivors, not {record['survivors']}")
        if self._digests.setdefault(number, result["aggregate"]) != result["aggregate"]:
            raise Violated(f"{name}: another aggregate of round {number} than the others have")
        self.tally.exact += self.manifest.policy.backend == "masked"

    # --- what the coordinator says ---

    def _judge(self, record: dict[str, Any]) -> None:
        number = record["number"]
        self._run = self._run or record["run"]
        if record["run"] != self._run or number != len(self._records) + 1:
            raise Violated(f"round {number} of run {record['run']} after round {len(self._records)} of {self._run}")
        self._records[number] = record
        self.tally.rounds += 1
        self._models.append(self._models[-1])
        if record["error"]:
            interrupted = record["error"] in ("interrupted", "unconfirmed")
            self.tally.interrupted += interrupted
            self.tally.failed += not interrupted
            if record["survivors"]:
                raise Violated(f"round {number} released nothing, and has survivors")
            return
        self.tally.released += 1
        totals, context = self._totals(record)
        if int(totals["canary"][0]) != len(record["survivors"]):
            raise Violated(f"round {number}: the inputs' canaries are {totals['canary']}")
        if self.manifest.policy.backend == "masked":
            parts = [part for name, total in totals.items() for part in (name.encode(), total.astype("<i8").tobytes())]
            self._digests[number] = labels.digest(labels.AGGREGATE, bytes.fromhex(context), *parts).hex()
            if "weight" in totals and record["examples"] != int(totals["weight"][0]):
                raise Violated(f"round {number}: {record['examples']} examples, expected {totals['weight']}")
        if "update" in totals:
            mean = totals["update"] / int(totals["weight"][0]) / self._scale
            self._models[-1] = self._models[-2] + mean.astype(np.float32)

    def _totals(self, record: dict[str, Any]) -> tuple[dict[str, npt.NDArray[np.int64]], str]:
        """The sum of what the survivors of a round put in, and the context that all of them share."""
        number, survivors = record["number"], record["survivors"]
        if len(survivors) < self.manifest.policy.minimum_survivors or not set(survivors) <= set(record["cohort"]):
            raise Violated(f"round {number}: survivors {survivors} of {record['cohort']}")
        if lost := [name for name in survivors if (number, name) not in self._inputs]:
            raise Violated(f"round {number}: {lost} are in the sum and never had an input")
        inputs = [self._inputs[number, name] for name in survivors]
        if len({line["context"] for line in inputs}) != 1:
            raise Violated(f"round {number}: survivors of different contexts")
        totals = {}
        for lane, (bits, signed, _) in inputs[0]["lanes"].items():
            columns = [line["lanes"][lane][2] for line in inputs]
            total = np.array([sum(column) % (1 << bits) for column in zip(*columns, strict=True)], np.int64)
            totals[lane] = _centred(total, bits) if signed else total
        return totals, inputs[0]["context"]

    @property
    def _scale(self) -> float:
        encoding = self.manifest.encoding
        return (2 ** (encoding.value_bits - 1) - 1) / encoding.value_range

    def _check_model(self, who: str, vector: Sequence[float], after: int) -> None:
        off = float(np.abs(np.array(vector) - self._models[after]).max())
        if off > TOLERANCE:
            raise Violated(f"{who}: the model is {off:.3g} off from the sum of the released rounds up to {after}")
        self.tally.models += 1

    # --- ledgers, and the end ---

    def look_at_ledger(self, name: str) -> None:
        """Judge the ledger of a site that is not running: whole, never shorter than it was, and nothing was used or
        sent that is not booked in it."""
        rows: list[Any] = []
        with suppress(LedgerUnavailable):
            rows = list(read_ledger(self.folder / name / "ledger.sqlite"))
        head = self._heads.get(name)
        if not rows and head is None:
            return
        found = verify(rows, head=head)
        if found.problems:
            raise Violated(f"{name}: its ledger: {found.problems[0]}")
        self._heads[name] = found.head
        self._rows[name] = len(rows)
        self.tally.ledger_rows = sum(self._rows.values())
        reserved = {
            entry["sequence"]: entry["round_number"]
            for entry in found.entries
            if entry["kind"] == "reserve" and entry["decision"] == "reserved"
        }
        booked = list(reserved.values())
        committed = {entry["update_sha256"] for entry in found.entries if entry["kind"] == "commit"}
        for (site, number), times in self._draws.items():
            if site == name and booked.count(number) < times:
                raise Violated(f"{name}: used its data {times} times in round {number}, booked {booked.count(number)}")
        for (site, number), digest in self._releases.items():
            if site == name and digest not in committed:
                raise Violated(f"{name}: its update of round {number} is not in the ledger")
        self.tally.draws = sum(self._draws.values())

    def finish(self, *, rounds: int) -> int:
        """Judge the end of a run that came to it; how many sites have the final model."""
        self.look()
        if len(self._records) != rounds + 1:
            raise Violated(f"{len(self._records)} rounds, expected {rounds} and an evaluation")
        for name, vector in self._finals.items():
            self._check_model(f"{name}, final model", vector, rounds)
        if self._results:
            raise Violated(f"results of rounds that the coordinator never had: {self._results[0]}")
        return len(self._finals)


def _centred(values: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    return np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
