"""A training loop of your own: gradient descent that sharpens up to 2 / learning rate.

Run `python examples/without_a_trainer.py`; it prints a table.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_eoss import measure_sharpness
from lightning_eoss.demo import digits

parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=2000)
max_steps = parser.parse_args().max_steps

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
data = digits(256)
loader = DataLoader(data, batch_size=32, shuffle=True)


def loss_fn(model, batch):
    images, targets = batch
    return (model(images) - targets).square().sum(-1).mean() / 2


print("step    loss  FullBS  MiniBS (95 %)         directional / threshold")
step = 0
while step < max_steps:
    for batch in loader:
        if step % 200 == 0:
            seen = measure_sharpness(model, loss_fn, data, batch_size=32)
            mini, threshold = seen.mini_batch, 2 / optimizer.param_groups[0]["lr"]
            print(
                f"{step:4d}  {loss_fn(model, data[:]).item():6.3f}  {seen.full_batch.value:6.2f}  {mini.mean:6.2f} "
                f"({mini.lower:.2f} to {mini.upper:.2f})  {seen.directional.mean / threshold:8.2f}"
            )
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        step += 1
