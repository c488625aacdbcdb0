"""Measures `rl.logprobs` against the naive log-softmax of all logits: memory beyond inputs and results, and time, forward and backward.

    python tools/benchmark/logprobs.py [--tokens 8192] [--vocab 152064] [--hidden 1024] [--dtype float32] [--rounds 3] [--json FILE]

Naive at the defaults takes about 16 GiB. Every measurement is a process of its own, so that no allocator's leftovers hide a peak; the two
take turns. Memory is what the process (on a GPU: torch's allocator) held at most above what it held with inputs in place, less the
results: log-probabilities and the gradients of hidden states and weight. Both compute sum(log-probability · upstream) and its gradients.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eureka_megatron.rl.logprobs import token_logprobs

ON_GPU = torch.cuda.is_available()


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def blockwise(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, labels)[0]


VARIANTS = {"naive": naive, "rl.logprobs": blockwise}


def start_peak() -> int:
    """Bytes held now; the peak counts from here."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is held now
    return status_bytes("VmHWM")


def peak() -> int:
    if ON_GPU:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward. → extra bytes, seconds, and sums that let the variants be compared."""
    device, dtype = "cuda" if ON_GPU else "cpu", getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "device": device, "dtype": dtype}
    hidden = torch.randn(options.tokens, options.hidden, **random).requires_grad_()
    weight = torch.randn(options.vocab, options.hidden, **random).mul_(options.hidden**-0.5).requires_grad_()
    labels = torch.randint(options.vocab, (options.tokens,), generator=generator, device=device)
    upstream = torch.randn(options.tokens, generator=generator, device=device)
    one = hidden[:16].detach() @ weight[:64].detach().T  # libraries load and allocate what they keep
    del one
    before = start_peak()
    begin, processor = time.perf_counter(), time.process_time()
    logprobs = VARIANTS[variant](hidden, weight, labels)
    (logprobs * upstream).sum().backward()
    if ON_GPU:
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    held = peak() - before
    gradients = [tensor.grad for tensor in (hidden, weight) if tensor.grad is not None]
    results = sum(t.numel() * t.element_size() for t in (logprobs, *gradients))
    checks = [logprobs.detach().double().sum(), *(gradient.double().norm() for gradient in gradients)]
    return {
        "extra_bytes": held - results,
        "seconds": seconds,
        "processor_seconds": processor,
        "checks": [float(check) for check in checks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help=argparse.SUPPRESS)  # in the measuring process
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--variant", name], stdout=subprocess.PIPE, text=True, check=True
            )
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(options, runs)


def report(options: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.tokens} tokens × {options.vocab} words, hidden {options.hidden}, {options.dtype}, {where}")
    figures = {}
    for name, found in runs.items():
        one = {key: statistics.median(run[key] for run in found) for key in ("seconds", "processor_seconds")}
        figures[name] = one | {"extra_bytes": max(run["extra_bytes"] for run in found)}
        print(
            f"  {name:<12} {figures[name]['extra_bytes'] / 2**30:6.2f} GiB extra  {one['seconds']:7.2f} s "
            f" ({one['processor_seconds']:.1f} s of processors)"
        )
    ratios = {key: figures["rl.logprobs"][key] / figures["naive"][key] for key in figures["naive"]}
    pairs = zip(runs["rl.logprobs"][0]["checks"], runs["naive"][0]["checks"], strict=True)
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    print(
        f"  ratio: memory {ratios['extra_bytes']:.3f}, time {ratios['seconds']:.2f} "
        f"(processors {ratios['processor_seconds']:.2f}); results differ by {difference:.0e}"
    )
    if options.json:
        text = json.dumps({"figures": figures, "ratios": ratios, "difference": difference}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
