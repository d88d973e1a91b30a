"""What only a GPU can show, in one command, which may be killed at any moment.

    python tests/bench.py gpu --model DIR --data DIR --minutes 8 --out gpu-bench

OUT/gpu.json is written anew after each part. Checks end after a third of the time, measures after two thirds;
the rest trains R2Rank in OUT/run, or goes on with the run there. Flags that are not listed go to train.py.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file

import bench
import policy
from extras.models import checkpoint_activations

ROOT = Path(__file__).resolve().parents[1]
CHECKS, MEASURES = 1 / 3, 2 / 3  # when each must be over, in shares of the time
MOST, MEAN = 1.0, 0.1  # nats by which log-probabilities in bfloat16 may differ from those in float32
SAME = 1e-4  # relative difference of two float32 passes that only add up in another order

class Report:
    """gpu.json, and the clock. A part that fails or takes too long is noted, and the next one begins."""

    def __init__(self, out, flags, seconds):
        self.path, self.begun, self.seconds = out / "gpu.json", time.time(), seconds
        out.mkdir(parents=True, exist_ok=True)
        self.parts, self.content = {}, {"flags": flags}

    def left(self, share=1.0):
        return self.begun + share * self.seconds - time.time()

    def write(self):
        """Under another name, then renamed: whenever the process is killed, the file is whole."""
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(self.content | {"parts": self.parts}, indent=1) + "\n")
        new.replace(self.path)

    def part(self, name, share, function, *args):
        """function(row, *args) fills the row, until that share of the time is over."""
        row, begun, left = {}, time.time(), self.left(share)
        self.parts[name] = row
        settings = policy.SHARE_PREFIX, policy.MAX_ROWS, policy.COMPILE_DECODING
        signal.signal(signal.SIGALRM, out_of_time)
        try:
            if left <= 0:
                out_of_time()
            signal.setitimer(signal.ITIMER_REAL, left, 5)  # again where the exception was swallowed
            function(row, *args)
        except Exception as error:  # what the row has by now stays
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        policy.SHARE_PREFIX, policy.MAX_ROWS, policy.COMPILE_DECODING = settings
        row["seconds"] = time.time() - begun
        self.write()
        print(f"{name}: {json.dumps(row)}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()

def out_of_time(*_):
    raise TimeoutError("no time was left")

def distance(a, b):
    """|a - b| / |b|, of all numbers together."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()

def sample(s, args, greedy=False, lists=slice(1)):
    sampling = policy.Sampling(args.new_tokens, greedy=greedy)
    return policy.sample_rows(s["model"], s["tokenizer"], s["prompts"][lists], args.group_size, sampling)

def one_pass(s, rollout, args):
    """Log-probabilities, and the gradient of their sum in which each row has a weight of its own."""
    weights = torch.linspace(-1, 1, len(rollout.owner), device=args.device)
    logprobs = torch.zeros(len(rollout.owner), args.new_tokens, device=args.device)
    for rows, found, *_ in policy.micro_batches(s["model"].train(), rollout, args.micro_batch):
        (weights[rows, None] * found).sum().backward()
        logprobs[rows] = found.detach()
    gradient = torch.cat([m.grad.flatten() for m in s["optimizer"].masters if m.grad is not None])
    s["optimizer"].adamw.zero_grad()
    return logprobs, gradient

def equal_tokens(a, b):
    """The share of places where two rollouts have the same token."""
    return statistics.fmean(x == y for rows in zip(a.responses, b.responses) for x, y in zip(*rows))

def passes(row, args):
    """Of one rollout: both types, shared prefix or none, gradient checkpointing or none. [log-probabilities,
    gradient]: relative differences, with a bound in float32. In bfloat16, two right passes differ visibly."""
    args, rollout, found, greedy = SimpleNamespace(**vars(args)), None, [], []
    row["bounds"] = {"most_nats": MOST, "mean_nats": MEAN, "float32": SAME}
    for args.dtype in ("float32", "bfloat16"):
        s, numbers = bench.prepare(args), row.setdefault(args.dtype, {})
        drawn = sample(s, args)
        greedy.append(sample(s, args, greedy=True))
        states = policy.all_logprobs(s["model"], drawn, args.micro_batch)[1]
        numbers["states_while_sampling"] = distance(drawn.hidden, states)
        rollout = rollout or drawn
        wanted, policy.SHARE_PREFIX = one_pass(s, rollout, args), False
        found.append(wanted[0])
        for name in ("plain", "checkpointing"):
            numbers[name] = [distance(*pair) for pair in zip(one_pass(s, rollout, args), wanted)]
            policy.SHARE_PREFIX = True
            checkpoint_activations(s["model"])
        del s, wanted  # the next needs the memory
    nats = (found[0] - found[1]).abs()
    row.update(most_nats=nats.max().item(), mean_nats=nats.mean().item(), greedy_equal=equal_tokens(*greedy))
    row["ok"] = (row["most_nats"] <= MOST and row["mean_nats"] <= MEAN
                 and max(row["float32"]["plain"] + row["float32"]["checkpointing"]) <= SAME)

def train(args, log, flags, enough=lambda: False):
    """Exit code of train.py, killed when `enough()`; it never outlives this process, however that ends."""
    def end_with_parent():
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    command = [sys.executable, ROOT / "train.py", "--device", args.device, *flags]
    with open(args.out / log, "a") as file:
        process = subprocess.Popen([str(x) for x in command], stdout=file, stderr=subprocess.STDOUT,
                                   preexec_fn=end_with_parent, env=os.environ | {"TQDM_DISABLE": "1"})
        try:
            while process.poll() is None and not enough():
                time.sleep(0.05)
        finally:
            process.kill()
    return process.wait()

def last_step(run):
    """The last whole line of RL in a run's log."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return next((json.loads(x) for x in reversed(lines) if '"rl"' in x and x.endswith("}")), {"step": 0})

def resume(row, args):
    """Weights after three steps in one go, and with a SIGKILL and --resume: bit-exact, or by how much not?
    In float32: in bfloat16 updates so small change few weights."""
    work = args.out / "resume"
    shutil.rmtree(work, ignore_errors=True)
    flags = [*args.to_train, "--steps", 3, "--save-every", 1, "--batch-lists", 1, "--group-size", 2,
             "--num-candidates", 4, "--max-new-tokens", 16, "--eval-lists", 1, "--warmup-steps", 1,
             "--dtype", "float32"]

    def weights(name, flags, enough=lambda: False):
        assert train(args, "resume.log", flags, enough) in (0, -signal.SIGKILL), "failed; see resume.log"
        tables = [load_file(path) for path in sorted((work / name / "checkpoint").glob("*.safetensors"))]
        return torch.cat([torch.zeros(0), *(x.flatten() for table in tables for x in table.values())])

    killed, begun = work / "killed", time.time()
    weights("killed", [*flags, "--out", killed], lambda: last_step(killed)["step"] == 2)
    row.update(step_when_killed=last_step(killed)["step"],
               begins_after=(killed / "config.json").stat().st_mtime - begun)
    resumed = weights("killed", ["--resume", killed])
    whole = weights("whole", [*flags, "--out", work / "whole", "--save-every", 9])
    row.update(most=(resumed - whole).abs().max().item(), relative=distance(resumed, whole))
    row["bit_exact"] = row["most"] == 0
    shutil.rmtree(work)

def bandwidth(device):
    """Bytes a second of reading and writing a large tensor."""
    x = torch.zeros(2**28 if device.startswith("cuda") else 2**25, device=device)
    return bench.rate(8 * x.numel(), lambda: x.add_(1)[0])

def decoding_bytes(model, prompt, args):
    """What decoding must read: all weights once a token, and each row's keys and values."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    read = sum(len(prompt.prefix_ids) + len(x) + args.new_tokens / 2 for x in prompt.suffix_ids)
    kept = 2 * heads * width * config.num_hidden_layers * read * args.group_size
    return args.new_tokens * model.dtype.itemsize * (sum(p.numel() for p in model.parameters()) + kept)

def step(row, args, s, arm):
    """One list's step: seconds, tokens a second, shares of the matmul peak and of the bandwidth, memory."""
    args.arms, args.repeats = arm, 2 if arm == "shared" else 1
    found = bench.measure(args, s)
    times = found["arms"][arm]
    tokens = len(s["prompt"].suffix_ids) * args.group_size * args.new_tokens
    for name in ("rollout", "update", "step"):
        row[name] = statistics.median(times[name])
        row[f"{name}_tokens_per_second"] = tokens / row[name]
    row.update(memory_gb=max(times["memory_gb"]), of_peak=times["of_peak"],
               peak_flops=statistics.median(found["peak_flops"]), bytes_per_second=bandwidth(args.device),
               state_gb=sum(p.numel() for p in s["model"].parameters()) * 18e-9)
    read = decoding_bytes(s["model"], s["prompt"], args) / row["rollout"]
    row["rollout_of_bandwidth"] = read / row["bytes_per_second"]

def timed(s, args, lists):
    """Rows and seconds of one rollout of some lists."""
    begun = time.perf_counter()
    rows = len(sample(s, args, lists=lists).owner)
    return rows, time.perf_counter() - begun

def rollouts(row, args, s):
    """Several lists in one `generate` call: is decoding bound by latency, or by rows?"""
    policy.MAX_ROWS = 10**6
    for lists in (1, 1, 2, 4, 8):  # the first warms up
        bench.reset_peak(args.device)
        rows, seconds = timed(s, args, slice(lists))
        row[str(lists)] = {"rows": rows, "seconds": seconds, "memory_gb": bench.peak_memory(args.device),
                           "tokens_per_second": rows * args.new_tokens / seconds}

def compiled(row, args, s):
    """Seconds of rollouts, eager and compiled: the first list three times, then others, of other widths."""
    if args.device == "cpu":
        row["skipped"] = "generate compiles on a GPU only"
        return
    greedy = []
    for policy.COMPILE_DECODING in (False, True):
        times = [timed(s, args, slice(n, n + 1))[1] for n in (0, 0, 0, 1, 2, 3)]
        row["compiled" if policy.COMPILE_DECODING else "eager"] = times
        greedy.append(sample(s, args, greedy=True))
    row["greedy_equal"] = equal_tokens(*greedy)

def plan(row, args, report):
    """Flags of a run that ends in time, by what a list's step took (10 s where that is not known)."""
    one, B = report.parts["step shared"], args.batch_lists
    rollout, update = one.get("rollout", 5), one.get("update", 5)
    saving = one.get("state_gb", 0)  # seconds, at 1 GB/s
    left = 0.9 * report.left() - report.parts["resume"].get("begins_after", 20)
    lists = max(2, min(100, int(0.2 * left / (3 * rollout))))  # each is evaluated three times
    left -= (3 * lists + 2 * B) * rollout + 3 * saving  # two batches warm up
    between = max(60, 10 * saving)  # from state to state
    step = B * (rollout + update)
    row.update(steps=max(1, int(left / (step * (1 + saving / between)))), eval_lists=lists,
               save_every=math.ceil(between / step))
    return ["--steps", row["steps"], "--eval-lists", lists, "--save-every", row["save_every"],
            "--batch-lists", B, "--group-size", args.group_size, "--num-candidates", args.num_candidates,
            "--max-new-tokens", args.new_tokens, "--micro-batch", args.micro_batch, "--dtype", args.dtype,
            "--warmup-steps", 2, "--eval-samples", 1, "--gradient-checkpointing", "off", *args.to_train]

def training(row, args, report):
    """R2Rank by train.py, anew or from the state of an earlier call, until it ends or the time is over."""
    run = args.out / "run"
    flags = ["--resume", run]
    if not (run / "state.pt").exists():
        shutil.rmtree(run, ignore_errors=True)
        flags = ["--out", run, *plan(row, args, report)]
    code = train(args, "train.log", flags, lambda: report.left() < 2)
    row["last_step"] = last_step(run)
    if code:
        row["error"] = "the time was over" if code < 0 else "train.py failed; see train.log"
    else:
        systems = json.loads((run / "result.json").read_text())["systems"]
        row["ndcg@10"] = {name: found["ndcg@10"] for name, found in systems.items()}

def parse(argv):
    parser = argparse.ArgumentParser(prog="bench.py gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"model": "tiny", "data": "toy", "device": "cuda", "dtype": "auto", "minutes": 8.0,
                          "num-candidates": 20, "history-length": 10, "group-size": 4, "new-tokens": 128,
                          "micro-batch": 16, "batch-lists": 4, "out": Path("gpu-bench")}.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    args, rest = parser.parse_known_args(argv)
    if args.dtype == "auto":
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    args.to_train = ["--model", args.model, "--data", args.data, "--history-length", args.history_length,
                     "--sft-steps", 0, *rest]
    return bench.complete(args)

def main(argv):
    args, s = parse(argv), {}
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu tries this command out")
    flags = {k: Path(v).name if k in ("model", "data") else v for k, v in vars(args).items()
             if k not in ("out", "to_train")}
    flags["device"] = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    flags["versions"] = [torch.__version__, transformers.__version__]
    few = {"num_candidates": min(6, args.num_candidates), "group_size": 2,
           "new_tokens": min(32, args.new_tokens)}
    report = Report(args.out, flags, 60 * args.minutes)
    report.part("passes", CHECKS / 2, passes, SimpleNamespace(**vars(args) | few))
    report.part("resume", CHECKS, resume, args)
    report.part("prepare", MEASURES, lambda row: s.update(bench.prepare(args, count=8)))
    for name, function, *more in (
            ("step shared", step, "shared"), ("rollouts", rollouts), ("step plain", step, "plain"),
            ("compiled", compiled), ("step trl", step, "trl")):
        report.part(name, MEASURES, function, args, s, *more)
    s.clear()  # the run needs the memory
    report.part("training", 1.0, training, args, report)
