"""The command ``finetune``."""
