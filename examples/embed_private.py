"""A hospital joins a federation with differential privacy: the library trains, and keeps the hospital's budget.

    python examples/embed_private.py SITE.toml cleveland

The manifest says `mode = "local"`: DP-SGD with the patient as the unit.  Every round is booked in the hospital's own
ledger before a patient is sampled; one that its budget has no room for raises BudgetExhausted, and nothing is sent.
"""

import sys

import torch

from sites import join
from sites.datasets.heart import load_hospitals

data = load_hospitals()[sys.argv[2]]
model = torch.nn.Linear(13, 1)


def loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(predictions.squeeze(1), targets, reduction="sum")


with join(sys.argv[1]) as federation:
    trainer = federation.trainer(
        model,
        loss,
        features=torch.from_numpy(data.train_features),
        targets=torch.from_numpy(data.train_labels),
        patients=range(len(data.train_labels)),  # whose each row is
    )
    for training_round in federation.rounds():
        training_round.submit_trained(trainer.train_round(training_round))
        print(f"round {training_round.number} of {training_round.total} submitted, epsilon {trainer.epsilon:.3f} spent")

model.load_state_dict(federation.final_state)
