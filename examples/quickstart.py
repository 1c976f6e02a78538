"""Watch a network reach the edge of stability.

Run `python examples/quickstart.py`, then `tensorboard --logdir lightning_logs`, and open the *Custom Scalars* tab.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eoss import SharpnessMonitor


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
        for parameter in self.parameters():
            parameter.data *= 0.5  # a small start leaves room to sharpen

    def training_step(self, batch):
        images, targets = batch
        loss = (self.net(images) - targets).square().sum(-1).mean() / 2
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=4000)
max_steps = parser.parse_args().max_steps

seed_everything(0)
images, labels = (torch.tensor(array[:1024]).float() for array in load_digits(return_X_y=True))
images = (images - images.mean(0)) / (images.std(0) + 0.1)
data = TensorDataset(images, nn.functional.one_hot(labels.long(), 10).float())

trainer = Trainer(max_steps=max_steps, callbacks=[SharpnessMonitor()], logger=TensorBoardLogger("."))
trainer.fit(Digits(), DataLoader(data, batch_size=16, shuffle=True))
