"""What holds for all tests."""

import torch

torch.set_num_threads(1)  # little matrices; and the machine is shared
