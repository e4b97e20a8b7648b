"""Errors of a site or a coordinator as a program: which file, field or machine, what was found, what was expected."""

from typing import ClassVar


class SiteError(Exception):
    """Base of the errors of this package; never raised itself."""

    code: ClassVar[str] = "site"


class ConfigurationError(SiteError):
    """A configuration file, folder or option cannot be used."""

    code = "configuration"


class KeyFileError(SiteError):
    """A file with keys is missing, malformed, exposed to others, or would be overwritten."""

    code = "key-file"


class ManifestError(SiteError):
    """A manifest is malformed, altered, not signed by all, or not the one that this site has pinned."""

    code = "manifest"


class DatasetError(SiteError):
    """A data set is missing, altered or not what the trainer can use."""

    code = "dataset"


class FederationFailed(SiteError):
    """The federation ended early; what was reached until then is kept."""

    code = "federation-failed"
