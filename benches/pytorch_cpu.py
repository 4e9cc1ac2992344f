"""Compares this crate's CPU ops with PyTorch's layer_norm: the two take turns, shape by shape, with as many threads.

    python3 -m venv ~/.cache/torch-venv && ~/.cache/torch-venv/bin/pip install torch==2.11.0 numpy
    ~/.cache/torch-venv/bin/python benches/pytorch_cpu.py --threads 2

Forward is `native_layer_norm`, backward `native_layer_norm_backward` for all three gradients: no autograd graph on either
side. Each number is the median over all rounds of a round's median.
"""

import argparse
import json
import os
import shlex
import subprocess
import tempfile
import time
from statistics import median

import torch

SHAPES = "1x16777216,16x1048576,256x65536,4096x4096,8192x768,64x256"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def bench(args, shape, dtype, slow):
    """Microseconds by (direction, implementation), as `cargo bench` measures them."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
        command = shlex.split(args.bench) + ["--cpu", "--shapes", shape, "--dtypes", dtype]
        command += ["--reps", str(args.reps), "--json", out.name] + ["--slow"] * slow
        environment = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        with open(out.name) as lines:
            rows = [json.loads(line) for line in lines]
    assert all(row["threads"] == args.threads for row in rows)
    return {(row["dir"], row["impl"]): row["us"] for row in rows}


def timed(call, reps):
    """Median microseconds of a call; a sample of a short one holds several."""
    call()
    start = time.perf_counter()
    call()
    calls = min(1000, max(1, int(200e-6 / (time.perf_counter() - start))))
    times = []
    for _ in range(reps):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return median(times)


def pytorch(args, shape, dtype):
    rows, cols = map(int, shape.split("x"))
    dtype = DTYPES[dtype]
    x, dy = (torch.randn(rows, cols).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(cols).to(dtype) for _ in range(2))
    forward = lambda: torch.ops.aten.native_layer_norm(x, [cols], weight, bias, 1e-5)
    _, mean, rstd = forward()
    wanted = [True, True, True]
    backward = lambda: torch.ops.aten.native_layer_norm_backward(
        dy, x, [cols], mean, rstd, weight, bias, wanted
    )
    with torch.no_grad():
        return {("fwd", "torch"): timed(forward, args.reps), ("bwd", "torch"): timed(backward, args.reps)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="cargo bench --bench layer_norm --", help="the command of the bench")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--dtypes", default="f32,bf16,f16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--slow", action="store_true", help="also candle-nn's layer_norm_slow, in a run of its own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(f"PyTorch {torch.__version__}, {args.threads} threads; ms; ratios are to the whole op, above 1 it is the faster")
    print("| dtype | rows x cols | forward kernel, share of copy | forward op | candle-nn | PyTorch "
          "| backward kernel, share of add | backward op | PyTorch | slow fwd + bwd |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            rounds = []
            for _ in range(args.rounds):
                rounds.append(bench(args, shape, dtype, slow=False) | pytorch(args, shape, dtype))
            us = {key: median(r[key] for r in rounds if key in r) for key in rounds[0]}
            share = lambda way: f"{us[way, 'kernel'] / 1e3:.3g}, {100 * us[way, 'roof'] / us[way, 'kernel']:.0f}%"
            ratio = lambda way, other: f"{us[way, other] / us[way, 'ours']:.1f}x"
            slow = ""
            if args.slow:
                # A process of its own: its many tensors would leave the allocator of the others without memory to reuse.
                us_beside_slow = bench(args, shape, dtype, slow=True)
                total = lambda impl: us_beside_slow["fwd", impl] + us_beside_slow["bwd", impl]
                slow = f"{total('candle_slow') / total('ours'):.0f}x"
            print(f"| {dtype} | {shape.replace('x', ' x ')} | {share('fwd')} | {us['fwd', 'ours'] / 1e3:.3g} "
                  f"| {ratio('fwd', 'candle_fused')} | {ratio('fwd', 'torch')} | {share('bwd')} "
                  f"| {us['bwd', 'ours'] / 1e3:.3g} | {ratio('bwd', 'torch')} | {slow} |", flush=True)


main()
