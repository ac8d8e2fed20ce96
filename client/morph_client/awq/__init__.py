"""Making AWQ checkpoints: AutoAWQ in a Python environment of its own, driven from here."""
