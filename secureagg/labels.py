"""Every domain-separation label of the protocol, in one place, so that two purposes can never share one.

A label is the first input of each hash, key derivation and signature.  All start with the protocol version;
inputs that follow a label are length-prefixed (``frame``), so no two different lists of inputs give the same bytes.
"""

from hashlib import sha256
from typing import Final

VERSION: Final = b"secureagg/v1"

CONTEXT: Final = VERSION + b"/context"
PARAMETERS: Final = VERSION + b"/parameters"
ROSTER: Final = VERSION + b"/roster"
CARD: Final = VERSION + b"/card"
SIGNATURE: Final = VERSION + b"/signature"
SURVIVORS: Final = VERSION + b"/survivors"
CHANNEL: Final = VERSION + b"/channel"
SHARE: Final = VERSION + b"/share"
PAIRWISE_MASK: Final = VERSION + b"/pairwise-mask"
SELF_MASK: Final = VERSION + b"/self-mask"
SEED_COMMITMENT: Final = VERSION + b"/seed-commitment"
MASK_KEY_SHARE: Final = VERSION + b"/mask-key-share"
SELF_SEED_SHARE: Final = VERSION + b"/self-seed-share"
ENCRYPTION_KEY: Final = VERSION + b"/encryption-key"
ENCRYPTION_SECRET: Final = VERSION + b"/encryption-secret"
DIGEST_KEY: Final = VERSION + b"/digest-key"
AGGREGATE: Final = VERSION + b"/aggregate"
OPENED_AGGREGATE: Final = VERSION + b"/opened-aggregate"


def frame(*parts: bytes) -> bytes:
    """Join ``parts`` so that they can be told apart again: each is preceded by its length as 8 bytes, little-endian."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def digest(*parts: bytes | memoryview) -> bytes:
    """SHA-256 of ``frame(*parts)``, without a copy of long parts."""
    hashed = sha256()
    for part in parts:
        hashed.update(memoryview(part).nbytes.to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()
