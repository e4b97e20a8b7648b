"""The server's step is the one that the manifest names, to the number."""

import msgspec
import numpy as np
import pytest

from secureagg import ParameterError, ShapeMismatch
from sites import recipe
from sites.manifest import Training
from sites.server_optimizer import NAMES, ServerOptimizer

START = np.array([1.0, -2.0, 0.5, 0.0], np.float32)
FIRST = np.array([0.25, -0.5, 1e-4, 3.0])
SECOND = np.array([-0.125, 0.75, 2e-3, -1.0])


def test_average_adds_the_mean_update():
    """Plain averaging at rate 1 adds the mean update exactly, as often as it steps."""
    generator = np.random.default_rng(1)
    expected = generator.normal(size=1000).astype(np.float32)
    server = ServerOptimizer("average", 1.0, expected)
    for _ in range(3):
        update = generator.normal(size=1000)
        expected = expected + update.astype(np.float32)
        assert server.step(update).tolist() == expected.tolist()


def test_average_at_another_rate():
    """The server's learning rate scales the mean update."""
    assert ServerOptimizer("average", 0.5, START).step(FIRST) == pytest.approx(START + 0.5 * FIRST, rel=1e-6)


def test_momentum_by_hand():
    """FedAvgM: the velocity keeps 0.9 of the former one and adds the mean update."""
    server, rate = ServerOptimizer("momentum", 0.5, START), 0.5
    first = START + rate * FIRST
    assert server.step(FIRST) == pytest.approx(first, rel=1e-6, abs=1e-6)
    assert server.step(SECOND) == pytest.approx(first + rate * (0.9 * FIRST + SECOND), rel=1e-6, abs=1e-6)


def test_adam_by_hand():
    """FedAdam: bias-corrected moments with 0.9 and 0.99, and 0.001 beside the root."""
    server, rate = ServerOptimizer("adam", 0.1, START), 0.1
    expected, mean, square = START.astype(np.float64), np.zeros(4), np.zeros(4)
    for number, update in enumerate((FIRST, SECOND), start=1):
        mean = 0.9 * mean + 0.1 * update
        square = 0.99 * square + 0.01 * update**2
        expected = expected + rate * (mean / (1 - 0.9**number)) / (np.sqrt(square / (1 - 0.99**number)) + 1e-3)
        assert server.step(update) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_vector_is_a_copy(name):
    """Nobody moves the global model but by a step: neither through what was given nor through what was returned."""
    given = START.copy()
    server = ServerOptimizer(name, 1.0, given)
    given[:] = 99
    server.vector[:] = 99
    assert server.vector.tolist() == START.tolist()
    stepped = server.step(FIRST)
    kept = stepped.copy()
    stepped[:] = 99
    assert server.vector.tolist() == kept.tolist()
    update = SECOND.copy()
    server.step(update)
    assert update.tolist() == SECOND.tolist()
    assert kept.dtype == np.float32


def test_an_unknown_name():
    """An unknown optimizer is refused with the names of the known ones."""
    with pytest.raises(ParameterError, match="found 'lamb', expected one of average, momentum, adam"):
        ServerOptimizer("lamb", 1.0, START)


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_allows_the_same_names(name):
    """Every optimizer that exists can be named in a manifest."""
    fields = {**msgspec.to_builtins(recipe.TRAINING), "server_optimizer": name}
    assert msgspec.convert(fields, Training).server_optimizer == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_goes_on_where_it_was_saved(name: str, steps: int):
    """Saved and read back, before its first step too, it makes the same steps as if nothing had happened."""
    server = ServerOptimizer(name, 0.5, START)
    for _ in range(steps):
        server.step(FIRST)
    again = ServerOptimizer.from_bytes(server.to_bytes(), name, 0.5, length=4, who="saved")
    assert again.vector.tolist() == server.vector.tolist()
    assert again.step(SECOND).tolist() == server.step(SECOND).tolist()


def test_what_is_no_saved_optimizer():
    """Bytes of something else, and a model of another length, are refused with the name of whoever gave them."""
    longer = ServerOptimizer("adam", 0.5, np.zeros(5, np.float32))
    longer.step(np.ones(5))
    with pytest.raises(ShapeMismatch, match=r"saved: found tensors of \[\(5,\)\], expected float32 \(4,\)"):
        ServerOptimizer.from_bytes(longer.to_bytes(), "adam", 0.5, length=4, who="saved")
    with pytest.raises(ShapeMismatch, match="saved: not a server optimizer"):
        ServerOptimizer.from_bytes(b"x" * 100, "adam", 0.5, length=4, who="saved")
