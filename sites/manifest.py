"""The consortium's manifest: who takes part, under which rules, signed by every site.

The coordinator hands nothing out that a site would have to believe: each site holds the manifest as a file of its own,
has signed it, and has pinned its digest.  The digest enters every round's context.
"""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import msgspec
import tomli_w

from dp.errors import UnsupportedEvent
from secureagg import AuthenticationFailed, Card, Identity, ParameterError, Roster, SiteId
from secureagg.identity import verify
from secureagg.parameters import (
    COMPLETE_UP_TO,
    Backend,
    Graph,
    Release,
    ThresholdOptions,
    check_backend,
    choose_thresholds,
)
from secureagg.slots import slot_bits
from sites.datasets.dicom.labels import Target
from sites.datasets.dicom.records import ImagePlan
from sites.errors import DatasetError, ManifestError
from sites.files import write_atomic
from sites.keys import card_fields

if TYPE_CHECKING:
    from dp.shared import SharedNoisePlan

LABEL: Final = b"secureagg/v1/manifest"
NO_LABEL: Final = "no label"  # cells of a census that no class may be called
SEVERAL: Final = "several"  # of a patient whose images are of more than one kind
OTHERS: Final = "*"  # all classes that no other entry names

_Hex32 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}\\Z")]
_Hex64 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{128}\\Z")]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e7)]
_Above0 = Annotated[float, msgspec.Meta(gt=0, le=1e9)]  # an upper bound, since infinity has none


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the manifest's tables: immutable, every field required unless it has a default, no others."""


class Consortium(_Table, frozen=True):
    """``name`` of the consortium, ``version`` of this manifest's layout, and which ``revision`` of its rules this is,
    from 1; ``follows``: the digest of the one before, in hexadecimal, "" for the first."""

    name: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}\\Z")]
    revision: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    follows: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?\\Z")]
    version: Literal[1] = 1


class Policy(_Table, frozen=True):
    """Least number of sites in a round, most that may collude with the coordinator, least number in a released sum.

    ``graph``: see ``secureagg.parameters.choose_thresholds``; on the sparse graph of large cohorts a round survives
    that ``dropout_percent`` of the cohort drop out.  ``backend``, ``release_to``: see ``RoundParameters``; with the
    homomorphic backend and the sites alone, nobody else ever sees the model.
    """

    minimum_cohort: Annotated[int, msgspec.Meta(ge=3, le=1000)]
    max_corrupt: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    minimum_survivors: Annotated[int, msgspec.Meta(ge=3, le=1000)]
    graph: Graph
    dropout_percent: Annotated[int, msgspec.Meta(ge=0, le=50)]
    backend: Backend
    release_to: Release
    threshold: Literal["two-thirds"] = "two-thirds"

    @property
    def sites_hold_model(self) -> bool:
        """Whether sums are for the sites only, so that the global model is theirs to move."""
        return self.release_to == "sites"

    def thresholds(self, cohort_size: int, *, at_least: int = 0) -> ThresholdOptions:
        """What ``RoundParameters.create`` is to be given for a cohort of this size: these numbers, and more survivors
        where its graph enforces more, or where shared noise needs ``at_least`` so many.

        Raises ParameterError for a policy that is not safe for it.
        """
        options = ThresholdOptions(graph=self.graph, max_corrupt=self.max_corrupt)
        if self.backend == "homomorphic":
            options["graph"] = "complete"
        elif self.graph == "sparse" or (self.graph == "auto" and cohort_size > COMPLETE_UP_TO):
            options["max_dropouts"] = cohort_size * self.dropout_percent // 100
        enforced = choose_thresholds(cohort_size, **options).minimum_survivors
        options["minimum_survivors"] = max(self.minimum_survivors, enforced, at_least)
        choose_thresholds(cohort_size, **options)
        return options


class Encoding(_Table, frozen=True):
    """Fixed point of the update, and ``max_examples``: the largest weight of a site."""

    value_bits: Annotated[int, msgspec.Meta(ge=2, le=32)]
    value_range: _Above0
    out_of_range: Literal["error", "clip"]
    max_examples: _Positive


class Evaluation(_Table, frozen=True):
    """Bins of the summed score histogram, and the largest number of held-out examples of a site.

    ``personalised``: the only evaluation is that of the final model and of the sites' own versions of it, side by side,
    over the sites that have one, once under this manifest (see ``sites.personalisation``).
    """

    histogram_bins: Annotated[int, msgspec.Meta(ge=2, le=1 << 16, multiple_of=2)]
    max_examples: _Positive
    personalised: bool


class Tensor(_Table, frozen=True):
    """One float32 tensor of the model."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    shape: list[_Positive]


class Model(_Table, frozen=True):
    """The tensors in the order in which they are flattened, and the SHA-256 of the initial safetensors file."""

    tensors: Annotated[list[Tensor], msgspec.Meta(min_length=1)]
    initial_sha256: _Hex32


class Training(_Table, frozen=True):
    """The training plan; ``batch_size`` is the expected size of a Poisson-sampled batch, in the privacy mode "shared"
    of all sites' together: what an opened sum is divided by."""

    rounds: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    local_steps: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    batch_size: _Positive
    learning_rate: _Above0
    server_optimizer: Literal["average", "momentum", "adam"]
    server_learning_rate: _Above0


class Privacy(_Table, frozen=True):
    """What every site accepts at most: ``epsilon`` at ``delta`` per ``unit``, gradients clipped to ``clip_norm``.

    "local": each site's own noise protects its patients from everybody.  "shared" (a gradient sum in each round) and
    "site" (a whole update): only the sum of all sites has enough noise, against the coordinator and ``max_corrupt``
    sites.
    """

    mode: Literal["local", "shared", "site", "none"]
    epsilon: _Above0
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    clip_norm: _Above0
    unit: Literal["patient", "site"] = "patient"

    @property
    def shares_noise(self) -> bool:
        """Whether what a site submits is private only in the sum of all."""
        return self.mode in ("shared", "site")


class Noise(_Table, frozen=True):
    """Integer noise that the sites share, as ``dp.shared`` solves for it; see ``SharedNoisePlan``.

    ``sampling_rate``: every patient's chance to be in a step, 1 for whole sites; ``max_dropouts``: of the roster, so
    that all others must survive a round.
    """

    mechanism: Literal["skellam", "discrete gaussian"]
    sampling_rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    max_dropouts: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    coordinate_clip: _Above0
    scale: Annotated[float, msgspec.Meta(gt=0, le=2.0**62)]
    ring_bits: Annotated[int, msgspec.Meta(ge=8, le=63)]
    local_deviation: Annotated[float, msgspec.Meta(gt=0, le=2.0**62)]


class Census(_Table, frozen=True):
    """That the sites' patients are counted together at the end of a run (see ``sites.census``).

    A count is published if it is of at least ``minimum_patients`` and ``minimum_sites``; ``labels``: target -> its
    classes; ``max_patients``: the most of one site.
    """

    minimum_patients: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 10
    minimum_sites: Annotated[int, msgspec.Meta(ge=3, le=1000)] = 3
    max_patients: _Positive = 10_000_000
    labels: dict[str, Annotated[list[str], msgspec.Meta(min_length=2, max_length=100)]] = {}


class ClassViews(_Table, frozen=True):
    """In a training step an image of class ``of`` of the first target ("*": of all classes that are not named) is seen
    ``views`` times, each moved by up to ``shift`` pixels; the views are averaged before the patient is clipped."""

    of: str
    views: Annotated[int, msgspec.Meta(ge=1, le=64)]
    shift: Annotated[int, msgspec.Meta(ge=0, le=64)]


class Images(_Table, frozen=True):
    """What all sites make of their images: by one ``plan``, for the same ``targets``, into a named ``model``.

    The first target with two classes is the one that the summed evaluation is about.
    """

    model: str
    plan: ImagePlan
    targets: Annotated[list[Target], msgspec.Meta(min_length=1, max_length=100)]
    augmentation: list[ClassViews] = []


def load_images(path: Path) -> Images:
    """The fields of [images] in a TOML file of their own; ManifestError naming file and field for anything else."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Images)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, DatasetError) as error:
        raise ManifestError(f"{path}: {error}") from error


class Deadlines(_Table, frozen=True):
    """Seconds until sites must have joined, answered in a phase, and trained."""

    join_seconds: _Seconds
    phase_seconds: _Seconds
    training_seconds: _Seconds


class CardTable(_Table, frozen=True):
    """A public card, keys in hexadecimal."""

    name: str
    signing_key: _Hex32
    transport_key: _Hex32
    signature: _Hex64

    @property
    def card(self) -> Card:
        """The card itself."""
        return Card(
            site=SiteId(self.name),
            signing_key=bytes.fromhex(self.signing_key),
            transport_key=bytes.fromhex(self.transport_key),
            signature=bytes.fromhex(self.signature),
        )


class CoordinatorTable(CardTable, frozen=True):
    """The coordinator's card and where it listens."""

    address: Annotated[str, msgspec.Meta(pattern="^tcp://[^ ]+:[0-9]{1,5}\\Z")]


class Signature(_Table, frozen=True):
    """One site's signature over everything else in the manifest."""

    site: str
    signature: _Hex64


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """The whole manifest.  ``load`` and ``create`` check its form, ``check`` its cards, thresholds and signatures."""

    consortium: Consortium
    policy: Policy
    encoding: Encoding
    evaluation: Evaluation
    model: Model
    training: Training
    privacy: Privacy
    deadlines: Deadlines
    coordinator: CoordinatorTable
    sites: Annotated[list[CardTable], msgspec.Meta(min_length=3, max_length=1000)]
    noise: Noise | msgspec.UnsetType = msgspec.UNSET
    census: Census | msgspec.UnsetType = msgspec.UNSET
    images: Images | msgspec.UnsetType = msgspec.UNSET
    signatures: list[Signature] = []

    @classmethod
    def create(cls, *, coordinator: Card, address: str, cards: Sequence[Card], **tables: msgspec.Struct) -> Self:
        """A manifest without signatures from cards and tables; ManifestError if anything in it is unfit."""
        fields: dict[str, Any] = {name: msgspec.to_builtins(table) for name, table in tables.items()}
        fields["coordinator"] = {**card_fields(coordinator), "address": address}
        fields["sites"] = [card_fields(card) for card in sorted(cards, key=lambda card: card.site)]
        manifest = cls._convert(fields, "new manifest")
        manifest._check_contents("new manifest")
        return manifest

    def revised(self, *, revoke: Collection[str] = (), cards: Sequence[Card] = ()) -> Self:
        """The next revision, unsigned: without the sites ``revoke``, and with these ``cards``, each in place of the
        site's old one or of a new site; all else is as it was.  ManifestError for a site to revoke that is not listed.

        A run goes on under it, see ``continues``.
        """
        listed = {entry.name for entry in self.sites}
        if unknown := set(revoke) - listed:
            raise ManifestError(f"manifest of {self.consortium.name}: does not list {', '.join(sorted(unknown))}")
        named = {str(card.site): card for card in cards}
        kept = [entry.card for entry in self.sites if entry.name not in {*revoke, *named}]
        changed = ("coordinator", "sites", "signatures", "consortium")
        tables = {name: getattr(self, name) for name in self.__struct_fields__ if name not in changed}
        consortium = msgspec.structs.replace(
            self.consortium, revision=self.consortium.revision + 1, follows=self.digest.hex()
        )
        return self.create(
            coordinator=self.coordinator.card,
            address=self.coordinator.address,
            cards=[*kept, *named.values()],
            consortium=consortium,
            **{name: table for name, table in tables.items() if table is not msgspec.UNSET},
        )

    @cached_property
    def rules(self) -> bytes:
        """SHA-256 of all that is the same in every revision by ``revised``: what is trained, at what cost, how it is
        summed."""
        consortium = msgspec.structs.replace(self.consortium, revision=1, follows="")
        fixed = msgspec.structs.replace(self, consortium=consortium, sites=[], signatures=[])
        return sha256(LABEL + msgspec.json.encode(fixed, order="sorted")).digest()

    def continues(self, digest: bytes, rules: bytes) -> bool:
        """Whether a run under the manifest of this ``digest`` and these ``rules`` goes on under this one: it is the
        same, or the revision after it."""
        return self.rules == rules and digest in (self.digest, bytes.fromhex(self.consortium.follows))

    def changes_from(self, before: "Manifest") -> dict[str, list[str]]:
        """Names of the sites that this revision "revoked", "added" and gave new keys ("rekeyed")."""
        old, new = before.roster, self.roster
        return {
            "revoked": sorted(old.keys() - new.keys()),
            "added": sorted(new.keys() - old.keys()),
            "rekeyed": sorted(site for site in old.keys() & new.keys() if old[site] != new[site]),
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """The manifest in a TOML file; ManifestError naming file and field for anything that is not one."""
        try:
            fields = tomllib.loads(path.read_text())
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ManifestError(f"{path}: not a TOML file: {error}") from error
        return cls._convert(fields, str(path))

    @classmethod
    def _convert(cls, fields: Mapping[str, Any], where: str) -> Self:
        try:
            manifest = msgspec.convert(fields, cls)
        except (msgspec.ValidationError, DatasetError) as error:
            raise ManifestError(f"{where}: {error}") from error
        return manifest

    def save(self, path: Path) -> None:
        """Write the manifest as TOML."""
        write_atomic(path, tomli_w.dumps(_without_none(msgspec.to_builtins(self))).encode())

    @cached_property
    def canonical(self) -> bytes:
        """The bytes that are signed: everything but the signatures, as JSON with sorted keys."""
        unsigned = msgspec.structs.replace(self, signatures=[])
        return msgspec.json.encode(unsigned, order="sorted")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: what a site pins."""
        return sha256(LABEL + self.canonical).digest()

    @cached_property
    def noise_plan(self) -> "SharedNoisePlan | None":
        """The noise that the sites share, checked against what [privacy] promises; None where each has its own.

        Raises ManifestError for a plan that does not keep the promise; takes seconds for the first time.
        """
        if not isinstance(self.noise, Noise):
            return None
        from dp.shared import SharedNoisePlan  # noqa: PLC0415

        noise, sites = self.noise, len(self.sites)
        of_one = self.training.batch_size / sites if self.privacy.mode == "shared" else 1.0
        try:
            return SharedNoisePlan(
                mechanism=noise.mechanism,
                unit=self.privacy.unit,
                epsilon=self.privacy.epsilon,
                delta=self.privacy.delta,
                steps=self.training.rounds,
                dimensions=sum(prod(tensor.shape) for tensor in self.model.tensors),
                sites=sites,
                dropouts=noise.max_dropouts,
                colluders=max(1, self.policy.max_corrupt),
                clip_norm=self.privacy.clip_norm,
                coordinate_clip=noise.coordinate_clip,
                sampling_rates=(noise.sampling_rate,) * sites,
                expected_batches=(of_one,) * sites,
                scale=noise.scale,
                ring_bits=noise.ring_bits,
                local_deviation=noise.local_deviation,
            )
        except UnsupportedEvent as error:
            raise ManifestError(f"manifest of {self.consortium.name}, [noise]: {error}") from error

    def thresholds(self, cohort_size: int) -> ThresholdOptions:
        """See ``Policy.thresholds``; with shared noise no fewer may survive than it was planned for."""
        plan = self.noise_plan
        return self.policy.thresholds(cohort_size, at_least=0 if plan is None else plan.minimum_survivors)

    @cached_property
    def roster(self) -> Roster:
        """The sites' cards, checked."""
        return Roster(entry.card for entry in self.sites)

    def sign(self, identity: Identity, site: SiteId) -> Self:
        """This manifest with ``site``'s signature added or replaced; ManifestError unless it is listed with this
        key."""
        listed = {entry.name: entry for entry in self.sites}.get(site)
        if listed is None or listed.signing_key != identity.public_key.hex():
            raise ManifestError(f"manifest of {self.consortium.name}: site {site} is not listed with these keys")
        signature = Signature(site=site, signature=identity.sign(LABEL, self.canonical).hex())
        others = [entry for entry in self.signatures if entry.site != site]
        return msgspec.structs.replace(self, signatures=sorted([*others, signature], key=lambda entry: entry.site))

    @property
    def unsigned_by(self) -> list[str]:
        """The sites whose signature is missing."""
        return sorted({entry.name for entry in self.sites} - {entry.site for entry in self.signatures})

    def check(self) -> None:
        """Raise ManifestError, naming the site or field, unless all is sound and every site has signed exactly this."""
        where = f"manifest of {self.consortium.name}"
        self._check_contents(where)
        for entry in self.signatures:
            if SiteId(entry.site) not in self.roster:
                raise ManifestError(f"{where}: signed by {entry.site}, who is not listed")
            try:
                # Stops a manifest that was altered after a site has signed it.
                verify(
                    self.roster[SiteId(entry.site)].signing_key,
                    bytes.fromhex(entry.signature),
                    LABEL,
                    self.canonical,
                    who=f"signature of {entry.site}",
                )
            except AuthenticationFailed as error:
                raise ManifestError(
                    f"{where}: the signature of {entry.site} does not fit the contents; they were altered after signing"
                ) from error
        if self.unsigned_by:
            raise ManifestError(
                f"{where}: not signed by {', '.join(self.unsigned_by)}, expected all {len(self.sites)} sites"
            )

    def _check_contents(self, where: str) -> None:
        if (self.consortium.revision == 1) != (self.consortium.follows == ""):
            raise ManifestError(
                f"{where}: found revision {self.consortium.revision} that follows {self.consortium.follows or 'none'}, "
                "expected revision 1 to follow none, and any other one to follow another"
            )
        try:
            self.coordinator.card.check()
            roster = self.roster
            self._check_privacy(where)
            self._check_census(where)
            self._check_images(where)
            check_backend(self.policy.backend, self.policy.release_to, self.policy.graph)
            if self.policy.backend == "homomorphic":
                slot_bits(len(self.sites))
            for size in (self.policy.minimum_cohort, len(self.sites)):
                self.thresholds(size)
        except (ParameterError, AuthenticationFailed) as error:
            raise ManifestError(f"{where}: {error}") from error
        own = {self.coordinator.signing_key, self.coordinator.transport_key}
        for entry in self.sites:
            # Stops a site that would also see, as coordinator, what only sites may see.
            if entry.name == self.coordinator.name or own & {entry.signing_key, entry.transport_key}:
                raise ManifestError(f"{where}: {entry.name} has the coordinator's name or one of its keys")
        if len({tensor.name for tensor in self.model.tensors}) != len(self.model.tensors):
            raise ManifestError(f"{where}: a tensor is listed twice in [model]")
        if self.policy.minimum_cohort > len(roster):
            raise ManifestError(
                f"{where}: minimum_cohort is {self.policy.minimum_cohort}, expected at most the {len(roster)} sites"
            )

    def _check_census(self, where: str) -> None:
        if not isinstance(self.census, Census):
            return
        for name, classes in self.census.labels.items():
            if len({*classes, NO_LABEL, SEVERAL}) != len(classes) + 2:
                raise ManifestError(
                    f"{where}: label {name} of [census] has a class twice, or one that is called {NO_LABEL!r} or "
                    f"{SEVERAL!r}"
                )
        # Stops sites that collude from subtracting their own counts from a cell that has one more site.
        least = self.policy.max_corrupt + 2
        if self.census.minimum_sites < least:
            raise ManifestError(
                f"{where}: found {self.census.minimum_sites} as minimum_sites of [census], expected at least {least}, "
                f"since {self.policy.max_corrupt} sites may collude"
            )

    def _check_privacy(self, where: str) -> None:
        mode, unit, steps = self.privacy.mode, self.privacy.unit, self.training.local_steps
        if self.privacy.shares_noise != (self.noise is not msgspec.UNSET):
            found = "none" if self.noise is msgspec.UNSET else "one"
            raise ManifestError(
                f"{where}: found {found} as [noise] and mode {mode}, expected one for shared and site only"
            )
        if (unit == "site") != (mode == "site"):
            raise ManifestError(
                f"{where}: found mode {mode} with unit {unit}, expected the unit site for mode site only"
            )
        if mode == "site" and self.evaluation.personalised:
            raise ManifestError(
                f"{where}: found personalised in [evaluation] and mode site, expected another mode: where whole sites "
                "are the unit there is no model of one"
            )
        # Stops local steps that build on each other: noise that sites share covers only their sum at one model.
        if mode == "shared" and steps != 1:
            raise ManifestError(f"{where}: found mode shared with {steps} local steps, expected 1")

    def _check_images(self, where: str) -> None:
        if not isinstance(self.images, Images):
            return
        names, declared = [one.name for one in self.images.targets], [one.of for one in self.images.augmentation]
        if len(set(names)) != len(names) or len(set(declared)) != len(declared):
            raise ManifestError(f"{where}: a target, or a class of the augmentation, is listed twice in [images]")
        known = {*self.images.targets[0].classes, OTHERS}
        if unknown := sorted(set(declared) - known):
            raise ManifestError(
                f"{where}: found augmentation of {unknown[0]!r} in [images], expected one of {', '.join(sorted(known))}"
            )


def _without_none(value: Any) -> Any:  # noqa: ANN401  any part of a manifest
    """``value`` without the fields that are not there: TOML has no word for them."""
    if isinstance(value, dict):
        return {name: _without_none(field) for name, field in value.items() if field is not None}
    return [_without_none(field) for field in value] if isinstance(value, list | tuple) else value
