#!/usr/bin/env python3
"""How long J-RAS takes to look up guides, by the size of the bank, and to embed a bank anew.

    python examples/lookup_times.py                                       # 4096, 65536 and 1048576 guides, about 2 GB
    python examples/lookup_times.py --guides 4096 --device cuda

Simplified: keys are random points around 2000 centres, not a trained retriever's; guides are stored as 4 x 4 x 4 cells,
so that a million of them fit (a lookup copies K of them per patch, whatever their number); and they come from 200
subjects, which fixes how many more than K a training lookup has to search. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nnunetv2_ext.jras.bank import GuideBank
from nnunetv2_ext.jras.encoder import Retriever

SUBJECTS, CENTRES, KEY_DIM, NUM_GUIDES = 200, 2000, 128, 4
LOW_SHAPE = (4, 4, 4)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", type=int, nargs="+", default=[4096, 65536, 1048576], help="sizes of the bank")
    parser.add_argument("--batch", type=int, default=2, help="patches of a training step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--refresh-guides", type=int, default=2048, help="size of the bank that is embedded anew")
    parser.add_argument("--low-shape", type=int, nargs="+", default=[10, 14, 10], help="cells of those guides")
    return parser.parse_args()


def seconds(do: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall time, the first call left out."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        do()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def filled_bank(number: int, device: str) -> tuple[GuideBank, torch.Tensor]:
    """The bank, and 16 queries like its keys."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, KEY_DIM, generator=generator)

    def draw(n: int) -> torch.Tensor:
        chosen = centres[torch.randint(CENTRES, (n,), generator=generator)]
        return F.normalize(chosen + 0.7 * torch.randn(n, KEY_DIM, generator=generator), dim=1)

    bank = GuideBank(1, 3, LOW_SHAPE, KEY_DIM).to(device)
    empty = torch.zeros(1, dtype=torch.uint8).expand(number, *LOW_SHAPE)
    bank.fill(torch.zeros(number, 1, *LOW_SHAPE), empty, torch.arange(number) % SUBJECTS, torch.zeros(256, 3).byte())
    bank.set_keys(draw(number))
    return bank, draw(16).to(device)


def row(number: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    bank, queries = filled_bank(number, args.device)
    batch, groups = queries[: args.batch], torch.arange(args.batch, device=args.device)
    predict = seconds(lambda: bank.lookup(queries[:1], NUM_GUIDES), args.device, args.repeats)
    train = seconds(lambda: bank.lookup(batch, NUM_GUIDES, groups), args.device, args.repeats)
    return f"| {number} | {1e3 * predict:.2f} | {1e3 * train:.2f} |"


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print("| guides | 1 patch, no exclusion, ms | training batch, ms |")
    print("|---|---|---|")
    for number in args.guides:
        print(row(number, args), flush=True)
    retriever = Retriever(1, args.low_shape).to(args.device).eval()
    images = torch.randn(64, 1, *args.low_shape, device=args.device)
    with torch.no_grad():
        one = seconds(lambda: retriever(images), args.device, args.repeats)
    total = one * args.refresh_guides / 64
    print(f"\nembedding {args.refresh_guides} guides of {' x '.join(map(str, args.low_shape))} cells: {total:.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
