"""Bytes <-> messages, strictly: one encoding per message, nothing but these types, no allocation beyond what arrived.

A message is one MessagePack frame; a masked input, and an encrypted aggregate, has its chunks as further raw frames
behind it.  What decodes re-encodes to the same bytes, or it is refused.
"""

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from secureagg import labels
from secureagg.errors import MalformedMessage
from secureagg.identity import Identity, verify
from secureagg.messages import AnyMessage, EncryptedAggregate, MaskedInput, SiteMessage, ToCoordinator, ToSite

HEADER_BYTES: Final = 4 << 20  # a cohort of 1,000 needs a sixteenth of it, or half with 600 neighbours each

_encoder = msgspec.msgpack.Encoder()
_from_site: "msgspec.msgpack.Decoder[ToCoordinator]" = msgspec.msgpack.Decoder(ToCoordinator)
_from_coordinator: "msgspec.msgpack.Decoder[ToSite]" = msgspec.msgpack.Decoder(ToSite)

_Union = TypeVar("_Union", ToCoordinator, ToSite)
_Site = TypeVar("_Site", bound=SiteMessage)


def encode(message: AnyMessage) -> list[bytes]:
    """The frames of ``message``: its MessagePack frame, then its chunks if it has any."""
    if isinstance(message, MaskedInput | EncryptedAggregate):
        return [_encoder.encode(msgspec.structs.replace(message, chunks=())), *message.chunks]
    return [_encoder.encode(message)]


def decode_from_site(frames: Sequence[bytes], *, streamed: bool = False) -> ToCoordinator:
    """The message that a site sent; MalformedMessage for anything but the one encoding of a site's message.

    ``streamed``: the chunks of a masked input come behind it one by one, and not among ``frames``.
    """
    return _decode(_from_site, frames, streamed=streamed)


def decode_from_coordinator(frames: Sequence[bytes]) -> ToSite:
    """The message that the coordinator sent; MalformedMessage for anything but the one encoding of such a message."""
    return _decode(_from_coordinator, frames)


def _decode(decoder: "msgspec.msgpack.Decoder[_Union]", frames: Sequence[bytes], *, streamed: bool = False) -> _Union:
    if not frames:
        raise MalformedMessage("message: no frames")
    header = frames[0]
    # Stops a decoder driven into huge allocations by one frame.
    if len(header) > HEADER_BYTES:
        raise MalformedMessage(f"message: a header of {len(header)} bytes, expected at most {HEADER_BYTES}")
    try:
        message = decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise MalformedMessage(
            f"message: a frame of {len(header)} bytes is not one of the protocol's messages"
        ) from error
    # Stops two encodings of one message: over-long integers, missing defaults, a header that carries chunks.
    if encode(message)[0] != header:
        raise MalformedMessage("message: not in its canonical encoding")
    if isinstance(message, MaskedInput) and not streamed:
        if len(frames) - 1 != len(message.chunk_digests):
            raise MalformedMessage(f"masked input: {len(frames) - 1} chunks, expected {len(message.chunk_digests)}")
        return msgspec.structs.replace(message, chunks=tuple(frames[1:]))
    if isinstance(message, EncryptedAggregate):
        return msgspec.structs.replace(message, chunks=tuple(frames[1:]))
    if len(frames) > 1:
        raise MalformedMessage(f"message: {len(frames)} frames, expected 1")
    return message


def sign(message: _Site, identity: Identity) -> _Site:
    """``message`` with the sender's signature over its type, context, sender and content."""
    return msgspec.structs.replace(message, signature=identity.sign(labels.SIGNATURE, _signed_bytes(message)))


def check_signature(message: SiteMessage, public_key: bytes) -> None:
    """Raise AuthenticationFailed unless ``message`` is signed with the identity behind ``public_key``."""
    who = f"participant {message.sender}, {type(message).__name__}"
    verify(public_key, message.signature, labels.SIGNATURE, _signed_bytes(message), who=who)


def _signed_bytes(message: SiteMessage) -> bytes:
    unsigned = msgspec.structs.replace(message, signature=b"")
    if isinstance(unsigned, MaskedInput):
        unsigned = msgspec.structs.replace(unsigned, chunks=())
    return _encoder.encode(unsigned)
