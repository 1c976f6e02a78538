"""A transformer under AdamW with a warm-up, whose batches grow half way, and its learning rate with them.

Each parameter of an adaptive optimizer has a stability limit of its own, so all is shown in units of these limits: 1 is
the edge. Run `python examples/transformer.py`, then `tensorboard --logdir lightning_logs`.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from lightning_eoss import LearningRateRescaler, SharpnessMonitor
from lightning_eoss.demo import digits


class RowTransformer(LightningModule):
    """Reads a digit as a sequence of eight rows."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1)
        self.head = nn.Linear(width, 10)

    def training_step(self, batch):
        images, targets = batch
        rows = self.embed(images.unflatten(1, (8, 8))) + self.position
        loss = F.cross_entropy(self.head(self.encoder(rows).mean(1)), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=60)
max_steps = parser.parse_args().max_steps

seed_everything(0)
callbacks = [
    SharpnessMonitor(every_n_train_steps=10, num_batches=10),
    GradientAccumulationScheduler({2: 4}),  # from the third epoch on, four batches of 16 in a step ...
    LearningRateRescaler(),  # ... and the rate with them: by the root for Adam, or less if the edge is near
    LearningRateMonitor(),
]
trainer = Trainer(max_steps=max_steps, callbacks=callbacks, logger=TensorBoardLogger("."), log_every_n_steps=10)
trainer.fit(RowTransformer(), DataLoader(digits(256), batch_size=16, shuffle=True))
