"""An existing PyTorch training loop joins a federation: everything above the `with` was there before.

    python examples/embed.py SITE.toml cleveland

SITE.toml is what `secureagg consortium sign --site-config SITE.toml` writes; the keys, the signed manifest and the
coordinator's address are found from there.  The manifest of this example says `mode = "none"`; where it says "local",
see embed_private.py.
"""

import sys

import torch

from sites import join
from sites.datasets.heart import load_hospitals

data = load_hospitals()[sys.argv[2]]
features, labels = torch.from_numpy(data.train_features), torch.from_numpy(data.train_labels)
model = torch.nn.Linear(13, 1)


def train() -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(features).squeeze(1), labels).backward()
        optimizer.step()


with join(sys.argv[1]) as federation:
    for training_round in federation.rounds():
        model.load_state_dict(training_round.global_state)
        train()
        training_round.submit(model.state_dict(), examples=len(labels))
        print(f"round {training_round.number} of {training_round.total} submitted")

model.load_state_dict(federation.final_state)
print(f"the global model gives {model(features).sigmoid().mean().item():.2f} on average here")
