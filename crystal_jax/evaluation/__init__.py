"""Evaluation of checkpoints: held-out losses, lm-eval tasks, generated code, infilling; over a whole calendar."""
