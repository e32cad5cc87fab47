"""PyTorch checkpoints in and out: tables of names and shapes per form, over checkpoints of weights."""
