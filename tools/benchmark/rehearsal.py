"""A rehearsal beside the real step of a middle-sized model: bytes, operations and collectives of both.

    python tools/benchmark/rehearsal.py [--layers 4] [--tokens 512] [--ranks 1 2]

The model has the widths of the published 3B and few layers (1.1 billion parameters with the tower at 4), random weights, fp32 on CPUs: one rank, and two at tensor 2 on gloo. A supervised step of two
samples with a picture each, the tower frozen. Takes some minutes and 16 GiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time

import torch

from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.planning.published import CONFIGS
from eureka_megatron.planning.rehearsal import Drawn, Plan, Rehearsal, measure, of_layers, rehearse
from eureka_megatron.planning.workload import Workload

COMPARED = ("parameters", "gradients", "optimizer", "peak", "operations")


def real(plan: Plan, rank: int, address: str) -> Rehearsal:
    torch.set_num_threads(1)
    with of_layers(plan.layers):
        return measure(plan, init_parallel(plan.layout, rank=rank, init_method=address), Drawn)


def compare(layers: int, tokens: int, ranks: int) -> None:
    layout = Layout(tensor=ranks, sequence_parallel=ranks > 1)
    plan = Plan(
        CONFIGS / "3b",
        layout,
        Execution(),
        Workload(tokens, tokens // 2, 28 * 28 * 64, 1, rollouts=False),
        tokens,
        freeze=("vision", "merger"),
        layers=layers,
    )
    (told,) = rehearse([(plan, 0)])
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile() as file, multiprocessing.get_context("spawn").Pool(ranks) as pool:
        done = pool.starmap(real, [(plan, rank, f"file://{file.name}.rendezvous") for rank in range(ranks)])[0]
    print(f"{layers} layers, {tokens} tokens, {ranks} ranks ({time.perf_counter() - start:.0f} s for the real step)")
    for name in COMPARED:
        a, b = getattr(told, name), getattr(done, name)
        print(f"  {name:12} rehearsed {a:>16,}  real {b:>16,}  ratio {a / b:.4f}")
    same = told.collectives == done.collectives and told.calls == done.calls
    print(f"  collectives  {'equal' if same else f'differ: {told.collectives} against {done.collectives}'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    for ranks in options.ranks:
        compare(options.layers, options.tokens, ranks)


if __name__ == "__main__":
    main()
