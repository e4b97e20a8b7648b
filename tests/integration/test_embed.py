"""examples/embed.py, run as its reader would, against a real coordinator."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
from support.consortium import make_consortium

from sites.demo import free_port
from sites.model_state import ModelSpec
from sites.recipe import PRIVACY, TRAINING

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed.py"


def test_the_example_trains_with_a_real_coordinator(tmp_path: Path) -> None:
    """Three copies of the example and a coordinator end without an error, with a model that has moved."""
    hospitals = ("cleveland", "hungary", "va")
    consortium = make_consortium(
        tmp_path,
        names=hospitals,
        address=f"tcp://127.0.0.1:{free_port()}",
        privacy=msgspec.structs.replace(PRIVACY, mode="none"),
        training=msgspec.structs.replace(TRAINING, rounds=2),
    )
    commands = {
        "coordinator": [
            *("-m", "sites.cli", "coordinator", str(consortium.manifest_path)),
            *("--keys", str(consortium.coordinator_keys_path), "--initial", str(consortium.initial_path)),
            *("--state", str(tmp_path / "state")),
        ],
        **{name: [str(EXAMPLE), str(consortium.site_configs[name]), name] for name in hospitals},
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
    for name in hospitals:
        assert "round 2 of 2 submitted\nthe global model gives 0." in outputs[name][0]
    data = (tmp_path / "state" / "model.safetensors").read_bytes()
    assert np.abs(ModelSpec.of_bytes(data, who="model").from_bytes(data, who="model")).max() > 0.01


def test_the_snippet_of_the_readme_is_in_the_example() -> None:
    """What the README shows of joining a federation are lines of the example, so that the tested code is the shown
    code."""
    readme = (EXAMPLE.parents[1] / "README.md").read_text()
    snippet = readme.split("```python\nfrom sites import join\n")[1].split("```")[0]
    example = EXAMPLE.read_text().replace("join(sys.argv[1])", 'join("SITE.toml")')
    for line in snippet.splitlines():
        bare = line.split("  #")[0].rstrip().replace("train(model)", "train()").replace("len(dataset)", "len(labels)")
        assert bare in example, line
