"""A gradient for each row of a batch, through Opacus, and a test that it is that row's own.

DP-SGD bounds a patient's influence by clipping that patient's gradient.  If the gradient of one row also depends on
another (Cox' partial likelihood, class weights counted in the batch, contrastive losses, a layer that averages over the
batch), the other one moves the sum by more than its own clipped gradient, and nothing tells.  ``refuse_coupled`` tries
three things on a few rows:

1. the derivative of the loss at a row's prediction is the same for that row alone;
2. with other rows beside it a row's gradient stays, under the same seed, so that dropout drops the same;
3. the rows' gradients add up to what autograd finds for the batch, so that Opacus has seen the whole model.

The rows are some of the site's own, since only they are sure to be valid input; among them are those with the least and
the greatest of each target, so that there is an event to rank and a class to count.  A coupling that shows only on
other rows or at other parameters, or that is below the tolerance, is not found.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from opacus import GradSampleModule
from torch import Tensor

from dp.errors import UnsupportedEvent

Loss = Callable[[Tensor, Tensor], Tensor]

PROBED_ROWS: Final = 12
PROBED_COLUMNS: Final = 8
REMEDY: Final = (
    "expected the sum of a loss for each row, of that row's own prediction and target; for survival use a "
    "discrete-time hazard (dp.survival), for class weights constants"
)


def row_gradients(wrapped: GradSampleModule, loss: Loss, features: Tensor, targets: Tensor) -> Tensor:
    """Leave in each trained parameter's ``grad_sample`` (rows, ...) each row's gradient; return the predictions.

    Raises UnsupportedEvent, naming the parameter, where Opacus found no gradient per row and autograd found one.
    """
    forget_gradients(wrapped)
    predictions: Tensor = wrapped(features)
    torch.autograd.backward(loss(predictions, targets))
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        found: Tensor | None = vars(parameter)["grad_sample"]
        if found is None and parameter.grad is None:  # the loss does not depend on it
            found = parameter.new_zeros(1).expand(len(features), *parameter.shape)
            vars(parameter)["grad_sample"] = found
        # Stops a part of the gradient from going past the clipping, or rows that are no patients from being clipped.
        if found is None or len(found) != len(features):
            raise UnsupportedEvent(
                f"model, {name.removeprefix('_module.')}: found {'no' if found is None else len(found)} gradients for "
                f"{len(features)} rows, expected one each; call the layer that owns it, on input whose first dimension "
                "is the batch"
            )
    return predictions


def forget_gradients(wrapped: GradSampleModule) -> None:
    """Drop all that Opacus and autograd keep of earlier batches, also of one that broke off halfway."""
    for parameter in wrapped.parameters():
        parameter.grad = None
        if parameter.requires_grad:
            vars(parameter).update(grad_sample=None, _forward_counter=0)
            vars(parameter).pop("_current_grad_sample", None)
    for module in wrapped.modules():
        # Stops a stale, larger batch from giving this one rows of zeros.
        vars(module).pop("activations", None)
        vars(module).pop("max_batch_len", None)


def refuse_coupled(wrapped: GradSampleModule, loss: Loss, features: Tensor, targets: Tensor, *, most_rows: int) -> None:
    """Raise UnsupportedEvent, with the remedy, if rows share gradients; parameters and torch's seeds stay as they are.

    ``features`` and ``targets``: all rows; ``loss``: as for training, predictions and targets to a sum over rows;
    ``most_rows``: that a batch of the training may have.
    """
    with torch.random.fork_rng():
        rows = _telling_rows(targets, most_rows)
        gradients, predictions = _probe(wrapped, loss, features, targets, rows)
        finite = torch.stack([torch.isfinite(each).reshape(len(rows), -1).all(dim=1) for each in gradients]).all(dim=0)
        if not finite.all():
            rows = rows[finite.cpu()]
            if len(rows):
                gradients, predictions = _probe(wrapped, loss, features, targets, rows)
            if not all(each.isfinite().all() for each in gradients) or not len(rows):
                raise UnsupportedEvent("model and loss: found no row with a finite gradient among those tried")
        _refuse_sums_that_are_none(loss, predictions, targets[rows.to(targets.device)])
        _refuse_hidden_parts(wrapped, gradients)
        for staying in range(min(2, len(rows))):
            company = rows.clone()
            company[1 - staying :: 2] = rows[staying : staying + 1]  # every second row gives way to a copy
            changed, _ = _probe(wrapped, loss, features, targets, company)
            if not _same([each[staying::2] for each in gradients], [each[staying::2] for each in changed]):
                raise UnsupportedEvent(f"model and loss: found a row whose gradient depends on other rows, {REMEDY}")
    forget_gradients(wrapped)


def _telling_rows(targets: Tensor, most: int) -> Tensor:
    """At most ``most`` rows: those with the greatest and the least of each target, and some evenly spaced."""
    columns = targets.detach().cpu().to(torch.float64).reshape(len(targets), -1)[:, :PROBED_COLUMNS]
    spaced = torch.linspace(0, len(targets) - 1, min(PROBED_ROWS, len(targets))).long()
    rows = dict.fromkeys(torch.cat([columns.argmax(dim=0), columns.argmin(dim=0), spaced]).tolist())
    return torch.tensor(sorted(list(rows)[:most]))


def _probe(
    wrapped: GradSampleModule, loss: Loss, features: Tensor, targets: Tensor, rows: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Each trained parameter's gradients of these rows, and the predictions, with the same random numbers each time."""
    torch.manual_seed(0)
    predictions = row_gradients(wrapped, loss, features[rows.to(features.device)], targets[rows.to(targets.device)])
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return [vars(parameter)["grad_sample"] for parameter in trained], predictions.detach()


def _refuse_sums_that_are_none(loss: Loss, predictions: Tensor, targets: Tensor) -> None:
    if len(predictions) != len(targets):
        raise UnsupportedEvent(f"model: found {len(predictions)} predictions of {len(targets)} rows, expected one each")

    def derivative(rows: slice) -> Tensor:
        inputs = predictions[rows].clone().requires_grad_()
        return torch.autograd.grad(loss(inputs, targets[rows]), inputs)[0]

    alone = torch.cat([derivative(slice(row, row + 1)) for row in range(len(targets))])
    if not _same([derivative(slice(None))], [alone]):
        raise UnsupportedEvent(f"loss: found rows whose loss together is not the sum of their losses alone, {REMEDY}")


def _refuse_hidden_parts(wrapped: GradSampleModule, gradients: Sequence[Tensor]) -> None:
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    if not _same([each.sum(dim=0) for each in gradients], whole):
        raise UnsupportedEvent(
            "model: found gradients of rows that do not add up to the batch's, expected each parameter to be used by "
            "the layer that owns it only"
        )


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all are equal within rounding, which is judged by the largest number among them."""
    largest = max(float(each.abs().max()) for each in expected if each.numel())
    tolerance = largest * torch.finfo(expected[0].dtype).eps ** 0.5
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(found, expected, strict=True))
