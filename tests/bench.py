"""Benchmarks; pytest does not collect this file.

    python tests/bench.py load                     1,000,000 interactions and 100,000 items, in the true formats: seconds, peak memory
    python tests/bench.py lightgcn --data beauty   LightGCN on a data set's training interactions: seconds, peak memory
    python tests/bench.py step --model DIR         an RL step with and without the shared prefix: tokens/s, seconds, share of the
                                                   machine's matmul peak, peak memory; a table, and bench.json
"""

import argparse
import contextlib
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

LOAD = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import data
started, cpu = time.perf_counter(), time.process_time()
d = data.load(sys.argv[2], cache_dir=sys.argv[3])
print(time.perf_counter() - started, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, len(d.items), sum(map(len, d.sequences.values())))
"""


def write_amazon(cache, users, items, interactions):
    """Files of Amazon 2014 and 2023 in the official formats, with lines as long as the real ones."""
    rng = random.Random(0)
    words = [f"word{n}" for n in range(5000)]
    asins = [f"B{n:09d}" for n in range(items)]
    text = lambda n: " ".join(rng.choices(words, k=n))
    texts = [text(90) for _ in range(500)]
    pairs = [(f"A{rng.randrange(users):012d}", asins[n] if n < items else rng.choice(asins), rng.randint(1, 5), 10**9 + rng.randrange(4 * 10**8))
             for n in range(interactions)]
    old, new = cache / "amazon-2014", cache / "amazon-2023"
    old.mkdir(parents=True)
    new.mkdir()
    with gzip.open(old / "reviews_Beauty_5.json.gz", "wt", compresslevel=1) as f:
        for user, item, rating, t in pairs:
            f.write(json.dumps({"reviewerID": user, "asin": item, "reviewerName": "Some One", "helpful": [0, 0], "reviewText": rng.choice(texts),
                                "overall": float(rating), "summary": "Good", "unixReviewTime": t, "reviewTime": "01 30, 2014"}) + "\n")
    with gzip.open(old / "meta_Beauty.json.gz", "wt", compresslevel=1) as f:
        for item in asins:
            f.write(repr({"asin": item, "description": text(60), "title": text(9), "imUrl": "http://ecx.images-amazon.com/images/I/51.jpg",
                          "price": 9.99, "related": {k: rng.sample(asins, 50) for k in ("also_bought", "also_viewed", "bought_together")},
                          "salesRank": {"Beauty": 12345}, "brand": text(1), "categories": [["Beauty", "Hair Care", text(1)]]}) + "\n")
    with gzip.open(new / "Video_Games.csv.gz", "wt", compresslevel=1) as f:
        f.write("user_id,parent_asin,rating,timestamp\n" + "".join(f"{u},{i},{r}.0,{t}000\n" for u, i, r, t in pairs))
    with gzip.open(new / "meta_Video_Games.jsonl.gz", "wt", compresslevel=1) as f:
        for item in asins:
            f.write(json.dumps({"main_category": "Video Games", "title": text(9), "average_rating": 4.1, "rating_number": 100, "price": 19.99,
                                "features": [text(15) for _ in range(5)], "description": [text(80)], "images": [{"large": "x" * 60}] * 6,
                                "store": text(1), "categories": ["Video Games", "PC", text(1)], "details": {"k": text(20)},
                                "parent_asin": item}) + "\n")


def load(args):
    with tempfile.TemporaryDirectory() as folder:
        print("writing the files …", flush=True)
        write_amazon(Path(folder), args.interactions // 8, args.items, args.interactions)
        for name in ("beauty", "amazon2023:Video_Games"):
            for state in ("files", "cache", "cache"):
                out = subprocess.run([sys.executable, "-c", LOAD, str(ROOT), name, folder], capture_output=True, text=True, check=True).stdout
                seconds, cpu, gigabytes, items, interactions = out.split()
                print(f"{name:<24} from the {state:<6} {float(seconds):6.1f} s ({float(cpu):.1f} s CPU)   peak {float(gigabytes):.2f} GB   {items} items, "
                      f"{interactions} interactions", flush=True)


LIGHTGCN = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch, data, rewards
d = data.load(sys.argv[2])
started = time.perf_counter()
vectors = rewards.item_embeddings(d, sys.argv[3])
seconds = time.perf_counter() - started
gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
started = time.perf_counter()
rewards.item_embeddings(d, sys.argv[3])
print(seconds, time.perf_counter() - started, gigabytes, len(vectors), sum(map(len, d.training().values())), torch.get_num_threads())
"""


def lightgcn(args):
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run([sys.executable, "-c", LIGHTGCN, str(ROOT), args.data, folder], stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, again, gigabytes, items, interactions, threads = out.split()
    print(f"LightGCN embeddings of {items} items from {interactions} training interactions of {args.data}, {threads} threads: {float(seconds):.0f} s, "
          f"from the cache {float(again):.1f} s, peak {float(gigabytes):.2f} GB")


@contextlib.contextmanager
def watched(result, device):
    """Adds the seconds and the peak memory (GB, of the process or of the GPU) of a block to lists in `result`."""
    import torch
    peak, running = [0], [True]

    def watch():
        while running[0]:
            with open("/proc/self/statm") as f:
                peak[0] = max(peak[0], int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            time.sleep(0.01)

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
    started = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated()
    result["seconds"].append(time.perf_counter() - started)
    running[0] = False
    result["gigabytes"].append(peak[0] / 1e9)


def matmul_peak(dtype, device):
    """FLOP/s of the best of some large matrix products: what the machine can do, measured now."""
    import torch
    n = 8192 if device.startswith("cuda") else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def forward_flops(config, parameters, lengths, heads, past=0):
    """Model FLOPs of a forward pass: 2 a weight and token, 4 D a layer for each pair of positions, and the head's `heads` positions."""
    body = parameters - config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    pairs = sum(n * past + n * (n + 1) / 2 for n in lengths)
    return 2 * body * sum(lengths) + 4 * config.hidden_size * config.num_hidden_layers * pairs + 2 * config.vocab_size * config.hidden_size * heads


def step(args):
    """Prompts of `--data`, K candidates, G rationales, exactly `--new-tokens` tokens each, alternating between sharing and not."""
    sys.path.insert(0, str(ROOT))
    import torch
    import data
    import policy
    import r2r
    import train
    from eval import pick_device, pick_dtype
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    dataset = data.load(args.data)
    texts = dataset.texts() + [r2r.SYSTEM, r2r.QUESTION]
    torch.manual_seed(0)
    model, tokenizer = policy.load(args.model, device, dtype, texts)
    if args.gradient_checkpointing:
        policy.checkpoint_activations(model)
    head = r2r.ScoreHead(model.config.get_text_config().hidden_size).to(device)
    optimizer = train.Optimizer([{"params": [*model.parameters(), *head.parameters()], "lr": 1e-6}])
    example = dataset.examples("train", 1, args.num_candidates, args.history_length)[0]
    prompts = [r2r.build_prompt(tokenizer, example.history, example.candidates)]
    config, parameters = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
    policy.stop_ids = lambda model, tokenizer: [config.vocab_size - 1]  # nearly never drawn: rationales of one length
    rows, prefix = args.num_candidates * args.group_size, len(prompts[0].prefix_ids)
    suffixes = [len(s) for s in prompts[0].suffix_ids for _ in range(args.group_size)]
    results = {share: {phase: {"seconds": [], "gigabytes": []} for phase in ("rollout", "score", "update")} for share in (True, False)}
    for repeat in range(args.repeats + 1):  # the first warms up
        for share in (True, False):
            now = results[share] if repeat else {phase: {"seconds": [], "gigabytes": []} for phase in results[share]}
            sampling = policy.Sampling(args.new_tokens, share_prefix=share, max_rows=args.rollout_rows)
            with watched(now["rollout"], device):
                rollout = r2r.generate(model, tokenizer, prompts, [torch.tensor(example.relevance)], args.group_size, sampling)
            with watched(now["score"], device):
                r2r.score(model, head, rollout, 1.0, args.micro_batch, share)
            model.train()
            with watched(now["update"], device):
                signal = r2r.signal(rollout)
                r2r.backward(model, head, rollout, signal, micro_batch=args.micro_batch, share_prefix=share)
                optimizer.step()
            model.eval()
    peak = matmul_peak(dtype, device)
    tokens = sum(map(len, rollout.responses))
    lengths = [s + len(r) for s, r in zip(suffixes, rollout.responses)]
    flops = {}
    for share in (True, False):
        own = lengths if share else [prefix + n for n in lengths]
        once = forward_flops(config, parameters, [prefix], 0) if share else 0
        forward = forward_flops(config, parameters, own, tokens, prefix if share else 0) + once
        flops[share] = {"rollout": forward, "score": forward, "update": 3 * forward}
    report = {"model": args.model, "parameters": parameters, "dtype": str(dtype), "device": device, "threads": torch.get_num_threads(),
              "rows": rows, "prefix_tokens": prefix, "new_tokens": args.new_tokens, "matmul_peak": peak, "results": {}}
    print(f"{args.model}: {parameters / 1e6:.0f}M parameters, {dtype} on {device}, {rows} rows, prefix of {prefix} tokens, {args.new_tokens} new; "
          f"matmul peak {peak / 1e9:.0f} GFLOP/s; medians of {args.repeats}\n{'':<22} {'seconds':>8} {'tokens/s':>9} {'of peak':>8} {'peak GB':>8}")
    for share, phases in results.items():
        label, whole = "shared" if share else "not shared", 0.0
        for phase, values in phases.items():
            seconds = statistics.median(values["seconds"])
            whole += seconds
            row = {"seconds": seconds, "tokens_per_second": tokens / seconds, "share_of_peak": flops[share][phase] / seconds / peak,
                   "gigabytes": statistics.median(values["gigabytes"])}
            report["results"][f"{label} {phase}"] = row
            print(f"{label + ' ' + phase:<22} {seconds:8.2f} {row['tokens_per_second']:9.0f} {row['share_of_peak']:8.1%} {row['gigabytes']:8.2f}")
        report["results"][f"{label} step"] = {"seconds": whole}
        print(f"{label + ' step':<22} {whole:8.2f}")
    shared, plain = (report["results"][f"{x} step"]["seconds"] for x in ("shared", "not shared"))
    print(f"a step is {plain / shared:.2f} times as fast with the shared prefix")
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("load")
    p.add_argument("--interactions", type=int, default=10**6)
    p.add_argument("--items", type=int, default=10**5)
    p.set_defaults(run=load)
    p = commands.add_parser("step")
    p.add_argument("--model", default="tiny")
    p.add_argument("--data", default="toy")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    p.add_argument("--gradient-checkpointing", action="store_true")
    for name, value in (("num-candidates", 20), ("group-size", 4), ("history-length", 10), ("new-tokens", 48), ("micro-batch", 16), ("rollout-rows", 320),
                        ("repeats", 3)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--out", default="bench.json")
    p.set_defaults(run=step)
    p = commands.add_parser("lightgcn")
    p.add_argument("--data", default="beauty")
    p.set_defaults(run=lightgcn)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
