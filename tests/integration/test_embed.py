"""The examples, run as their reader would, against a real coordinator."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.consortium import make_consortium

from dp.chain import verify
from dp.rows import read_ledger
from sites.config import LEDGER
from sites.demo import free_port
from sites.manifest import Policy
from sites.model_state import ModelSpec
from sites.recipe import HOMOMORPHIC, POLICY, PRIVACY, TRAINING

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed.py"
PRIVATE_EXAMPLE = EXAMPLE.with_name("embed_private.py")
HOSPITALS = ("cleveland", "hungary", "va")

needs_tenseal = pytest.mark.skipif(find_spec("tenseal") is None, reason="the extra `homomorphic` is not installed")


@pytest.mark.parametrize(
    ("example", "mode", "policy"),
    [
        (EXAMPLE, "none", POLICY),
        (PRIVATE_EXAMPLE, "local", POLICY),
        pytest.param(PRIVATE_EXAMPLE, "local", HOMOMORPHIC, marks=needs_tenseal),
    ],
    ids=["masked", "private", "homomorphic"],
)
def test_an_example_trains_with_a_real_coordinator(tmp_path: Path, example: Path, mode: str, policy: Policy) -> None:
    """Three copies of an example and a coordinator end without an error, with a model that has moved and that the
    coordinator has only where the sums are for it; with privacy each has booked and sent both rounds, and spent no more
    than its budget."""
    consortium = make_consortium(
        tmp_path,
        names=HOSPITALS,
        address=f"tcp://127.0.0.1:{free_port()}",
        privacy=msgspec.structs.replace(PRIVACY, mode=mode),
        training=msgspec.structs.replace(TRAINING, rounds=2),
        policy=policy,
    )
    commands = {
        "coordinator": [
            *("-m", "sites.cli", "coordinator", str(consortium.manifest_path)),
            *("--keys", str(consortium.coordinator_keys_path), "--initial", str(consortium.initial_path)),
            *("--state", str(tmp_path / "state")),
        ],
        **{name: [str(example), str(consortium.site_configs[name]), name] for name in HOSPITALS},
    }
    processes = {
        name: subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=EXAMPLE.parents[1],
        )
        for name, arguments in commands.items()
    }
    outputs = {name: process.communicate(timeout=150) for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == dict.fromkeys(commands, 0), outputs
    assert {error for _, error in outputs.values()} == {""}
    for name in HOSPITALS:
        assert "round 2 of 2 submitted" in outputs[name][0]
    model = tmp_path / "state" / "model.safetensors"
    assert model.exists() == (policy is POLICY)
    if model.exists():
        data = model.read_bytes()
        assert np.abs(ModelSpec.of_bytes(data, who="model").from_bytes(data, who="model")).max() > 0.01

    for name in HOSPITALS if mode == "local" else ():
        found = verify(read_ledger(consortium.site_configs[name].parent / LEDGER))
        found.check(name)
        assert [entry["kind"] for entry in found.entries] == ["open", *("reserve", "commit", "sent") * 2]
        assert 0 < found.entries[-3]["cumulative_epsilon"] <= PRIVACY.epsilon


def test_the_snippet_of_the_readme_is_in_the_example() -> None:
    """What the README shows of joining a federation are lines of the example, so that the tested code is the shown
    code."""
    readme = (EXAMPLE.parents[1] / "README.md").read_text()
    snippet = readme.split("```python\nfrom sites import join\n")[1].split("```")[0]
    example = EXAMPLE.read_text().replace("join(sys.argv[1])", 'join("SITE.toml")')
    for line in snippet.splitlines():
        bare = line.split("  #")[0].rstrip().replace("train(model)", "train()").replace("len(dataset)", "len(labels)")
        assert bare in example, line
