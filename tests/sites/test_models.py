"""The models that a manifest can name: shapes, what is normalised, and what is fixed in them."""

import pytest
import torch
from safetensors.torch import load
from support.xray_studies import IMAGES

from dp.layers import refuse_layers
from sites.datasets.dicom import ImagePlan, Target
from sites.errors import ManifestError
from sites.manifest import Images
from sites.models import RandomShift, image_model, initial_image_model, without_front

GRADE = Target("grade", "ordinal", ("a", "b", "c"))


@pytest.mark.parametrize("name", ["small-cnn", "filter-bank"])
@pytest.mark.parametrize("shape", [(28, 28), (9, 12), (8, 16, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_and_layers(name: str, shape: tuple[int, ...], channels: int) -> None:
    """Each model takes the plan's images or volumes, gives the targets' outputs, and is fit for DP-SGD; a row's output
    does not depend on the other rows."""
    plan = ImagePlan(shape=shape, channels=channels)
    model = image_model(Images(model=name, plan=plan, targets=[*IMAGES.targets, GRADE]), seed=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    refuse_layers(model)
    images = torch.rand(3, *plan.example_shape)
    found = model(images)
    assert found.shape == (3, 3)
    assert torch.allclose(model(images[1:2]), found[1:2], atol=1e-4)


def test_sizes() -> None:
    """The numbers of parameters are those that are documented."""
    counts = {
        name: sum(
            p.numel() for p in image_model(Images(model=name, plan=IMAGES.plan, targets=IMAGES.targets)).parameters()
        )
        for name in ("small-cnn", "filter-bank")
    }
    assert counts == {"small-cnn": 14_593, "filter-bank": 785}


@pytest.mark.parametrize("name", ["small-cnn", "filter-bank"])
def test_brightness_and_contrast_of_a_device(name: str) -> None:
    """An image that another device would have made brighter and flatter gives the same output."""
    model = image_model(Images(model=name, plan=IMAGES.plan, targets=IMAGES.targets))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    images = torch.rand(4, 1, 28, 28)
    assert torch.allclose(model(images * 0.5 + 2), model(images), atol=0.01)


def test_the_initial_model() -> None:
    """The same seed gives the same model, another one another, and torch's own generator is left alone."""
    cnn = Images(model="small-cnn", plan=IMAGES.plan, targets=IMAGES.targets)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one = initial_image_model(cnn, seed=3)
    assert torch.equal(torch.rand(1), before)
    assert initial_image_model(cnn, seed=3) == one
    assert initial_image_model(cnn, seed=4) != one
    assert not any(tensor.any() for tensor in load(initial_image_model(IMAGES)).values())


def test_what_is_fixed() -> None:
    """The fixed front and the rest give what the whole model does, and the rest has all its tensors."""
    model = image_model(IMAGES)
    torch.nn.init.normal_(model.linear.weight)
    front, rest = without_front(model)
    images = torch.rand(5, 1, 28, 28)
    assert torch.equal(rest(front(images)), model(images))
    assert rest.state_dict().keys() == model.state_dict().keys() == {"linear.weight", "linear.bias"}
    cnn = image_model(Images(model="small-cnn", plan=IMAGES.plan, targets=IMAGES.targets))
    assert without_front(cnn) == (None, cnn)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (
            Images(model="big", plan=IMAGES.plan, targets=IMAGES.targets),
            "found model 'big', expected one of filter-bank",
        ),
        (
            Images(model="small-cnn", plan=ImagePlan(shape=(28, 7)), targets=IMAGES.targets),
            r"shape \[28, 7\], expected",
        ),
    ],
)
def test_models_that_are_none(images: Images, match: str) -> None:
    """An unknown name and images too small are refused."""
    with pytest.raises(ManifestError, match=match):
        image_model(images)


def test_shifted_views() -> None:
    """A view is the image moved by at most so many pixels, its edge repeated; each move occurs; 0 moves nothing."""
    image = torch.arange(36.0).reshape(1, 6, 6)
    torch.manual_seed(1)
    seen = {tuple(RandomShift(1)(image).flatten().tolist()) for _ in range(200)}
    padded = torch.nn.functional.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    expected = {tuple(padded[:, a : a + 6, b : b + 6].flatten().tolist()) for a in range(3) for b in range(3)}
    assert seen == expected
    assert torch.equal(RandomShift(0)(image), image)
    assert RandomShift(2)(torch.rand(2, 5, 6, 7)).shape == (2, 5, 6, 7)
