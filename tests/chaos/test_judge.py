"""The judge of chaos says what is wrong: made-up logs of a federation, right ones and each kind of wrong ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.chaos import ENCODING, EVALUATION, LOCAL, PLAIN
from support.chaos_judge import Judge, Violated
from support.chaos_programs import TAKEN, update_of, weight_of
from support.consortium import make_consortium
from support.federation import INITIAL
from support.ledgers import open_ledger, reserve
from support.packed import elements

from secureagg import labels
from secureagg.encoding import encode_input
from sites.manifest import Manifest
from sites.recipe import TRAINING
from sites.rounds import CORRECT, HISTOGRAM, TOTAL, UPDATE, round_parameters

NAMES = ("a", "b", "c", "d")
SEED = 7
Lines = dict[str, list[dict[str, Any]]]  # file -> its lines


class MadeUp:
    """Two rounds and an evaluation of four sites, of whom d is no survivor of round 2; as lines of all logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        training = msgspec.structs.replace(TRAINING, rounds=2)
        self.manifest: Manifest = make_consortium(
            folder, initial=INITIAL, privacy=PLAIN, encoding=ENCODING, evaluation=EVALUATION, training=training
        ).manifest
        self.lines: Lines = {"state/rounds.jsonl": []}
        for name in NAMES:
            self.lines[f"{name}/{TAKEN}"], self.lines[f"{name}/rounds.jsonl"] = [], []
        model = np.zeros(4)
        for number, survivors in ((1, NAMES), (2, NAMES[:3]), (3, NAMES)):
            model = self._round(number, survivors, model)
        for name in NAMES:
            self.taken(name).append({"what": "final", "run": "r", "vector": model.tolist()})

    def taken(self, name: str) -> list[dict[str, Any]]:
        """What a site notes as it happens."""
        return self.lines[f"{name}/{TAKEN}"]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The coordinator's log."""
        return self.lines["state/rounds.jsonl"]

    def _round(self, number: int, survivors: tuple[str, ...], model: np.ndarray) -> np.ndarray:
        trains = number <= 2
        parameters = round_parameters(
            self.manifest,
            run="r",
            round_number=number,
            purpose="train" if trains else "evaluate",
            cohort=NAMES,
            model_digest=bytes(32),
        )
        counts = {CORRECT: [0], TOTAL: [0], HISTOGRAM: [0] * 4}
        totals: dict[str, Any] = {}
        for name in NAMES:
            values = {**counts, **({UPDATE: update_of(SEED, name, number, 4)} if trains else {})}
            encoded = encode_input(parameters, values, weight=weight_of(name) if trains else None)
            lanes = {
                lane: [parameters.lanes[lane].ring_bits, lane == UPDATE, vector]
                for lane, vector in elements(encoded, parameters).items()
            }
            where = {"run": "r", "round": number, "context": parameters.context.hex()}
            if trains:
                self.taken(name).append({"what": "start", "run": "r", "round": number, "vector": model.tolist()})
            self.taken(name).append({"what": "sent", **where, "lanes": lanes})
            for lane, (bits, signed, vector) in lanes.items() if name in survivors else ():
                before = totals.get(lane, np.zeros(len(vector), np.int64)).tolist()
                summed = [sum(pair) % (1 << bits) for pair in zip(vector, before, strict=True)]
                low = (1 << (bits - 1)) if signed else (1 << bits)
                totals[lane] = np.array([value - (1 << bits) if value >= low else value for value in summed])
        parts = [part for lane, total in totals.items() for part in (lane.encode(), total.astype("<i8").tobytes())]
        digest = labels.digest(labels.AGGREGATE, parameters.context, *parts).hex()
        self.records.append(
            {"run": "r", "number": number, "cohort": NAMES, "survivors": survivors, "error": ""}
            | {"examples": sum(map(weight_of, survivors)) if trains else None}
        )
        for name in survivors:
            self.lines[f"{name}/rounds.jsonl"].append(
                {"run": "r", "number": number, "result": "finished", "survivors": len(survivors), "aggregate": digest}
            )
        if not trains:
            return model
        scale = (2 ** (ENCODING.value_bits - 1) - 1) / ENCODING.value_range
        return model + totals[UPDATE] / scale / sum(map(weight_of, survivors))

    def judged(self) -> Judge:
        """Write all down and have it judged."""
        for file, lines in self.lines.items():
            path = self.folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        judge = Judge(self.folder, NAMES, self.manifest, SEED)
        assert judge.finish(rounds=2) == len(NAMES)
        return judge


def test_a_federation_that_is_right(tmp_path: Path) -> None:
    """Nothing is wrong, and all of it was looked at."""
    tally = MadeUp(tmp_path).judged().tally
    assert (tally.rounds, tally.released, tally.exact, tally.models) == (3, 3, 11, 8 + 4)


def _other_survivors(made: MadeUp) -> None:
    made.records[1]["survivors"] = ("a", "b", "d")


def _too_few(made: MadeUp) -> None:
    made.records[1]["survivors"] = ("a", "b")


def _outsider(made: MadeUp) -> None:
    made.records[1]["cohort"] = ("a", "b", "d")


def _counted_twice(made: MadeUp) -> None:
    made.records.insert(1, made.records[0])


def _number_left_out(made: MadeUp) -> None:
    del made.records[1]


def _begun_anew(made: MadeUp) -> None:
    made.records[2]["run"] = "s"


def _another_input(made: MadeUp) -> None:
    made.taken("a").insert(2, made.taken("a")[1])


def _taken_part_twice(made: MadeUp) -> None:
    made.taken("a").insert(2, made.taken("a")[0])


def _another_update(made: MadeUp) -> None:
    made.taken("b")[1]["lanes"]["update"][2][3] ^= 1 << 12


def _off_by_one(made: MadeUp) -> None:
    made.taken("b")[1]["lanes"]["update"][2][3] ^= 1


def _no_input(made: MadeUp) -> None:
    del made.taken("c")[1]


def _another_model(made: MadeUp) -> None:
    made.taken("c")[2]["vector"][0] += 0.001


def _another_end(made: MadeUp) -> None:
    made.taken("c")[-1]["vector"][0] += 0.001


def _released_nothing(made: MadeUp) -> None:
    made.records[1] |= {"error": "threshold-not-met", "survivors": ()}


def _moved_by_nothing(made: MadeUp) -> None:
    made.records[1] |= {"error": "interrupted", "survivors": ()}


def _other_examples(made: MadeUp) -> None:
    made.records[0]["examples"] += 1


def _other_contexts(made: MadeUp) -> None:
    made.taken("a")[1]["context"] = "00" * 32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_survivors, "33 examples, expected"),
        (_too_few, "survivors"),
        (_outsider, "survivors"),
        (_counted_twice, "after round 1"),
        (_number_left_out, "after round 1"),
        (_begun_anew, "of run s"),
        (_another_input, "sent twice in round 1"),
        (_taken_part_twice, "start twice in round 1"),
        (_another_update, "another update"),
        (_off_by_one, "another aggregate"),
        (_no_input, "never had an input"),
        (_another_model, "start of round 2: the model is"),
        (_another_end, "final model: the model is"),
        (_released_nothing, "which the coordinator ended with"),
        (_moved_by_nothing, "final model: the model is"),
        (_other_examples, "examples"),
        (_other_contexts, "different contexts"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: Callable[[MadeUp], None], said: str) -> None:
    """One wrong line of one log is a violation, named."""
    made = MadeUp(tmp_path)
    change(made)
    with pytest.raises(Violated, match=said):
        made.judged()


def test_ledgers(tmp_path: Path) -> None:
    """A use of the data, or an update, that is not booked is a violation, and so is a ledger that was begun anew."""
    manifest = make_consortium(tmp_path, initial=INITIAL, privacy=LOCAL).manifest
    path = tmp_path / "a" / "ledger.sqlite"
    with open_ledger(path) as ledger:
        reservation = reserve(ledger, 1)
        update = ledger.commit(reservation, b"update").update_sha256
    judge = Judge(tmp_path, NAMES, manifest, None)
    judge._draws["a", 1] = 1
    judge._releases["a", 1] = update
    judge.look_at_ledger("a")
    judge._draws["a", 1] = 2
    with pytest.raises(Violated, match="used its data 2 times in round 1, booked 1"):
        judge.look_at_ledger("a")
    judge._draws["a", 1], judge._releases["a", 1] = 1, "0" * 64
    with pytest.raises(Violated, match="is not in the ledger"):
        judge.look_at_ledger("a")
    path.unlink()
    with open_ledger(path), pytest.raises(Violated, match="its ledger"):
        judge.look_at_ledger("a")
