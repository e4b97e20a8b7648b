"""A small consortium in a folder, signed by all its sites: keys, manifest, initial model and a SITE.toml per site."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sites.config import HeartData, save_config
from sites.datasets.heart import HOSPITALS
from sites.keys import Keys, generate_keys, save_keys
from sites.manifest import Manifest
from sites.recipe import new_manifest
from sites.trainer import initial_heart_model

COORDINATOR = "sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Consortium:
    """What `make_consortium` wrote; ``keys`` by name, the coordinator's among them, ``site_configs`` by site."""

    manifest: Manifest
    manifest_path: Path
    keys: dict[str, Keys]
    coordinator_keys_path: Path
    initial_path: Path
    site_configs: dict[str, Path]


def make_consortium(
    folder: Path,
    *,
    names: Sequence[str] = ("a", "b", "c", "d"),
    address: str = "tcp://127.0.0.1:9",
    hospitals: bool = False,
    initial: bytes | None = None,
    **changes: msgspec.Struct,
) -> Consortium:
    """Write a consortium into ``folder``: `NAME.keys` and `NAME.card`, `manifest.toml`, `initial.safetensors`, and
    `NAME/SITE.toml`, beside which the site's state lies.

    ``hospitals``: the sites are the four heart hospitals, each with its data, instead of ``names``.  ``initial``: the
    safetensors bytes of the initial model, the heart model by default.  ``changes``: tables, by their name in the
    manifest, that replace the recipe's.
    """
    sites = HOSPITALS if hospitals else tuple(names)
    model = initial_heart_model() if initial is None else initial
    keys = {name: generate_keys(name) for name in (COORDINATOR, *sites)}
    paths = {name: save_keys(own, folder)[0] for name, own in keys.items()}
    manifest = new_manifest(
        name="Test",
        coordinator=keys[COORDINATOR].card,
        address=address,
        cards=[keys[name].card for name in sites],
        initial=model,
        changes=changes,
    )
    for name in sites:
        manifest = manifest.sign(keys[name].identity, keys[name].site)
    manifest.check()
    manifest_path, initial_path = folder / "manifest.toml", folder / "initial.safetensors"
    manifest.save(manifest_path)
    initial_path.write_bytes(model)
    site_configs = {name: folder / name / "SITE.toml" for name in sites}
    for name, path in site_configs.items():
        save_config(
            path,
            manifest=manifest,
            manifest_path=manifest_path,
            keys=paths[name],
            site=name,
            data=HeartData(hospital=name) if hospitals else None,
        )
    return Consortium(
        manifest=manifest,
        manifest_path=manifest_path,
        keys=keys,
        coordinator_keys_path=paths[COORDINATOR],
        initial_path=initial_path,
        site_configs=site_configs,
    )
