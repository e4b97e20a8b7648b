"""What a site is held to: hashes of its secrets and of their shares, given before anybody could need to lie.

A share has at least 256 bits of entropy for everyone below the threshold, and so has a seed: their hashes hide them.
With the owner's commitment to each share, a wrong share names its culprit: the holder who reveals another one than it
accepted, or the owner whose shares, each as committed to, do not give the secret.
"""

from typing import Final

from secureagg import labels
from secureagg.errors import AuthenticationFailed
from secureagg.identity import SiteId
from secureagg.parameters import DIGEST_BYTES, RoundParameters

COMMITMENTS_BYTES: Final = 2 * DIGEST_BYTES


def seed_commitment(parameters: RoundParameters, site: SiteId, seed: bytes) -> bytes:
    """SHA-256 commitment to a self seed."""
    return labels.digest(labels.SEED_COMMITMENT, parameters.context, site.encode(), seed)


def secret_commitment(parameters: RoundParameters, site: SiteId, secret: bytes) -> bytes:
    """SHA-256 commitment to what a site gives the others to make the encryption key of."""
    return labels.digest(labels.ENCRYPTION_SECRET, parameters.context, site.encode(), secret)


def share_commitments(
    parameters: RoundParameters, *, owner: SiteId, holder: SiteId, mask_key: bytes, self_seed: bytes
) -> bytes:
    """64 bytes: the commitments to what ``holder`` gets of ``owner``, of the mask key first, then of the self seed."""
    return b"".join(
        _share_commitment(parameters, label, owner, holder, share)
        for label, share in ((labels.MASK_KEY_SHARE, mask_key), (labels.SELF_SEED_SHARE, self_seed))
    )


def check_share_commitments(
    parameters: RoundParameters,
    committed: bytes,
    *,
    owner: SiteId,
    holder: SiteId,
    mask_key: bytes | None = None,
    self_seed: bytes | None = None,
    who: str,
) -> None:
    """Raise AuthenticationFailed naming ``who`` unless each given share is the one that ``owner`` committed to."""
    for label, share, expected in (
        (labels.MASK_KEY_SHARE, mask_key, committed[:DIGEST_BYTES]),
        (labels.SELF_SEED_SHARE, self_seed, committed[DIGEST_BYTES:]),
    ):
        if share is not None and _share_commitment(parameters, label, owner, holder, share) != expected:
            raise AuthenticationFailed(f"{who}: not the share that {owner} committed to for {holder}")


def _share_commitment(parameters: RoundParameters, label: bytes, owner: SiteId, holder: SiteId, share: bytes) -> bytes:
    return labels.digest(label, parameters.context, owner.encode(), holder.encode(), share)
