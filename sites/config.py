"""One hospital's own configuration (SITE.toml), and everything that must hold before it takes part."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import tomli_w

from dp.budget import PrivacyBudget
from secureagg import SiteId
from sites.errors import ConfigurationError, ManifestError
from sites.files import write_atomic
from sites.keys import Keys, load_keys
from sites.manifest import Manifest

LEDGER: Final = "ledger.sqlite"


class _Privacy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="mode"):
    """Base of the modes of privacy that a site may ask for."""


class BoundedPrivacy(_Privacy, frozen=True):
    """The most that this site ever spends on its data, over all runs and consortia: ``epsilon`` at ``delta``."""

    epsilon: Annotated[float, msgspec.Meta(gt=0, le=1e9)]
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)]


class LocalPrivacy(BoundedPrivacy, frozen=True, tag="local"):
    """This site's own noise must protect its patients, whatever the others do."""


class SharedPrivacy(BoundedPrivacy, frozen=True, tag="shared"):
    """Noise that the sites share may protect its patients, too: against the coordinator and a few sites, not all."""


class SitePrivacy(BoundedPrivacy, frozen=True, tag="site"):
    """The whole site must be the unit."""


class NoPrivacy(_Privacy, frozen=True, tag="none"):
    """This site agrees to training without differential privacy; it has to say so."""


OwnPrivacy = LocalPrivacy | SharedPrivacy | SitePrivacy | NoPrivacy
# What protects no less than what a site asks for: noise of its own protects from more, a whole site is more.
_AS_GOOD: Final = {"local": {"local"}, "shared": {"shared", "local", "site"}, "site": {"site"}}


class OwnPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stricter rules than the consortium's; ``minimum_survivors`` 0 adds none."""

    minimum_survivors: Annotated[int, msgspec.Meta(ge=0)] = 0


class HeartData(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="heart"):
    """Train on the ``hospital``'s part of the heart data, from ``folder`` or the wheel."""

    hospital: str
    folder: str = ""


class DicomData(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="dicom"):
    """Train on the DICOM files below ``folder``, as the manifest's [images] says, with the targets in the CSV
    ``labels``.

    ``merges``: CSV of patients with several numbers.  ``index``: folder of the index and of the secret behind patients'
    pseudonyms, by default the state folder; a site in several consortia names the same one in each SITE.toml, so that
    the same patients are trained on in each.  ``keep_derived``, ``keep_suspected_text``: see ``Limits``.
    """

    folder: str
    labels: str
    merges: str = ""
    index: str = ""
    keep_derived: bool = False
    keep_suspected_text: bool = False


OwnData = HeartData | DicomData


class Personalisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """After a run, train the final model on for ``steps`` on this site's own patients, for this site alone.

    ``epsilon`` at ``delta``: what that may cost beside the run, within what [privacy] allows in all; ``batch_size``:
    patients in a step, as expected.
    """

    epsilon: Annotated[float, msgspec.Meta(gt=0, le=1e9)]
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    steps: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    batch_size: Annotated[int, msgspec.Meta(ge=1)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class SiteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of SITE.toml; paths are relative to its folder.  ``data`` is absent when the training is embedded.

    ``ledger``: the record of what was released from the data, `ledger.sqlite` in the state folder by default.  A site
    that takes part in several consortia with the same data names the same file in each SITE.toml.
    """

    name: str
    manifest: str
    manifest_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}\\Z")]
    keys: str
    state: str
    privacy: OwnPrivacy
    ledger: str | None = None
    policy: OwnPolicy = OwnPolicy()
    data: OwnData | None = None
    personalisation: Personalisation | None = None


def load_config(path: Path) -> SiteConfig:
    """The fields of a SITE.toml; ConfigurationError naming file and field for anything that is not one."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), SiteConfig)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: not a TOML file: {error}") from error


def save_config(
    path: Path, *, manifest: Manifest, manifest_path: Path, keys: Path, site: str, data: OwnData | None
) -> None:
    """Write the SITE.toml of ``site`` that pins ``manifest``; state lies beside it.

    A new file takes the manifest's privacy bounds for those of the data's lifetime.  One that is there keeps its own,
    and all else that is the site's to decide: signing a manifest, whatever it says, never raises what the data may
    cost.
    """
    offered, folder = manifest.privacy, path.parent
    bounds = {} if offered.mode == "none" else {"epsilon": offered.epsilon, "delta": offered.delta}
    accepted = msgspec.convert({"mode": offered.mode, **bounds}, OwnPrivacy)
    decided = load_config(path) if path.exists() else None
    if decided is None:
        decided = SiteConfig(name=site, manifest="", manifest_sha256="0" * 64, keys="", state=".", privacy=accepted)
    config = msgspec.structs.replace(
        decided,
        name=site,
        manifest=os.path.relpath(manifest_path, folder),
        manifest_sha256=manifest.digest.hex(),
        keys=os.path.relpath(keys, folder),
        data=decided.data if data is None else data,
    )
    fields = {name: value for name, value in msgspec.to_builtins(config).items() if value is not None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be made: {error.strerror}") from error
    write_atomic(path, tomli_w.dumps(fields).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSite:
    """A site whose configuration, keys and manifest have been checked against each other."""

    name: SiteId
    config: SiteConfig
    folder: Path
    keys: Keys
    manifest: Manifest

    @property
    def state(self) -> Path:
        """Folder of the journal, the summary and, unless it is elsewhere, the privacy ledger."""
        return self.folder / self.config.state

    @property
    def ledger(self) -> Path:
        """File of the privacy ledger; a unit of its own has one of its own."""
        unit = self.manifest.privacy.unit
        own = self.state / (LEDGER if unit == "patient" else f"ledger.{unit}.sqlite")
        return self.folder / self.config.ledger if self.config.ledger else own

    @property
    def budget(self) -> PrivacyBudget | None:
        """What the data may ever cost, which is this site's own decision; the manifest says what a run may."""
        own = self.config.privacy
        return PrivacyBudget(own.epsilon, own.delta) if isinstance(own, BoundedPrivacy) else None

    @property
    def minimum_survivors(self) -> int:
        """This site's own minimum, 0 for none."""
        return self.config.policy.minimum_survivors


def open_site(path: Path) -> OpenSite:
    """Load a SITE.toml and check it, the keys and the manifest; nothing is sent before this has returned.

    Raises ConfigurationError, KeyFileError or ManifestError, naming the file, what was found and what was expected.
    """
    config = load_config(path)
    folder = path.parent
    keys = load_keys(folder / config.keys)
    manifest = Manifest.load(folder / config.manifest)
    manifest.check()
    # Stops a manifest that was exchanged for another one, even if all have signed that too.
    if manifest.digest.hex() != config.manifest_sha256:
        raise ManifestError(
            f"{folder / config.manifest}: digest {manifest.digest.hex()[:16]}..., expected the pinned "
            f"{config.manifest_sha256[:16]}... of {path}; sign the new manifest if the change is meant"
        )
    listed = manifest.roster.get(SiteId(config.name))
    if listed is None:
        raise ManifestError(f"{folder / config.manifest}: does not list site {config.name}")
    if keys.site != config.name or listed != keys.card:
        raise ManifestError(
            f"{folder / config.keys}: keys of {keys.site}, expected the ones that the manifest lists for {config.name}"
        )
    # Stops a consortium whose guarantee is weaker than this site's own policy.
    offered, own = manifest.privacy, config.privacy
    if isinstance(own, BoundedPrivacy):
        mode = str(own.__struct_config__.tag)
        if offered.mode not in _AS_GOOD[mode]:
            raise ManifestError(
                f"{folder / config.manifest}: differential privacy: {offered.mode}, expected mode "
                f"{' or '.join(sorted(_AS_GOOD[mode]))}, since {path} says {mode}"
            )
        if offered.epsilon > own.epsilon or offered.delta > own.delta:
            raise ManifestError(
                f"{folder / config.manifest}: differential privacy: up to epsilon {offered.epsilon:g} at delta "
                f"{offered.delta:g}, expected at most the epsilon {own.epsilon:g} at delta {own.delta:g} that {path} "
                "allows"
            )
    return OpenSite(name=keys.site, config=config, folder=folder, keys=keys, manifest=manifest)
