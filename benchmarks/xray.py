"""How good models of X-rays are when a patient has three images: the demo's recipes over several seeds.

    python -m benchmarks xray --npz pneumoniamnist.npz [--seeds N] [--modes none local shared] [--validation]

Seven hospitals (``sites.xray_studies``) train by the sites' own trainers in one process, with ledgers, clipping, noise
and encoding as they are; sums are added modulo the ring here, which is what a secure sum opens, and every hospital
survives every round.  AUC is that of the 624 test images; with ``--validation`` it is that of the file's validation
images, which nobody trains on either, and of the same moved, blurred, noised and zoomed; choices are made there.
"alone": each hospital's own model by the recipe of mode local (or none), the mean over hospitals; "pooled": all
patients in one place, by the recipe of mode none.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch.nn import functional

from benchmarks.record import commit
from dp.ledger import Ledger
from dp.shared import decode
from secureagg.identity import Identity
from secureagg.testing import CountingEntropy
from sites.demo_data import XRAY_IMAGES, XRAY_PLAN, XrayDemo, xray_recipe
from sites.keys import generate_keys
from sites.manifest import Images, Manifest, Privacy, Training
from sites.model_state import ModelSpec, State
from sites.models import image_model, initial_image_model
from sites.recipe import new_manifest
from sites.reference import pool_sites, state_alone
from sites.server_optimizer import ServerOptimizer
from sites.site_data import SiteData, learnt_from, through
from sites.trainer import Examples, LocalTrainer, SharedTrainer, TrainerOptions, predict
from sites.xray_studies import HOSPITALS, XrayPart, load_xrays

MODES = ("none", "local", "shared")


def examples_of(part: XrayPart) -> Examples:
    """A hospital's rows as its DICOM files would give them."""
    pixels = (part.images.astype(np.float32) / 255 - XRAY_PLAN.mean) / XRAY_PLAN.deviation
    return Examples(
        features=torch.from_numpy(pixels[:, None].astype(np.float32)),
        targets=torch.from_numpy(part.labels.astype(np.float32)),
        patients=part.patients.tolist(),
    )


def site_of(name: str, part: XrayPart, images: Images, seed: int) -> SiteData:
    """A hospital as its own program would have it, all of its patients to train on."""
    model = image_model(images, seed=seed)
    return learnt_from(images, model, dataset=name, data=examples_of(part), held_out=None)


def consortium(images: Images, training: Training, privacy: Privacy) -> Manifest:
    """An unsigned manifest, for its noise."""
    cards = {name: generate_keys(name).card for name in ("sum", *HOSPITALS)}
    return new_manifest(
        name="benchmark",
        coordinator=cards["sum"],
        address="tcp://127.0.0.1:9",
        cards=[cards[name] for name in HOSPITALS],
        initial=initial_image_model(images),
        changes={"images": images, "training": training, "privacy": privacy},
        noise=XrayDemo.noise,
    )


def federated(found: Mapping[str, SiteData], manifest: Manifest, *, seed: int) -> State:
    """The model after a whole run of all sites."""
    training, privacy, plan = manifest.training, manifest.privacy, manifest.noise_plan
    model = next(iter(found.values())).model
    spec = ModelSpec.of({name: tensor.shape for name, tensor in sorted(model.state_dict().items())})
    start = spec.flatten(model.state_dict(), who="model")
    server = ServerOptimizer(training.server_optimizer, training.server_learning_rate, start)
    with tempfile.TemporaryDirectory() as folder:
        trainers = []
        for name, one in found.items():
            options: TrainerOptions = {
                "name": name,
                "model": one.model,
                "data": one.data,
                "training": training,
                "privacy": privacy,
                "loss": one.loss,
                "max_rows_per_patient": one.max_rows_per_patient,
                "augmentation": one.augmentation,
                "entropy": CountingEntropy(f"{privacy.mode} {seed} {name}".encode()),
            }
            if privacy.mode != "none":
                path = Path(folder) / f"{name}.sqlite"
                options["ledger"] = Ledger(path, dataset=name, unit=privacy.unit, site=name, signer=Identity.generate())
            made = LocalTrainer(**options) if plan is None else SharedTrainer(noise=plan, spec=spec, **options)
            trainers.append(made)
        for number in range(1, training.rounds + 1):
            state = spec.restore(server.vector)
            results = [trainer.train(state, run="run", round_number=number) for trainer in trainers]
            if plan is None:
                weights = np.array([result.examples for result in results], np.float64)
                vectors = [spec.flatten(result.state, who="x").astype(np.float64) for result in results]
                update = np.average(vectors, axis=0, weights=weights) - server.vector
            else:
                opened = np.zeros(spec.length, np.uint64)
                for result in results:
                    opened += result.elements
                update = -training.learning_rate * decode(opened, plan) / training.batch_size
            server.step(update)
        for trainer in trainers:
            trainer.close()
    return spec.restore(server.vector)


def shown_differently(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images as they are, and as other devices and other hands would have made them."""

    def moved(down: int, right: int) -> torch.Tensor:
        padded = functional.pad(features, (4, 4, 4, 4), mode="replicate")
        return padded[:, :, 4 + down : 32 + down, 4 + right : 32 + right]

    def zoomed(scale: float) -> torch.Tensor:
        matrix = torch.tensor([[scale, 0, 0], [0, scale, 0]]).expand(len(features), 2, 3)
        grid = functional.affine_grid(matrix, list(features.shape), align_corners=False)
        return functional.grid_sample(features, grid, padding_mode="border", align_corners=False)

    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(features.shape).astype(np.float32))
    return {
        "as they are": features,
        "moved": moved(3, -3),
        "moved back": moved(-3, 2),
        "blurred": functional.avg_pool2d(functional.pad(features, (1, 1, 1, 1), mode="replicate"), 3, 1),
        "noised": features + 0.32 * noise,
        "zoomed in": zoomed(0.85),
        "zoomed out": zoomed(1.15),
    }


def judged(found: SiteData, state: State, test: Examples, *, validation: bool) -> dict[str, float]:
    """AUC, and balanced accuracy at 0.5; on validation images also the mean AUC over all ways of showing them."""
    labels = test.targets.numpy()
    scores = predict(found.model, state, through(found.front, test).features)
    values = {
        "AUC": float(roc_auc_score(labels, scores)),
        "balanced accuracy": float(balanced_accuracy_score(labels, scores >= 0.5)),
    }
    if validation:
        every = [replace(test, features=one) for one in shown_differently(test.features).values()]
        seen = [through(found.front, one).features for one in every]
        each = [roc_auc_score(labels, predict(found.model, state, one)) for one in seen]
        values["AUC, shown differently"] = float(np.mean(each))
    return values


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--alone", action="store_true", help="also each hospital alone, and all in one place")
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--training", default="{}", help="fields of [training] to change, as JSON, to choose")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = load_xrays(asked.npz)
    test = examples_of(parts["test"])
    if asked.validation:
        with np.load(asked.npz) as arrays:
            labels = arrays["val_labels"].reshape(-1).astype(np.int64)
            test = examples_of(XrayPart(images=arrays["val_images"], labels=labels, patients=np.arange(len(labels))))
    report: dict = {"commit": commit(), "judged on": "validation" if asked.validation else "test", "columns": {}}
    began = time.monotonic()
    for seed in range(asked.seeds):
        for mode in asked.modes:
            training, privacy = xray_recipe(mode)
            training = msgspec.convert({**msgspec.to_builtins(training), **json.loads(asked.training)}, Training)
            images = XRAY_IMAGES
            if asked.model is not None:
                images = msgspec.structs.replace(images, model=asked.model)
            found = {name: site_of(name, parts[name], images, seed) for name in HOSPITALS}
            manifest = consortium(images, training, privacy)
            first = next(iter(found.values()))
            state = federated(found, manifest, seed=seed)
            columns = {mode: [judged(first, state, test, validation=asked.validation)]}
            if asked.alone and mode != "shared":
                entropy = CountingEntropy(f"alone {mode} {seed}".encode())
                columns[f"alone, {mode}"] = [
                    judged(
                        one,
                        state_alone(one, training=training, privacy=privacy, entropy=entropy),
                        test,
                        validation=asked.validation,
                    )
                    for one in found.values()
                ]
            if asked.alone and mode == "none":  # whose steps are of all patients, however many
                together = pool_sites(found)
                pooled = state_alone(together, training=training, privacy=privacy)
                columns["pooled, none"] = [judged(together, pooled, test, validation=asked.validation)]
            for column, values in columns.items():
                entry = {"model": images.model, "training": msgspec.to_builtins(training), "values": []}
                entry = report["columns"].setdefault(column, entry)
                entry["values"].append(values)
                means = {name: statistics.fmean(value[name] for value in values) for name in values[0]}
                text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
                print(f"seed {seed}, {column} ({images.model}): {text}, {time.monotonic() - began:.0f} s", flush=True)
        for entry in report["columns"].values():
            aucs = [statistics.fmean(value["AUC"] for value in values) for values in entry["values"]]
            deviation = statistics.stdev(aucs) if len(aucs) > 1 else 0.0
            entry["AUC"] = {"mean": statistics.fmean(aucs), "sd": deviation}
        report["seeds"], report["seconds"] = seed + 1, round(time.monotonic() - began)
        if asked.json is not None:
            asked.json.write_text(json.dumps(report, indent=1) + "\n")
    for column, entry in report["columns"].items():
        print(f"{column}: AUC {entry['AUC']['mean']:.3f} ± {entry['AUC']['sd']:.3f}")


if __name__ == "__main__":
    main()
