"""The global model where the coordinator may not see it: every site has a copy and moves it by the sums that it opens.

Copies are named by what they came from and not by what they hold, so that the coordinator, who must know which model a
round is about, learns nothing of it: the first name is the SHA-256 of the initial model, which is public, and each sum
makes the next name of the last one and the sum's digest, which is keyed with a secret of the sites.

A site keeps the model before the last sum as well: a coordinator that goes away while it tells the sites that a round
is finished does not know of that round when it comes back, and all go back to where it is.

A site that missed a sum, or joined late, gets the copy of another site, through the coordinator who cannot open it: it
asks with a fresh key under its signature, and the other one seals its copy to that key (HPKE, RFC 9180) and signs.  It
takes that site's word for what the model is, as everybody takes everybody's word for an update.
"""

from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from secureagg import Aggregate, AuthenticationFailed, MalformedMessage, SiteId
from secureagg.identity import verify
from secureagg.labels import frame
from sites.control import CopyRequest, ModelCopy
from sites.errors import ConfigurationError, ManifestError
from sites.files import PRIVATE_MODE, write_atomic
from sites.keys import Keys
from sites.manifest import Manifest
from sites.model_state import model_digest
from sites.rounds import mean_update, model_spec
from sites.server_optimizer import ServerOptimizer

NAME: Final = b"secureagg/v1/model-name"
REQUEST: Final = b"secureagg/v1/model-request"
COPY: Final = b"secureagg/v1/model-copy"

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def next_name(name: bytes, aggregate_digest: bytes) -> bytes:
    """The name of the model that the one called ``name`` becomes by a sum of this digest: 32 bytes."""
    return sha256(frame(NAME, name, aggregate_digest)).digest()


class _Copy(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is sealed: the model's name, and the server optimizer with the model in it."""

    name: bytes
    optimizer: bytes


class _Stored(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A copy on this site's own disk: under which manifest and rules, of which run, the copy before it, if any, and the
    SHA-256 of both."""

    manifest: bytes
    rules: bytes
    run: str
    copy: bytes
    before: bytes
    digest: bytes


class HeldModel:
    """One site's copy; of no run before ``restore``, ``begin`` or ``open``.  Each change is on disk, in the file
    ``path``, when it returns."""

    def __init__(self, manifest: Manifest, keys: Keys, path: Path) -> None:
        self._manifest = manifest
        self._keys = keys
        self._path = path
        self._before = b""  # a copy of the model before the last sum, empty if there is none
        self._optimizer: ServerOptimizer | None = None
        self._asked: tuple[str, X25519PrivateKey] | None = None
        self.run = ""
        self.name = b""

    @property
    def vector(self) -> npt.NDArray[np.float32]:
        """The model, flat."""
        return self._moved.vector

    @property
    def _moved(self) -> ServerOptimizer:
        if self._optimizer is None:
            raise ManifestError("global model: asked for before this site has a copy")
        return self._optimizer

    def restore(self) -> None:
        """Take up what the file holds, if it is of this consortium; ConfigurationError naming it if it is damaged, when
        this site has no copy."""
        if not self._path.exists():
            return
        try:
            stored = msgspec.msgpack.decode(self._path.read_bytes(), type=_Stored)
            if sha256(stored.copy + stored.before).digest() != stored.digest:
                raise ConfigurationError(f"{self._path}: damaged")
            if self._manifest.continues(stored.manifest, stored.rules):
                self._take(stored.run, stored.copy, who=str(self._path))
                self._before = stored.before
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{self._path}: damaged") from error

    def begin(self, run: str, initial: bytes) -> None:
        """Start ``run`` from the safetensors bytes ``initial``; ManifestError unless they are what all have signed."""
        digest, manifest = model_digest(initial), self._manifest
        # Stops a coordinator that lets this site begin with a model of its own.
        if digest.hex() != manifest.model.initial_sha256:
            raise ManifestError(f"run {run}: another initial model than the one whose SHA-256 the manifest names")
        training = manifest.training
        vector = model_spec(manifest).from_bytes(initial, who="initial model")
        self._optimizer = ServerOptimizer(training.server_optimizer, training.server_learning_rate, vector)
        self.run, self.name, self._before = run, digest, b""
        self._save()

    def move(self, aggregate: Aggregate) -> None:
        """Go on by a training round's sum, which this site has opened."""
        self._before = self._copied
        self._moved.step(mean_update(self._manifest, aggregate))
        self.name = next_name(self.name, aggregate.digest)
        self._save()

    def is_at(self, run: str, name: bytes) -> bool:
        """Whether this site has the model of that name in ``run``; it goes back by one sum if that is where the others
        are."""
        if self._before and run == self.run and name == msgspec.msgpack.decode(self._before, type=_Copy).name:
            self._take(run, self._before, who="the model before the last sum")
            self._before = b""
            self._save()
        return (run, name) == (self.run, self.name)

    # --- for whoever missed a sum ---

    def request(self, run: str) -> CopyRequest:
        """Ask the other sites for their copy in ``run``."""
        private = X25519PrivateKey.generate()
        self._asked = run, private
        key = private.public_key().public_bytes_raw()
        signature = self._keys.identity.sign(REQUEST, *_parts(self._manifest, run, self._keys.site, key))
        return CopyRequest(run=run, site=self._keys.site, key=key, signature=signature)

    def seal(self, request: CopyRequest) -> ModelCopy | None:
        """This site's copy for the one that asks; None in another run.  AuthenticationFailed unless a site of the
        consortium asks."""
        if request.run != self.run:
            return None
        signed = _parts(self._manifest, request.run, request.site, request.key)
        # Stops a coordinator, or anybody else, that asks in a site's name for the model.
        verify(self._signing_key(request.site), request.signature, REQUEST, *signed, who=f"request of {request.site}")
        info = frame(COPY, self._keys.site.encode(), *signed)
        try:
            sealed = _SUITE.encrypt(self._copied, X25519PublicKey.from_public_bytes(request.key), info)
        except ValueError as error:
            raise AuthenticationFailed(f"request of {request.site}: not an X25519 key") from error
        signature = self._keys.identity.sign(COPY, info, sha256(sealed).digest())
        return ModelCopy(site=request.site, donor=self._keys.site, signature=signature, payload=sealed)

    def open(self, copy: ModelCopy) -> None:
        """Take the copy that was asked for; AuthenticationFailed or MalformedMessage, naming who sealed it, for what is
        none."""
        who = f"model of {copy.donor}"
        if self._asked is None:
            raise AuthenticationFailed(f"{who}: not asked for")
        run, private = self._asked
        key = private.public_key().public_bytes_raw()
        info = frame(COPY, copy.donor.encode(), *_parts(self._manifest, run, self._keys.site, key))
        # Stops a model that comes from the coordinator, and one that was sealed for another request, run or site.
        verify(self._signing_key(copy.donor), copy.signature, COPY, info, sha256(copy.payload).digest(), who=who)
        try:
            opened = _SUITE.decrypt(copy.payload, private, info)
        except InvalidTag as error:
            raise AuthenticationFailed(f"{who}: does not open") from error
        self._take(run, opened, who=who)
        self._asked, self._before = None, b""
        self._save()

    # --- copies as bytes ---

    @property
    def _copied(self) -> bytes:
        return msgspec.msgpack.encode(_Copy(self.name, self._moved.to_bytes()))

    def _take(self, run: str, copied: bytes, *, who: str) -> None:
        try:
            copy = msgspec.msgpack.decode(copied, type=_Copy)
        except msgspec.DecodeError as error:
            raise MalformedMessage(f"{who}: not a copy of a model") from error
        training, spec = self._manifest.training, model_spec(self._manifest)
        self._optimizer = ServerOptimizer.from_bytes(
            copy.optimizer, training.server_optimizer, training.server_learning_rate, length=spec.length, who=who
        )
        self.run, self.name = run, copy.name

    def _save(self) -> None:
        copy = self._copied
        digest = sha256(copy + self._before).digest()
        stored = _Stored(self._manifest.digest, self._manifest.rules, self.run, copy, self._before, digest)
        write_atomic(self._path, msgspec.msgpack.encode(stored), mode=PRIVATE_MODE)

    def _signing_key(self, site: str) -> bytes:
        card = self._manifest.roster.get(SiteId(site))
        if card is None:
            raise AuthenticationFailed(f"model copy: {site} is not in the manifest")
        return card.signing_key


def _parts(manifest: Manifest, run: str, site: str, key: bytes) -> tuple[bytes, ...]:
    return manifest.digest, run.encode(), site.encode(), key
