"""The GPU's kernels run on the CPU here: Triton's interpreter must be chosen before any test imports its language."""

import os

os.environ["TRITON_INTERPRET"] = "1"
