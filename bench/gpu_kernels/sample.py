"""Choice of the next tokens on a GPU.

    python bench/gpu_kernels/sample.py

Needs an NVIDIA GPU. Writes $OUT/sample.json where OUT is set.
"""

from __future__ import annotations

import torch
from timing import COPY_GB_S, graph_us, save

from morph_runtime.kernels.cuda.sample import sample

VOCAB = 128256


def main() -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 8, 64, 256):
            for temperature in (0.0, 1.0):
                nbytes = rows * VOCAB * dtype.itemsize
                copies = [torch.randn(rows, VOCAB, device="cuda").to(dtype) for _ in range(max(int(200e6 / nbytes), 4))]
                temperatures = torch.full((rows,), temperature, device="cuda")
                seeds = torch.arange(rows, device="cuda")
                calls = [lambda x=x, t=temperatures, seeds=seeds: sample(x, t, seeds, seeds) for x in copies[:64]]
                us = graph_us(calls)
                gb_s = nbytes / us / 1e3
                results.append(
                    {
                        "dtype": str(dtype),
                        "rows": rows,
                        "temperature": temperature,
                        "us": round(us, 2),
                        "gb_s": round(gb_s),
                        "of_copy": round(gb_s / COPY_GB_S, 3),
                    }
                )
                print(results[-1], flush=True)
    save("sample", results)


if __name__ == "__main__":
    main()
