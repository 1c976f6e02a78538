"""A network, a loss and data in, measurements out; knows no Trainer."""
