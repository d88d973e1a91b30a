"""Benchmarks; pytest does not collect this file.

    python tests/bench.py load                     1,000,000 interactions and 100,000 items, in the true formats: seconds, peak memory
    python tests/bench.py lightgcn --data beauty   LightGCN on a data set's training interactions: seconds, peak memory
    python tests/bench.py step --model DIR         an RL step with and without the shared prefix: tokens/s, seconds, share of the machine's
                                                   matmul peak, peak memory; a table, and bench.json. With --peer trl, TRL's beside it
    python tests/bench.py law --model DIR          steps over K, G, history, new tokens and model size; a law fitted to them, and what it
                                                   says: results/cost-law.json, and .svg where matplotlib is installed
    python tests/bench.py law --predict FILE --num-candidates 1000 --group-size 1      that law's answer to another question

How it is measured. Everything runs in one process, the modes by turns, and medians are reported. The matmul peak, too, is measured at every
turn, as the speed of a shared machine drifts. Before each phase the C library hands back what it has free and the kernel's
high-water mark is put back (Linux), so a peak is the phase's own; "before" is what stayed. On CUDA both are the allocator's.
FLOPs are the model's own, what the step *needs*: 2 a weight of the layers for each token, 4 x heads x head size a layer for each pair of
positions that attend, 2 a weight of the head for each rationale token; an update three times its forward pass. A token counts once where
the mode needs it once: with a shared prefix, prefixes once a list, suffixes once a candidate, rationales a row each; without (and in
TRL), the whole prompt for each row. Padding, recomputation, the optimiser and the credit count nothing: they lower the share.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import gzip
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import data
import eval as evaluation
import policy
import r2r
import train
from data import InputError

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


# --- measuring -------------------------------------------------------------------------------------------------------------


def status(field):
    """Bytes of a field of this process's status, such as VmRSS; NaN where there is none (not Linux)."""
    with contextlib.suppress(OSError, StopIteration):
        return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])
    return math.nan


@contextlib.contextmanager
def watched(phases, name, device):
    """Adds the seconds, peak bytes and bytes before of a block (of the process, or of the GPU) to the lists in phases[name]."""
    on_gpu = device.startswith("cuda")
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    before, started = torch.cuda.memory_allocated() if on_gpu else status("VmRSS"), time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM")
    for key, value in (("seconds", seconds), ("peak", peak), ("before", before)):
        phases.setdefault(name, {}).setdefault(key, []).append(value)


def rate(work, function, device, repeats=8):
    """Work a second, in the fastest of some calls."""
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return work / best


def matmul_peak(dtype, device):
    """FLOP/s of large square matrix products: what the machine can do, now."""
    n = 8192 if device.startswith("cuda") else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return rate(2 * n**3, lambda: a @ b, device)


def medians(phases):
    return {phase: {k: statistics.median(v) for k, v in values.items()} for phase, values in phases.items()}


# --- what a step needs -------------------------------------------------------------------------------------------------------


def dimensions(model):
    """The numbers of a model that its cost depends on."""
    config, embedding, output = model.config.get_text_config(), model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tables = sum(w.numel() for w in {id(w): w for w in (embedding, output)}.values())
    return {"parameters": sum(p.numel() for p in model.parameters()), "layers": config.num_hidden_layers, "hidden": config.hidden_size,
            "body": sum(p.numel() for p in model.parameters() if p.dim() > 1) - tables, "output": output.numel(), "vocabulary": output.shape[0],
            "attention": config.num_attention_heads * head, "keys_and_values": 2 * config.num_key_value_heads * head, "bytes": embedding.element_size()}


def forward_flops(size, sequences, predicted):
    """Model FLOPs of a forward pass. sequences: [(tokens, tokens before them)]; predicted: positions whose next token is looked at."""
    tokens, pairs = sum(n for n, _ in sequences), sum(n * past + n * (n + 1) / 2 for n, past in sequences)
    return 2 * size["body"] * tokens + 4 * size["attention"] * size["layers"] * pairs + 2 * size["output"] * predicted


def needs(size, prefix, suffixes, args, share=True):
    """What a step on one list needs: model FLOPs, and what the cost law goes by. prefix, suffixes (K): tokens; all but counts are bytes."""
    K, G, new, layers = len(suffixes), args.group_size, args.new_tokens, size["layers"]
    rows = K * G
    prompts = [(prefix, 0), *((s, prefix) for s in suffixes)] if share else [(prefix + s, 0) for s in suffixes] * G
    lengths = [prefix + s for s in suffixes] * G
    read, decode = forward_flops(size, prompts, 0), forward_flops(size, [(new, n) for n in lengths], rows * new)
    token = size["keys_and_values"] * layers * size["bytes"]  # keys and values of one token
    length, held, part = sum(lengths) / rows + new, min(rows, args.rollout_rows), min(rows, args.micro_batch)
    common = prefix + sum(suffixes) if share else 0  # tokens whose keys and values rows have in common while sampling
    own = [new if share else n + new for n in lengths]
    suffix_tokens = max(1, part / G) * sum(suffixes) / K  # of the candidates in a micro-batch
    activity = (sum(n for n, _ in prompts) + rows * new) * layers * size["hidden"] * size["bytes"]  # each token's states through the layers
    return {"tokens": rows * new, "activity": activity, "rollout_flops": read + decode, "update_flops": 3 * (read + decode), "read_flops": read, "decode_flops": decode,
            "cache_read": (new * common + sum(new * n - new**2 / 2 for n in own)) * token, "decode_layers": math.ceil(rows / args.rollout_rows) * new * layers,
            "credit": rows**2, "credit_held": 4 * (rows**2 + min(43 * rows**2, r2r.CREDIT_ELEMENTS)), "cache_copies_read": rows * length * token, "update_layers": (4 * math.ceil(rows / args.micro_batch) + 2) * layers, "parameters": size["parameters"],
            "cache_held": (common + held * sum(own) / rows) * token, "logits": held * size["vocabulary"] * 4, "gradients": 4 * size["parameters"],
            "activations": (prefix + suffix_tokens + part * new) * layers * size["hidden"] * size["bytes"],
            "cache_copies": part * length * token, "chunk": min(part * new * size["vocabulary"], policy.CHUNK_ELEMENTS) * 4}


def state_bytes(size):
    """Weights, gradients and Adam's two moments; beside weights that are not float32, a float32 copy."""
    return size["parameters"] * (16 if size["bytes"] == 4 else size["bytes"] + 16)


# --- a step ------------------------------------------------------------------------------------------------------------------


def changed(args, **new):
    return argparse.Namespace(**{**vars(args), **new})


def set_up(args, source, texts=()):
    """Everything that a step works with."""
    device = evaluation.pick_device(args.device)
    torch.manual_seed(0)
    model, tokenizer = policy.load(source, device, evaluation.pick_dtype(args.dtype, device), texts)
    if args.gradient_checkpointing:
        policy.checkpoint_activations(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    policy.stop_ids = lambda *_: [vocabulary]  # never drawn: rationales of one length
    head = r2r.ScoreHead(model.config.get_text_config().hidden_size).to(device)
    optimizer = train.Optimizer([{"params": [*model.parameters(), *head.parameters()], "lr": 1e-6}])
    return SimpleNamespace(model=model, tokenizer=tokenizer, head=head, optimizer=optimizer, device=device, size=dimensions(model), peer=None)


def choose_example(dataset, num_candidates, history_length, before=None):
    """The first training list of a user with `before` (None: history_length) items before it, or with the most that anyone has."""
    targets, wanted = dataset.targets("train"), before or history_length
    target = next((t for t in targets if t[1] >= wanted), None) or max(targets, key=lambda t: t[1])
    return dataset.example(target, num_candidates, history_length)


def our_step(s, example, args, share, phases):
    """A step of train.py with one update a rollout. Returns (the prompts, tokens sampled)."""
    torch.manual_seed(0)
    prompt = r2r.build_prompt(s.tokenizer, example.history, example.candidates)
    sampling = policy.Sampling(args.new_tokens, share_prefix=share, max_rows=args.rollout_rows)
    s.model.train()
    with watched(phases, "rollout", s.device):
        rollout = r2r.generate(s.model, s.tokenizer, [prompt], [torch.tensor(example.relevance)], args.group_size, sampling)
    with watched(phases, "credit", s.device):
        signal = r2r.signal(r2r.score(None, s.head, rollout))
    with watched(phases, "update", s.device):
        s.optimizer.clear()
        r2r.backward(s.model, s.head, rollout, signal, micro_batch=args.micro_batch, share_prefix=share)
        s.optimizer.step()
    return prompt, sum(map(len, rollout.responses))


def trl_step(s, example, args, phases):
    """The same step by TRL's GRPOTrainer: our prompts' ids, as many tokens, token-level clipped loss, micro-batches, AdamW.

    It works on the same weights, gradients and AdamW (in float32; otherwise on its own, all in that dtype: TRL's way), with the attention
    that transformers chooses. The rollout ends with `generate`; rewards and advantages count to the update.
    """
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise InputError(f"--peer trl needs TRL ({error}): pip install trl, or leave out --peer") from None
    rows = len(example.candidates) * args.group_size
    if not (hasattr(GRPOTrainer, "_tokenize_prompts") and hasattr(GRPOTrainer, "_generate_single_turn")):
        raise InputError("--peer trl: this TRL is built differently; TRL 1.16 is known to work")
    if args.group_size < 2 or rows % args.micro_batch:
        raise InputError("--peer trl: TRL needs --group-size of 2 or more, and --num-candidates x --group-size must be a multiple of --micro-batch")
    prompt = r2r.build_prompt(s.tokenizer, example.history, example.candidates)
    own = s.size["bytes"] != 4
    if s.peer is None:
        model = copy.deepcopy(s.model, None if own else {id(p): p for p in s.model.parameters()})
        model.set_attn_implementation("sdpa")
        s.peer = model, torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0) if own else s.optimizer.adamw
    model, adamw = copy.deepcopy(s.peer[0], {id(p): p for p in s.peer[0].parameters()}), s.peer[1]  # TRL patches what it is given
    ends, phase, sampled = [s.size["vocabulary"]], contextlib.ExitStack(), []

    class Trainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts):  # a prompt is a candidate's number, so the ids are ours, whatever joined text would give
            return [prompt.prefix_ids + prompt.suffix_ids[int(p)] for p in prompts], None, {}

        def _generate_single_turn(self, prompt_ids, *rest, **named):
            out = super()._generate_single_turn(prompt_ids, *rest, **named)
            phase.close()
            phase.enter_context(watched(phases, "update", s.device))
            sampled.extend(map(len, out[0]))
            return out

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            phase.enter_context(watched(phases, "rollout", s.device))

        def on_step_end(self, *_, **__):
            phase.close()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, max_steps=1, per_device_train_batch_size=args.micro_batch, gradient_accumulation_steps=rows // args.micro_batch,
            num_generations=args.group_size, max_completion_length=args.new_tokens, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2,
            num_iterations=1, loss_type="dapo", max_grad_norm=1.0, bf16=False, fp16=False, gradient_checkpointing=args.gradient_checkpointing,
            generation_kwargs={"eos_token_id": ends}, use_cpu=s.device == "cpu", report_to=[], save_strategy="no", logging_strategy="no",
            shuffle_dataset=False)
        with contextlib.redirect_stdout(sys.stderr):
            trainer = Trainer(model=model, reward_funcs=lambda completions, **_: [float(n % 2) for n in range(len(completions))], args=config,
                              train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(prompt.suffix_ids))]}),
                              processing_class=copy.deepcopy(s.tokenizer), callbacks=[Clock()],
                              optimizers=(adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda _: 1.0)))
            trainer.eos_token_ids = ends
            trainer.train()
    adamw.zero_grad()
    return prompt, sum(sampled)


def step(args):
    modes = dict.fromkeys(args.modes.split(","), args.repeats) | ({"trl": args.peer_repeats or args.repeats} if args.peer else {})
    if unknown := set(modes) - {"shared", "plain", "trl"}:
        raise InputError(f"--modes {','.join(unknown)}: there are shared and plain")
    if "plain" in modes:
        modes["plain"] = args.plain_repeats or args.repeats
    dataset = data.load(args.data)
    s = set_up(args, args.model, dataset.texts() + [r2r.SYSTEM, r2r.QUESTION])
    example, gpu = choose_example(dataset, args.num_candidates, args.history_length), s.device.startswith("cuda")
    run = lambda mode, *rest: trl_step(s, *rest) if mode == "trl" else our_step(s, *rest[:2], mode == "shared", rest[2])
    for mode in modes:  # warm up: threads, Adam's moments, imports; on a GPU also kernels and blocks of memory, so with the full size
        short = changed(args, new_tokens=4, micro_batch=2 * args.group_size)
        run(mode, *((example, args) if gpu else (choose_example(dataset, 2, 2), short)), {})
    results, tokens, peaks = {mode: {} for mode in modes}, {}, []
    for repeat in range(max(modes.values())):
        for mode in (m for m in modes if repeat < modes[m]):
            peaks.append(matmul_peak(s.model.dtype, s.device))
            prompt, tokens[mode] = run(mode, example, args, results[mode])
            print(f"{mode} {repeat + 1}/{modes[mode]}: " + ", ".join(f"{k} {v['seconds'][-1]:.1f} s" for k, v in results[mode].items()), file=sys.stderr)
    peaks.append(matmul_peak(s.model.dtype, s.device))
    bandwidth = None
    if gpu:
        x, y = torch.empty(2, 2**28, device=s.device)
        bandwidth = rate(2 * x.nbytes, lambda: y.copy_(x), s.device)

    size, peak, prefix, suffixes = s.size, statistics.median(peaks), len(prompt.prefix_ids), [len(x) for x in prompt.suffix_ids]
    needed = {mode: needs(size, prefix, suffixes, args, mode == "shared") for mode in modes}
    state, limit = state_bytes(size), 1.25 * state_bytes(size) + 1.5e9
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model}: {size['parameters'] / 1e6:.0f}M parameters, {s.model.dtype}, {machine}; {len(suffixes)} candidates x {args.group_size}, prefix of "
          f"{prefix} tokens, suffixes of {statistics.mean(suffixes):.0f}, {args.new_tokens} new\nmatmul peak {peak / 1e9:.0f} GFLOP/s "
          f"({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}); medians of {modes}\n"
          f"{'':<16} {'seconds':>8} {'tokens/s':>9} {'TFLOPs':>8} {'of peak':>8} {'before GB':>10} {'peak GB':>8}")
    table = {}
    for mode, phases in results.items():
        assert tokens[mode] == needed[mode]["tokens"]
        for phase, row in medians(phases).items():
            flops = needed[mode].get(f"{phase}_flops", 0.0)
            table[f"{mode} {phase}"] = row | {"tokens_per_second": tokens[mode] / row["seconds"], "share_of_peak": flops / row["seconds"] / peak}
            print(f"{mode + ' ' + phase:<16} {row['seconds']:8.2f} {tokens[mode] / row['seconds']:9.0f} {flops / 1e12:8.2f} "
                  f"{flops / row['seconds'] / peak:8.1%} {row['before'] / 1e9:10.2f} {row['peak'] / 1e9:8.2f}")
        seconds = statistics.median(map(sum, zip(*(v["seconds"] for v in phases.values()))))
        table[f"{mode} step"] = {"seconds": seconds}
        print(f"{mode + ' step':<16} {seconds:8.2f}" + (f"   {seconds / table['shared step']['seconds']:.2f} times the shared" if mode != "shared" and "shared" in modes else ""))
        if gpu:  # each token step reads the weights once, and each row's keys and values
            moved = args.new_tokens * (size["body"] + size["output"]) * size["bytes"] + needed[mode]["cache_read"]
            share = table[f"{mode} rollout"]["share_of_bandwidth"] = moved / table[f"{mode} rollout"]["seconds"] / bandwidth
            print(f"{mode} rollout: {share:.1%} of the memory bandwidth ({bandwidth / 1e9:.0f} GB/s copying)")
    print(f"weights, gradients and Adam's moments: {state / 1e9:.2f} GB; 1.25 times that and 1.5 GB: {limit / 1e9:.2f} GB")
    write(args.out, {"machine": machine, "dtype": str(s.model.dtype), "flags": flags_of(args), "size": size, "prefix_tokens": prefix, "suffix_tokens": suffixes,
                     "sampled_tokens": tokens, "matmul_peaks": peaks, "copy_bandwidth": bandwidth, "state_bytes": state, "memory_limit": limit,
                     "needs": needed, "phases": results, "table": table})


def flags_of(args):
    """Flags to be written down, without the folders of this machine."""
    return {k: Path(v).name if k in ("model", "data") and v else v for k, v in vars(args).items() if k not in ("run", "out", "predict")}


def write(path, report):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


# --- the cost law ------------------------------------------------------------------------------------------------------------

LAW = {  # what is explained: by which of the quantities of `needs` ("constant" is 1); no coefficient is negative
    "rollout seconds": ("read_flops", "decode_flops", "activity", "cache_read", "decode_layers", "constant"),
    "credit seconds": ("credit", "constant"),
    "update seconds": ("update_flops", "activity", "cache_copies_read", "update_layers", "parameters", "constant"),
    "rollout memory": ("cache_held", "logits", "constant"),  # memory: above what is there before the phase
    "credit memory": ("credit_held", "constant"),
    "update memory": ("gradients", "activations", "cache_copies", "chunk", "constant"),
}
BASE = {"num_candidates": 20, "group_size": 4, "history_length": 10, "new_tokens": 48}
SWEEP = {"num_candidates": (5, 10, 20, 50, 100), "group_size": (1, 2, 4, 8, 16), "history_length": (5, 10, 20, 50), "new_tokens": (16, 48, 128, 512)}
SIZES = {"3M": (192, 8, 3), "10M": (384, 6, 6), "30M": (576, 9, 9)}  # hidden size, layers, heads of 64: SmolLM2's proportions


def nonnegative_fit(features, values):
    """x >= 0 that minimises the sum of squared *relative* errors of features (N, M) @ x against values (N,): the best over all sets of
    columns (M is small) whose least-squares solution has no negative number."""
    A = torch.tensor(features, dtype=torch.float64) / torch.tensor(values, dtype=torch.float64)[:, None]
    scale = A.abs().amax(0).clamp(min=1e-300)
    best, found = math.inf, torch.zeros(A.shape[1], dtype=torch.float64)
    for n in range(1, A.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(A.shape[1]), n)):
            x = torch.linalg.lstsq(A[:, chosen] / scale[chosen], torch.ones(len(A), 1, dtype=torch.float64), driver="gelsd").solution[:, 0] / scale[chosen]
            error = (A[:, chosen] @ x - 1).square().sum()
            if (x >= 0).all() and error < best:
                best, found = error, torch.zeros_like(found).index_copy(0, torch.tensor(chosen), x)
    return found.tolist()


def predicted(law, name, need):
    return sum(c * need.get(k, 1.0) for k, c in law["coefficients"][name].items())


def measured(point, name):
    phase, kind = name.split()
    values = point["phases"][phase]
    return values["seconds"] if kind == "seconds" else max(1e7, values["peak"] - values["before"])  # less than 10 MB is noise


def random_model(folder, tokenizer, hidden, layers, heads):
    """A random Llama in a folder, to be loaded like any other."""
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 3, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(law, args):
    """Measures the points of the sweep into law["points"], and what the law must know of models and texts."""
    dataset = data.load(args.data)
    points = [("10M", BASE)] + [("10M", {**BASE, name: v}) for name, values in SWEEP.items() for v in values if v != BASE[name]]
    points += [(name, BASE) for name in ("3M", "30M", Path(args.model or "").name) if name]
    _, tokenizer = policy.build_tiny(dataset.texts() + [r2r.SYSTEM, r2r.QUESTION], vocab_size=args.vocabulary)
    s, prefixes = None, {}
    for name, point in points:
        if name not in law["models"]:
            s = None  # before the next is loaded
            with tempfile.TemporaryDirectory() as folder:
                s = set_up(args, random_model(folder, tokenizer, *SIZES[name]) if name in SIZES else args.model)
            law["models"][name] = s.size
            our_step(s, choose_example(dataset, 5, 5), changed(args, new_tokens=4), True, {})  # warm up
        now, phases = changed(args, **point), {}
        example = choose_example(dataset, now.num_candidates, now.history_length, max(SWEEP["history_length"]))
        peak = matmul_peak(s.model.dtype, s.device)
        for _ in range(args.repeats):
            prompt, tokens = our_step(s, example, now, True, phases)
        prefix, suffixes, items = len(prompt.prefix_ids), [len(x) for x in prompt.suffix_ids], len(example.history)
        law["points"].append({"model": name, **point, "history_length": items, "prefix_tokens": prefix, "suffix_tokens": statistics.mean(suffixes),
                              "sampled_tokens": tokens, "matmul_peak": peak, "needs": needs(s.size, prefix, suffixes, now), "phases": medians(phases)})
        if name in SIZES:
            prefixes[items] = prefix
        print(f"{name[-12:]:<12} K {now.num_candidates:<4} G {now.group_size:<3} history {items:<3} new {now.new_tokens:<4} "
              + "   ".join(f"{k} {v['seconds']:7.2f} s {v['peak'] / 1e9:5.2f} GB" for k, v in law["points"][-1]["phases"].items()), flush=True)
    few, many = min(prefixes), max(prefixes)
    item = (prefixes[many] - prefixes[few]) / max(1, many - few)
    law["tokens"] = {"item": item, "instructions": prefixes[few] - few * item, "candidate": law["points"][0]["suffix_tokens"]}


def law(args):
    """Measure, fit, draw and answer; with --predict answer alone."""
    if args.predict:
        try:
            return answer(json.loads(Path(args.predict).read_text()), args)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--predict {args.predict}: not a file that `bench.py law` wrote ({error})") from None
    found = {"flags": flags_of(args), "threads": torch.get_num_threads(), "models": {}, "points": [], "coefficients": {}, "errors": {}}
    measure(found, args)
    fitted = [p for p in found["points"] if p["model"] in SIZES]  # --model is left out: a test of the law
    print("\n                    largest   median   error; coefficients")
    for name, columns in LAW.items():
        x = nonnegative_fit([[p["needs"].get(c, 1.0) for c in columns] for p in fitted], [measured(p, name) for p in fitted])
        found["coefficients"][name] = dict(zip(columns, x))
        error = lambda p: predicted(found, name, p["needs"]) / measured(p, name) - 1
        own = sorted(abs(error(p)) for p in fitted)
        found["errors"][name] = {"largest": own[-1], "median": statistics.median(own), "unseen": [error(p) for p in found["points"] if p not in fitted]}
        print(f"{name:<18} {own[-1]:8.1%} {statistics.median(own):8.1%}   " + ", ".join(f"{c} {v:.3g}" for c, v in zip(columns, x) if v)
              + "".join(f"   ({e:+.0%} on {args.model}, not fitted)" for e in found["errors"][name]["unseen"]))
    write(args.out, found)
    draw(found, Path(args.out).with_suffix(".svg"))
    answer(found, changed(args, **BASE))


def answer(law, args):
    """Print what the law says about the flags' own step, about ranking 1,000 candidates, and about a million users."""
    print(f"\nby the law, on the machine that it was measured on, {args.history_length} items of history, {args.new_tokens} new tokens (GB: without the libraries)")
    text, prefix = law["tokens"], round(law["tokens"]["instructions"] + args.history_length * law["tokens"]["item"])
    for model, size in law["models"].items():
        for K, G, training in ((args.num_candidates, args.group_size, True), (1000, args.group_size, True), (1000, 1, False), (20, 1, False)):
            need = needs(size, prefix, [round(text["candidate"])] * K, changed(args, group_size=G))
            phases = ("rollout", "credit", "update") if training else ("rollout",)
            seconds = sum(predicted(law, f"{phase} seconds", need) for phase in phases)
            state = state_bytes(size) - need["gradients"] if training else size["parameters"] * size["bytes"]
            memory = state + max(predicted(law, f"{phase} memory", need) for phase in phases)
            flops = need["rollout_flops"] + need["update_flops"] * training
            print(f"{model[-12:]:<12} {f'an RL step, K={K}, G={G}' if training else f'ranking {K} candidates, G={G}':<30} {flops / 1e12:9.2f} TFLOPs "
                  f"{seconds:9.1f} s {memory / 1e9:7.2f} GB")
        print(f"{'':<12} a million users, 20 candidates each, G=1, on N GPUs of R FLOP/s sustained: {1e6 * flops:.2g} / (N R) s; hours: "
              + ", ".join(f"N={n} R={r:g}: {1e6 * flops / (n * r * 3600):.2g}" for n in (1, 8) for r in (args.gpu_flops, 10 * args.gpu_flops)))


def draw(law, path):
    """Seconds of rollout and update over each of the five variables: points measured, lines the law's."""
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print(f"{path} is not drawn: matplotlib is not installed")
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 5, figsize=(13, 3), sharey=True, layout="constrained")
    seconds = [p["phases"][phase]["seconds"] for p in law["points"] if p["model"] in SIZES for phase in ("rollout", "update")]
    low, high = min(seconds), max(seconds)
    for axis, name, label in zip(axes, [*SWEEP, "parameters"], ("candidates K", "rationales G", "history items", "new tokens", "parameters")):
        value = lambda p: law["models"][p["model"]]["parameters"] if name == "parameters" else p[name]
        own = sorted((p for p in law["points"] if p["model"] in (SIZES if name == "parameters" else ("10M",))
                      and all(p[k] == v for k, v in BASE.items() if k != name)), key=value)
        for phase, colour, mark in (("rollout", "#0072b2", "o"), ("update", "#d55e00", "s")):
            axis.plot([value(p) for p in own], [predicted(law, f"{phase} seconds", p["needs"]) for p in own], color=colour, linewidth=1.2)
            axis.plot([value(p) for p in own], [p["phases"][phase]["seconds"] for p in own], mark, color=colour, markersize=5, label=phase)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks([value(p) for p in own], [f"{value(p) / 1e6:.0f}M" if name == "parameters" else str(value(p)) for p in own])
        axis.set_yticks(ticks := [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 1.5 < t < 1.5 * high], [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(axis="y", linewidth=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{law['models']['10M']['parameters'] / 1e6:.0f}M parameters, K=20, G=4, 10 items, 48 tokens but for the one that varies: "
                    "points measured, lines the law", fontsize=9)
    figure.savefig(path)
    print(f"drawn: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("load")
    p.add_argument("--interactions", type=int, default=10**6)
    p.add_argument("--items", type=int, default=10**5)
    p.set_defaults(run=load)
    p = commands.add_parser("lightgcn")
    p.add_argument("--data", default="beauty")
    p.set_defaults(run=lightgcn)
    positive = evaluation.positive
    for command in (step, law):
        p = commands.add_parser(command.__name__)
        p.add_argument("--model", default="tiny" if command is step else None, help="tiny or a directory; for the law, a model to test it on")
        p.add_argument("--data", default="toy")
        p.add_argument("--device", default="auto")
        p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
        p.add_argument("--gradient-checkpointing", action="store_true")
        for name, value in (*BASE.items(), ("micro_batch", 16), ("rollout_rows", 320), ("repeats", 3 if command is step else 2)):
            p.add_argument(f"--{name.replace('_', '-')}", type=positive(), default=value, help=f"({value})")
        p.add_argument("--out", default="bench.json" if command is step else "results/cost-law.json")
        p.set_defaults(run=command)
        if command is step:
            p.add_argument("--modes", default="shared,plain", help="shared, plain or both (both)")
            p.add_argument("--plain-repeats", type=positive(), help="of the mode without a shared prefix (--repeats)")
            p.add_argument("--peer", choices=("trl",), help="the same step by another library")
            p.add_argument("--peer-repeats", type=positive(), help="(--repeats)")
        else:
            p.add_argument("--vocabulary", type=positive(), default=8000, help="of the sweep's random models (8000)")
            p.add_argument("--predict", metavar="FILE", help="ask a law measured before, about --num-candidates, --group-size …")
            p.add_argument("--gpu-flops", type=positive(float), default=1e13, help="sustained FLOP/s of a GPU, for the million users (1e13)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    evaluation.run_main(main)
