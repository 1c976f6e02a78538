"""A training that cannot be read or evaluated twice: a stream of ready batches, stepped on by hand.

The monitor is told what to measure on (`dataloader=`, here a list of the stream's dictionaries, each of which counts as
one) and which loss is stepped on (`loss_fn=`). Run `python examples/ready_batches.py`, then
`tensorboard --logdir lightning_logs`.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_eoss import SharpnessMonitor
from lightning_eoss.demo import digits


class Stream(IterableDataset):
    """Endless batches of 32, as a server or a pipeline hands them out."""

    def __iter__(self):
        images, targets = digits().tensors
        while True:
            chosen = torch.randint(len(images), (32,))
            yield {"images": images[chosen], "targets": targets[chosen]}


class ByHand(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch["images"]), batch["targets"])

    def training_step(self, batch):
        optimizer, loss = self.optimizers(), self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=200)
max_steps = parser.parse_args().max_steps

seed_everything(0)
images, targets = (tensor.split(32) for tensor in digits().tensors)
monitor = SharpnessMonitor(
    every_n_train_steps=20,
    num_batches=16,
    dataloader=[{"images": x, "targets": y} for x, y in zip(images, targets, strict=True)],
    loss_fn=lambda module, batch: module.loss(batch),
)
trainer = Trainer(max_steps=max_steps, callbacks=[monitor], logger=TensorBoardLogger("."), log_every_n_steps=10)
trainer.fit(ByHand(), DataLoader(Stream(), batch_size=None))
