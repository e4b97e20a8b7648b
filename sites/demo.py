"""`secureagg demo`: a throw-away consortium of several hospitals, each in a process of its own, over real sockets.

What it starts are the same two programs that a consortium runs.  Only the comparison (each hospital alone, all data in
one place) is computed by the demo itself, which for that one purpose reads every hospital's data.
"""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from secureagg.homomorphic import check_installed
from secureagg.parameters import Backend
from sites.config import OwnData, open_site, save_config
from sites.coordinator_loop import RoundRecord
from sites.demo_data import DemoData
from sites.errors import ConfigurationError, FederationFailed
from sites.evaluation import Metrics
from sites.files import write_atomic, write_json
from sites.keys import Keys, generate_keys, save_keys
from sites.manifest import Manifest
from sites.programs import DROPPED_EXIT_STATUS, MODEL, SiteSummary, stop_at
from sites.recipe import DEADLINES, HOMOMORPHIC, POLICY, new_manifest
from sites.reference import evaluate, pool_sites, state_alone
from sites.rounds import model_spec
from sites.site_data import SiteData, site_data
from sites.trainer import Examples

COORDINATOR: Final = "coordinator"
POOLED: Final = "pooled"
GUARANTEES: Final = {
    "local": "differential privacy per patient",
    "shared": "differential privacy per patient by noise that they share",
    "site": "differential privacy per hospital by noise that they share",
    "none": "without differential privacy",
}
# A machine that fails is only noticed when its time is up; the demo's rounds take a fraction of a second.
DEADLINES_WITH_DROPS: Final = msgspec.structs.replace(
    DEADLINES, join_seconds=20.0, phase_seconds=5.0, training_seconds=8.0
)


class SiteResult(msgspec.Struct, frozen=True, kw_only=True):
    """One hospital in the demo's JSON; ``survived``: it took part to the end."""

    name: str
    patients: int
    epsilon: float
    delta: float
    bytes_sent: int
    survived: bool


class MetricsResult(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics on the held-out patients of all hospitals: of the federated model, of one trained on all data in one
    place without differential privacy, and of each hospital's own model under the same privacy budget."""

    federated: Metrics
    pooled: Metrics
    local: dict[str, Metrics]


class Seconds(msgspec.Struct, frozen=True, kw_only=True):
    """Wall time of the whole demo; of it, summed over the rounds, the slowest hospital's training and everything
    else."""

    total: float
    training: float
    aggregation: float


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's JSON."""

    backend: str
    mode: str
    rounds: int
    sites: list[SiteResult]
    metrics: MetricsResult
    seconds: Seconds


def run_demo(
    data: DemoData,
    *,
    console: Console,
    mode: str = "local",
    backend: Backend = "masked",
    rounds: int | None = None,
    epsilon: float | None = None,
    drops: Sequence[str] = (),
    json_file: Path | None = None,
    keep: Path | None = None,
) -> DemoResult:
    """Run the demo, print its tables to ``console``, and return its result.

    ``mode``: of privacy; ``backend``: with "homomorphic", only the hospitals see the model; ``rounds``, ``epsilon``: by
    default the recipe's for data and mode; ``drops``: "SITE:PHASE" for each hospital whose machine fails in the middle
    round.  Raises ConfigurationError for unfit options and FederationFailed if the coordinator gives up.
    """
    began = time.monotonic()
    training, privacy = data.recipe(mode)
    if rounds is not None:
        training = msgspec.structs.replace(training, rounds=rounds)
    if epsilon is not None:
        privacy = msgspec.structs.replace(privacy, epsilon=epsilon)
    failing = dict(_drop(text, data) for text in drops)
    if backend == "homomorphic":
        check_installed()
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigurationError(f"{json_file}: folder {json_file.parent} does not exist")
    with _folder(keep) as folder, _progress(console) as progress:
        task = progress.add_task("the hospitals' data", total=training.rounds + 1)
        own_data = data.prepare(folder)
        progress.update(task, description="keys and a signed manifest")
        manifest = _create_consortium(
            folder,
            data=data,
            own_data=own_data,
            initial=data.initial(mode),
            tables={
                **data.tables(mode),
                "training": training,
                "privacy": privacy,
                "policy": POLICY if backend == "masked" else HOMOMORPHIC,
                "deadlines": DEADLINES_WITH_DROPS if failing else DEADLINES,
            },
        )
        progress.update(task, description="hospitals read their data")
        found = {name: site_data(open_site(folder / name / "SITE.toml")) for name in data.sites}
        test = data.test(folder, found)
        middle = (training.rounds + 1) // 2
        progress.update(task, description="hospitals are starting")
        stops = {name: f"{phase}:{middle}" for name, phase in failing.items()}
        with _processes(folder, data.sites, stops) as processes:
            compared = _references(data, found, test, mode=mode, epsilon=privacy.epsilon, manifest=manifest)
            for number in _follow(folder, processes):
                progress.update(task, completed=number, description=f"round {min(number + 1, training.rounds)}")
        progress.update(task, completed=training.rounds + 1, description="finished")
        records = _records(folder)
        summaries = _summaries(folder, data.sites)
        survivor = next(name for name in data.sites if name not in failing)
        shutil.copyfile(folder / (COORDINATOR if backend == "masked" else survivor) / MODEL, folder / MODEL)
        spec = model_spec(manifest)
        final = spec.restore(spec.from_bytes((folder / MODEL).read_bytes(), who="final model"))
    # Of heart data without failures these are the very metrics that the coordinator read off the last sum of counts.
    federated = evaluate(found[survivor], final, test, manifest.evaluation.histogram_bins)
    own_seconds = [_training_seconds(record, summaries) for record in records]
    aggregation = [sum(record.seconds.values()) - own for record, own in zip(records, own_seconds, strict=True)]
    result = DemoResult(
        backend=backend,
        mode=mode,
        rounds=training.rounds,
        sites=[
            SiteResult(
                name=name,
                patients=summary.patients,
                epsilon=summary.epsilon or 0.0,
                delta=summary.delta,
                bytes_sent=summary.bytes_sent,
                survived=name in records[-1].survivors,
            )
            for name, summary in summaries.items()
        ],
        metrics=MetricsResult(
            federated=federated, pooled=compared[POOLED], local={name: compared[name] for name in data.sites}
        ),
        seconds=Seconds(
            total=time.monotonic() - began,
            training=sum(own_seconds),
            aggregation=sum(aggregation),
        ),
    )
    if json_file is not None:
        write_json(json_file, result)
    console.print(_hospital_table(result, data))
    console.print(_metrics_table(result, data, len(test.targets)))
    console.print(
        f"A typical round: {statistics.median(own_seconds[:-1]):.2f} s of training (the slowest hospital), "
        f"{statistics.median(aggregation):.2f} s of aggregation. Whole demo: {result.seconds.total:.0f} s.",
        soft_wrap=True,
    )
    _print_failures(console, records)
    console.print(_view_table(records, backend))
    if keep is not None:
        console.print(f"Everything is kept in {keep}: manifest, keys, each site's state, the model.", soft_wrap=True)
    return result


def _drop(text: str, data: DemoData) -> tuple[str, str]:
    name, _, phase = text.partition(":")
    if name not in data.sites:
        raise ConfigurationError(f"drop: found site {name!r}, expected one of {', '.join(data.sites)}")
    return name, stop_at(f"{phase}:1")[0]


def _references(
    data: DemoData,
    found: Mapping[str, SiteData],
    test: Examples,
    *,
    mode: str,
    epsilon: float,
    manifest: Manifest,
) -> dict[str, Metrics]:
    """Metrics of each hospital's own model, by its name, and of one of all rows without privacy."""
    bins = manifest.evaluation.histogram_bins
    # Alone, a hospital has nobody to share noise with.
    training, privacy = data.recipe("none" if mode == "none" else "local")
    own = msgspec.structs.replace(privacy, epsilon=epsilon)
    metrics = {
        name: evaluate(one, state_alone(one, training=training, privacy=own), test, bins) for name, one in found.items()
    }
    together = pool_sites(found)
    training, privacy = data.recipe("none")
    whole = msgspec.structs.replace(training, batch_size=training.batch_size * len(found))
    plain = state_alone(together, training=whole, privacy=privacy)
    return {**metrics, POOLED: evaluate(together, plain, test, bins)}


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """A folder for everything: ``keep``, which must be new or empty, or a temporary one."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="secureagg-demo-") as name:
            yield Path(name)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise ConfigurationError(f"{keep}: is not empty, expected a new folder; no key is ever overwritten")
    except OSError as error:
        raise ConfigurationError(f"{keep}: {error.strerror}, expected a new folder") from error
    yield keep


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


# --- the consortium ---


def _create_consortium(
    folder: Path,
    *,
    data: DemoData,
    own_data: Mapping[str, OwnData],
    initial: bytes,
    tables: Mapping[str, msgspec.Struct],
) -> Manifest:
    """Keys for everybody, a manifest signed by everybody, a SITE.toml for each hospital, the initial model."""
    keys: dict[str, Keys] = {name: generate_keys(name) for name in (COORDINATOR, *data.sites)}
    for name, own in keys.items():
        save_keys(own, folder / name)
    write_atomic(folder / COORDINATOR / "initial.safetensors", initial)
    manifest = new_manifest(
        name=f"{data.name} demo",
        coordinator=keys[COORDINATOR].card,
        address=f"tcp://127.0.0.1:{free_port()}",
        cards=[keys[name].card for name in data.sites],
        initial=initial,
        changes=tables,
        noise=data.noise,
    )
    for name in data.sites:
        manifest = manifest.sign(keys[name].identity, keys[name].site)
    manifest.save(folder / "manifest.toml")
    for name in data.sites:
        save_config(
            folder / name / "SITE.toml",
            manifest=manifest,
            manifest_path=folder / "manifest.toml",
            keys=folder / name / f"{name}.keys",
            site=name,
            data=own_data[name],
        )
    return manifest


def free_port() -> int:
    """A port that was free a moment ago; the manifest must name it before the coordinator can listen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- the processes ---


@contextmanager
def _processes(
    folder: Path, sites: Sequence[str], failing: dict[str, str]
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The coordinator and the hospitals as running processes, each writing to log.txt in its folder; none is left."""
    own = folder / COORDINATOR
    commands = {
        COORDINATOR: [
            *("coordinator", str(folder / "manifest.toml"), "--keys", str(own / f"{COORDINATOR}.keys")),
            *("--initial", str(own / "initial.safetensors"), "--state", str(own)),
        ]
    }
    for name in sites:
        stop = ["--stop-answering", failing[name]] if name in failing else []
        commands[name] = ["site", str(folder / name / "SITE.toml"), *stop]
    # One thread each: many processes share the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, arguments in commands.items():
            with (folder / name / "log.txt").open("wb") as log:
                processes[name] = _start(arguments, log, environment)
        yield processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
        for process in processes.values():
            process.wait()


def _start(arguments: list[str], log: IO[bytes], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "sites.cli", *arguments]
    return subprocess.Popen(  # noqa: S603  this interpreter, our own module, arguments made above
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
    )


def _follow(folder: Path, processes: "dict[str, subprocess.Popen[bytes]]") -> Iterator[int]:
    """The number of finished rounds, again and again until every process has ended; FederationFailed if one failed."""
    while any(process.poll() is None for process in processes.values()):
        for name, process in processes.items():
            if process.poll() not in (None, 0, DROPPED_EXIT_STATUS):
                lines = (folder / name / "log.txt").read_text().strip().splitlines() or ["no output"]
                raise FederationFailed(f"{name}: {lines[-1].removeprefix('Error: ')}")
        yield len(_records(folder))
        time.sleep(0.1)


# --- what they left behind ---


def _records(folder: Path) -> list[RoundRecord]:
    path = folder / COORDINATOR / "rounds.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [msgspec.json.decode(line, type=RoundRecord) for line in lines]


def _summaries(folder: Path, sites: Sequence[str]) -> dict[str, SiteSummary]:
    return {
        name: msgspec.json.decode((folder / name / "summary.json").read_bytes(), type=SiteSummary) for name in sites
    }


def _training_seconds(record: RoundRecord, summaries: dict[str, SiteSummary]) -> float:
    """The slowest hospital's training in a round."""
    index = record.number - 1
    return max(
        (each.training_seconds[index] for each in summaries.values() if index < len(each.training_seconds)), default=0.0
    )


# --- what is shown ---


def _print_failures(console: Console, records: list[RoundRecord]) -> None:
    for record in records:
        if record.dropped:
            silent = ", ".join(f"{site} stopped answering in {phase}" for site, phase in sorted(record.dropped.items()))
            end = (
                f"ended without a release ({record.error})"
                if record.error
                else f"released the sum of {', '.join(record.survivors)}"
            )
            console.print(f"Round {record.number}: {silent}; the round {end}.", soft_wrap=True)


def _hospital_table(result: DemoResult, data: DemoData) -> Table:
    private = result.mode != "none"
    table = Table(
        title=f"{data.title}, one model: {_rounds(result.rounds)}, {GUARANTEES[result.mode]}",
        title_justify="left",
        caption="alone: a model trained on this hospital's patients only" + ", with the same epsilon" * private,
        caption_justify="left",
    )
    table.add_column("hospital")
    for heading in ("patients", "epsilon (delta)", "AUC\nalone", "AUC\nfederated", "bytes sent"):
        table.add_column(heading, justify="right")
    for site in result.sites:
        table.add_row(
            site.name,
            str(site.patients),
            f"{site.epsilon:.3f} ({site.delta:g})" if private else "none",
            _number(result.metrics.local[site.name].auc),
            _number(result.metrics.federated.auc) if site.survived else "failed",
            f"{site.bytes_sent:,}",
        )
    return table


def _metrics_table(result: DemoResult, data: DemoData, held_out: int) -> Table:
    table = Table(
        title=f"On the {held_out} {data.tested_on}",
        title_justify="left",
        caption="pooled: all patients in one place, which no hospital may do",
        caption_justify="left",
    )
    table.add_column("model")
    for heading in ("AUC", "accuracy", "balanced accuracy"):
        table.add_column(heading, justify="right")
    for name, row in (("federated", result.metrics.federated), ("pooled, no privacy", result.metrics.pooled)):
        table.add_row(name, _number(row.auc), _number(row.accuracy), _number(row.balanced_accuracy))
    return table


def _view_table(records: list[RoundRecord], backend: Backend) -> Table:
    """What the coordinator received in the last training round, and what it could make of it."""
    last = [record for record in records if record.purpose == "train" and not record.error][-1]
    table = Table(title=f"What the coordinator saw of round {last.number}", title_justify="left", show_header=False)
    for site, sample in sorted(last.masked_sample.items()):
        table.add_row(site, f"{last.bytes_received[site]:,} bytes; its masked input begins {sample}")
    table.add_section()
    together = f"of {len(last.survivors)} hospitals together"
    if backend == "homomorphic":
        what = f"nothing: it is encrypted, and only the {len(last.survivors)} hospitals have the key and the model"
    elif last.examples is not None:
        what = f"{last.examples} examples, the mean update and evaluation counts {together}"
    else:
        what = f"the noised sum, by which the model moves, {together}"
    table.add_row("their sum", what)
    return table


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
