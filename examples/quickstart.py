"""Watch a network reach the edge of stability.

Run `python examples/quickstart.py`, then `tensorboard --logdir lightning_logs`, and open the *Custom Scalars* tab.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_eoss import SharpnessMonitor
from lightning_eoss.demo import DigitsMLP, digits  # any LightningModule, any data

parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=4000)
max_steps = parser.parse_args().max_steps

seed_everything(0)
trainer = Trainer(max_steps=max_steps, callbacks=[SharpnessMonitor()], logger=TensorBoardLogger("."))
trainer.fit(DigitsMLP(learning_rate=1.0), DataLoader(digits(), batch_size=16, shuffle=True))
