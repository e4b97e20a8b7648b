"""What the two loops say to each other around a round, and how it shares a connection with the round's own messages.

The first frame of every delivery is a one-byte tag: a control message (MessagePack, then at most one raw frame, the
global model), a message of the secure aggregation protocol, or one chunk of a masked input, which so never travels as
one long message.  Nothing here is trusted for security: a site checks every number against its own manifest, and the
round's context binds what it uses.
"""

from collections.abc import Sequence
from typing import Final, Literal, TypeVar

import msgspec

from secureagg import MalformedMessage

CONTROL: Final = b"C"
ROUND: Final = b"R"
CHUNK: Final = b"K"
HEADER_BYTES: Final = 1 << 20
MANIFEST_DIFFERS: Final = "manifest-differs"

Purpose = Literal["train", "evaluate", "personalise", "census"]


class Control(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the control messages; ``payload`` travels as a raw frame behind the header."""

    payload: bytes = b""


class Hello(Control, frozen=True, tag="hello", array_like=True, kw_only=True):
    """Site: present and ready for the next round, under the manifest of this digest."""

    manifest_digest: bytes


class Withdraw(Control, frozen=True, tag="withdraw", array_like=True, kw_only=True):
    """Site: takes no further part in a round; ``leaving``: nor in later ones."""

    run: str
    round_number: int
    leaving: bool


class StartRound(Control, frozen=True, tag="start-round", array_like=True, kw_only=True):
    """Coordinator: a round begins with this cohort; the payload is the global model.

    ``model_name``: empty, or where the sites hold the model (see ``held_model``) the name of the one that the round is
    about; the payload is the initial model then, or nothing.
    """

    run: str
    round_number: int
    purpose: Purpose
    cohort: tuple[str, ...]
    model_name: bytes = b""


class CopyRequest(Control, frozen=True, tag="copy-request", array_like=True, kw_only=True):
    """A site: asks for the model that the others hold, to be sealed to this X25519 key; the coordinator passes it on to
    one of them."""

    run: str
    site: str
    key: bytes
    signature: bytes


class ModelCopy(Control, frozen=True, tag="model-copy", array_like=True, kw_only=True):
    """The ``donor``: its copy of the model, sealed for ``site``; the coordinator passes it on."""

    site: str
    donor: str
    signature: bytes


class GivenUp(Control, frozen=True, tag="given-up", array_like=True, kw_only=True):
    """Coordinator: this site is a dropout of a round that goes on; what it has not sent yet is of no use."""

    run: str
    round_number: int


class FederationOver(Control, frozen=True, tag="federation-over", array_like=True, kw_only=True):
    """Coordinator: no further rounds; the payload is the final global model, or ``model_name`` its name where the sites
    hold it.  ``code``: "finished", or an error's."""

    code: str
    model_name: bytes = b""


class Refused(Control, frozen=True, tag="refused", array_like=True, kw_only=True):
    """Coordinator: this site cannot take part; ``code`` says why in a word."""

    code: str


FromSite = Hello | Withdraw | CopyRequest | ModelCopy
FromCoordinator = StartRound | GivenUp | FederationOver | Refused | CopyRequest | ModelCopy

_Message = TypeVar("_Message", FromSite, FromCoordinator)

_encoder = msgspec.msgpack.Encoder()
_from_site: "msgspec.msgpack.Decoder[FromSite]" = msgspec.msgpack.Decoder(FromSite)
_from_coordinator: "msgspec.msgpack.Decoder[FromCoordinator]" = msgspec.msgpack.Decoder(FromCoordinator)


def encode(message: FromSite | FromCoordinator) -> list[bytes]:
    """The frames of a control message, its tag first."""
    return [CONTROL, _encoder.encode(msgspec.structs.replace(message, payload=b"")), message.payload]


def decode_from_site(frames: Sequence[bytes]) -> FromSite:
    """A site's control message from the frames behind the tag; MalformedMessage for anything else."""
    return _decode(_from_site, frames, "a site")


def decode_from_coordinator(frames: Sequence[bytes]) -> FromCoordinator:
    """The coordinator's control message from the frames behind the tag; MalformedMessage for anything else."""
    return _decode(_from_coordinator, frames, "a coordinator")


def encode_chunk(context: bytes, chunk: bytes) -> list[bytes]:
    """The frames of one chunk of the masked input that was sent last, its tag first; ``context``: of its round."""
    return [CHUNK, context, chunk]


def decode_chunk(frames: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Context and chunk from the frames behind the tag; MalformedMessage for another number of frames."""
    if len(frames) != 2:
        raise MalformedMessage(f"chunk: {len(frames)} frames, expected a context and a chunk")
    return frames[0], frames[1]


def _decode(decoder: "msgspec.msgpack.Decoder[_Message]", frames: Sequence[bytes], sender: str) -> _Message:
    if len(frames) != 2 or len(frames[0]) > HEADER_BYTES:
        raise MalformedMessage(f"control message: {len(frames)} frames, expected a header and a payload")
    header, payload = frames
    try:
        message = decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise MalformedMessage(f"control message: not one that {sender} sends") from error
    # Stops two encodings of one message: over-long integers, missing defaults, a payload inside the header.
    if message.payload or _encoder.encode(message) != header:
        raise MalformedMessage("control message: not in its canonical encoding")
    return msgspec.structs.replace(message, payload=payload)
