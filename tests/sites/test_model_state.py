"""A model's tensors, its flat vector and its bytes are the same numbers; anything else is refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from secureagg import ParameterError, ShapeMismatch
from sites.model_state import ModelSpec, model_digest

SPEC = ModelSpec.of({"weight": (2, 3), "bias": (2,), "scale": ()})
VECTOR = np.arange(9, dtype=np.float32)

shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
specs = st.dictionaries(st.text("abc.0_", min_size=1, max_size=8), shapes, min_size=1, max_size=5).map(ModelSpec.of)
floats = st.floats(width=32)


@st.composite
def models(draw):
    """A specification and a vector of its length, special numbers included."""
    spec = draw(specs)
    return spec, draw(hnp.arrays(np.float32, spec.length, elements=floats))


def state(**changes):
    """The tensors of SPEC; None takes one away."""
    tensors = {**SPEC.restore(VECTOR), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@given(models())
def test_round_trips(model):
    """Vector to tensors to vector, and vector to bytes to vector, change no bit, NaN and zeros included."""
    spec, vector = model
    restored = spec.restore(vector)
    assert {name: tuple(tensor.shape) for name, tensor in restored.items()} == dict(spec.tensors)
    for again in (spec.flatten(restored, who="x"), spec.from_bytes(spec.to_bytes(vector), who="x")):
        assert again.dtype == np.float32
        assert again.tobytes() == vector.tobytes()


@given(models())
def test_the_bytes_are_determined(model):
    """The same model always has the same bytes, so that everybody arrives at the same digest."""
    spec, vector = model
    turned = ModelSpec(tuple(reversed(spec.tensors)))
    data = spec.to_bytes(vector)
    assert spec.to_bytes(vector) == data
    assert turned.to_bytes(turned.flatten(spec.restore(vector), who="x")) == data
    assert model_digest(data) == model_digest(bytes(data))


def test_the_order_is_the_specification_s():
    """Tensors lie in the vector in the order of the specification, row by row, whatever order they are given in."""
    given_in_reverse = dict(reversed(list(state().items())))
    assert SPEC.flatten(given_in_reverse, who="x").tolist() == list(range(9))
    assert state()["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert state()["bias"].tolist() == [6, 7]
    assert state()["scale"].item() == 8
    assert SPEC.length == 9


def test_the_tensors_of_a_file():
    """The specification of a safetensors file has its tensors' names and shapes."""
    assert dict(ModelSpec.of_bytes(SPEC.to_bytes(VECTOR), who="x").tensors) == dict(SPEC.tensors)


def test_the_bytes_are_a_safetensors_file():
    """Any program that reads safetensors finds the tensors under their names."""
    arrays = load(SPEC.to_bytes(VECTOR))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        name: tensor.tolist() for name, tensor in state().items()
    }


def test_tensors_as_a_model_has_them():
    """Parameters that need a gradient and views that are not contiguous are flattened by their values."""
    module = torch.nn.Linear(3, 2)
    parameters = {"weight": module.weight, "bias": module.bias, "scale": torch.tensor(1.0)}
    assert SPEC.flatten(parameters, who="x")[:6].tolist() == module.weight.detach().reshape(-1).tolist()
    transposed = torch.arange(6, dtype=torch.float32).reshape(3, 2).T
    assert SPEC.flatten(state(weight=transposed), who="x")[:6].tolist() == [0, 2, 4, 1, 3, 5]


def test_restored_tensors_are_copies():
    """Neither the vector nor the tensors change with the other."""
    vector = VECTOR.copy()
    restored = SPEC.restore(vector)
    restored["weight"] += 100
    assert vector.tolist() == VECTOR.tolist()
    vector[:] = -1
    assert restored["bias"].tolist() == [6, 7]


def test_a_flat_vector_is_a_copy():
    """The vector does not change with the tensors it was made of."""
    tensors = state()
    vector = SPEC.flatten(tensors, who="x")
    tensors["weight"] += 100
    assert vector.tolist() == VECTOR.tolist()


BAD_STATES = {
    "missing": (state(bias=None), r"tensor bias is missing, expected 3 tensors"),
    "extra": (state(other=torch.zeros(1)), r"tensor other is not part of the consortium's model"),
    "shape": (state(weight=torch.zeros(2, 4)), r"tensor weight has shape \(2, 4\), expected \(2, 3\)"),
    "transposed": (state(weight=torch.zeros(3, 2)), r"tensor weight has shape \(3, 2\), expected \(2, 3\)"),
    "flat": (state(weight=torch.zeros(6)), r"tensor weight has shape \(6,\), expected \(2, 3\)"),
    "float64": (state(bias=torch.zeros(2, dtype=torch.float64)), r"tensor bias has dtype torch.float64, expected"),
    "float16": (state(bias=torch.zeros(2, dtype=torch.float16)), r"tensor bias has dtype torch.float16, expected"),
    "int64": (state(bias=torch.zeros(2, dtype=torch.int64)), r"tensor bias has dtype torch.int64, expected"),
}


@pytest.mark.parametrize(("tensors", "match"), BAD_STATES.values(), ids=BAD_STATES)
def test_another_model(tensors, match):
    """Other tensors are refused: who sent them, which tensor, what was found, what was expected; as bytes, too."""
    with pytest.raises(ShapeMismatch, match=f"^site a: {match}"):
        SPEC.flatten(tensors, who="site a")
    data = save({name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()})
    with pytest.raises(ShapeMismatch, match=f"^site a: {match}"):
        SPEC.from_bytes(data, who="site a")


WHOLE = SPEC.to_bytes(VECTOR)


@pytest.mark.parametrize(
    "data",
    [b"", b"not safetensors", WHOLE[:-1], WHOLE + b"\x00", b"\xff" * 8 + WHOLE[8:], b"\x80\x04N."],
    ids=["empty", "text", "cut", "longer", "huge header", "pickle"],
)
def test_not_a_safetensors_file(data):
    """Bytes that are no safetensors file are refused naming who sent them."""
    with pytest.raises(ShapeMismatch, match=r"^site a: not a safetensors file"):
        SPEC.from_bytes(data, who="site a")
    with pytest.raises(ShapeMismatch, match=r"^site a: not a safetensors file"):
        ModelSpec.of_bytes(data, who="site a")


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data):
    """No bytes do more than be refused."""
    with pytest.raises(ShapeMismatch):
        SPEC.from_bytes(data, who="x")


def test_locate():
    """Each index of the vector is named by its tensor and its place in it; one beyond the end is refused."""
    named = [SPEC.locate(index) for index in range(SPEC.length)]
    assert named == [
        *(f"tensor weight, element {index}" for index in range(6)),
        *(f"tensor bias, element {index}" for index in range(2)),
        "tensor scale, element 0",
    ]
    with pytest.raises(ParameterError, match="index 9 of 9"):
        SPEC.locate(9)


def test_the_digest_of_a_model():
    """Models that differ in one number, or in one tensor's name, differ in their digest of 32 bytes."""
    other = VECTOR.copy()
    other[3] = np.nextafter(other[3], np.float32(10))
    renamed = ModelSpec.of({"weight": (2, 3), "bias2": (2,), "scale": ()})
    digests = {model_digest(data) for data in (WHOLE, SPEC.to_bytes(other), renamed.to_bytes(VECTOR))}
    assert len(digests) == 3
    assert {len(digest) for digest in digests} == {32}


def test_a_dtype_that_numpy_does_not_have():
    """A safetensors file of bfloat16 tensors, which a peer may send, is refused like any other unfit file."""
    from safetensors.torch import save as save_torch

    data = save_torch({"weight": torch.zeros(2, dtype=torch.bfloat16)})
    with pytest.raises(ShapeMismatch, match="global model: not a safetensors file of float32 tensors"):
        ModelSpec.of({"weight": (2,)}).from_bytes(data, who="global model")


def test_the_specification_of_a_file_is_in_order_of_name():
    """The same file always gives the same specification, so that a manifest can be made again."""
    data = ModelSpec.of({"b": (1,), "a": (2, 3), "c": ()}).to_bytes(np.zeros(8, np.float32))
    assert ModelSpec.of_bytes(data, who="x").tensors == (("a", (2, 3)), ("b", (1,)), ("c", ()))
