"""Formulas: numbers in, numbers out; knows no network and no Trainer."""
