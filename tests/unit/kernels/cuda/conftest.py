"""The GPU's kernels on the CPU: Triton's interpreter must be chosen before its language is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
