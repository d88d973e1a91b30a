"""Evaluate rankers on held-out lists: metrics with 95% bootstrap intervals, a table, `eval.json`, and explanations to read.

    python eval.py --run runs/toy-tiny                        a finished run, on its own test lists
    python eval.py --model Qwen2.5-1.5B --data path/to/NAME   an untrained model: scored by log p(yes) - log p(no)
    python eval.py --run runs/toy-tiny --explain 3            three lists as a person wants to see them

Every system is a function from lists to scores and goes through `evaluate`. Ties are broken at random, from the seed.
"""

import argparse
import hashlib
import json
import random
import sys
import textwrap
from pathlib import Path

import torch
from tqdm import tqdm

import data
import policy
import r2r
from data import InputError, describe
from rewards import hit_at_k, ndcg_at_k, reciprocal_rank

CUTOFFS = (5, 10, 20)


def ranking(scores, seed=0):
    """Indices by descending score; ties in a random order that follows from the seed."""
    jitter = random.Random(seed)
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), jitter.random()))


def list_metrics(scores, relevance, seed=0):
    """All metrics of one list: {"ndcg@5": …, "hr@5": …, …, "mrr": …}."""
    ranked = [relevance[i] for i in ranking(scores, seed)]
    metrics = {f"ndcg@{k}": ndcg_at_k(ranked, k) for k in CUTOFFS}
    return metrics | {f"hr@{k}": hit_at_k(ranked, k) for k in CUTOFFS} | {"mrr": reciprocal_rank(ranked)}


def interval(values, samples=2000, seed=0):
    """{"mean", "low", "high"}: the mean over lists and its 95% percentile-bootstrap interval."""
    values = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(values[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def evaluate(scores, examples, seed=0):
    """scores: one (K,) sequence an example -> ({metric: interval}, {metric: [value a list]})."""
    rows = [list_metrics(s, e.relevance, f"{seed}/{n}") for n, (s, e) in enumerate(zip(scores, examples))]
    values = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: interval(v) for name, v in values.items()}, values


def random_scores(examples, seed=0):
    rng = random.Random(f"random/{seed}")
    return [[rng.random() for _ in e.candidates] for e in examples]


def popularity_scores(examples, counts):
    return [[counts[c.id] for c in e.candidates] for e in examples]


def model_scores(model, tokenizer, score_head, examples, sampling, num_samples=1, micro_batch=32, reasoning=True, label="eval"):
    """Scores and rationales of a language model, a few lists at a time: [(scores (K,), rationales [K][num_samples])]."""
    results = []
    rows = len(examples[0].candidates) * num_samples
    size = max(1, sampling.max_rows // rows)
    with tqdm(total=len(examples), desc=label, unit="list", leave=False) as bar:
        for start in range(0, len(examples), size):
            part = [(e.history, e.candidates) for e in examples[start:start + size]]
            results += r2r.score_lists(model, tokenizer, score_head, part, sampling, num_samples, micro_batch, reasoning)
            bar.update(len(part))
    return results


def table(systems, metrics=("ndcg@10", "hr@10", "mrr")):
    """A printable table of {name: {metric: interval}}; the interval is shown for the first metric."""
    lines = [f"{'system':<12} {metrics[0]:>8} {'95% interval':>16}" + "".join(f" {m:>8}" for m in metrics[1:])]
    for name, values in systems.items():
        first = values[metrics[0]]
        lines.append(f"{name:<12} {first['mean']:8.3f}   [{first['low']:.3f}, {first['high']:.3f}]"
                     + "".join(f" {values[m]['mean']:8.3f}" for m in metrics[1:]))
    return "\n".join(lines)


def difference(a, b):
    """The mean of a - b on the same lists, with its interval, as text."""
    d = interval([x - y for x, y in zip(a, b)])
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def write_eval(path, name, examples, systems, keep_other_systems=False):
    """Write eval.json. With keep_other_systems, systems that an earlier file holds on the very same lists stay in it."""
    path = Path(path)
    ids = [(e.user, [h.id for h in e.history], [c.id for c in e.candidates]) for e in examples]
    lists = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    if keep_other_systems and path.exists():
        earlier = json.loads(path.read_text())
        if (earlier["data"], earlier["lists"]) == (name, lists):
            systems = earlier["systems"] | systems
    report = {"data": name, "num_lists": len(examples), "lists": lists, "systems": systems}
    path.write_text(json.dumps(report, indent=1) + "\n")
    return systems


def explain(examples, results, count):
    """Print `count` lists for a person: the history, then the candidates, best first, each with its score and rationale."""
    for n, (example, (scores, rationales)) in enumerate(list(zip(examples, results))[:count]):
        print(f"\n=== list {n + 1}, user {example.user}\nhistory, oldest first")
        for item in example.history:
            print(f"    {describe(item)}")
        print("ranking (* = what the user chose)")
        for rank, i in enumerate(ranking(scores), start=1):
            mark = "*" if example.relevance[i] > 0 else " "
            print(f" {mark}{rank:3d}. {scores[i]:+8.3f}  {describe(example.candidates[i])}")
            for text in rationales[i][:1]:
                print(textwrap.indent(textwrap.fill(text.strip().replace("\n", " / ") or "(no rationale)", 110), " " * 17 + "| "))


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this torch sees no CUDA device; use --device cpu")
    return name


def pick_dtype(name, device):
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def positive(kind=int, zero=False):
    """An argparse type: a number above 0 (or not below)."""
    def parse(text):
        value = kind(text)
        if not (value > 0 or zero and value == 0):
            raise argparse.ArgumentTypeError(f"must be {'at least' if zero else 'above'} 0, not {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def add_common_flags(parser):
    """Flags that train.py and eval.py share, in groups."""
    g = parser.add_argument_group("data")
    g.add_argument("--data", default="toy", help="toy, or a folder with NAME.inter and NAME.item (default: toy)")
    g.add_argument("--split", choices=("temporal", "leave-one-out"), help="default: leave-one-out for folders; the toy's users are apart")
    g.add_argument("--num-candidates", type=positive(), default=20, metavar="K", help="candidates a list, one of them the positive (20)")
    g.add_argument("--history-length", type=positive(), default=10, metavar="N", help="latest interactions shown (10)")
    g = parser.add_argument_group("model")
    g.add_argument("--model", default="tiny", help="tiny, a local directory, a hub id, or a bare name such as Qwen2.5-1.5B (tiny)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the weights; training keeps float32 copies for the optimiser (auto: bfloat16 on cuda, else float32)")
    g.add_argument("--no-share-prefix", action="store_true", help="give every row its own copy of the prefix (slower; for comparison)")
    g.add_argument("--micro-batch", type=positive(), metavar="ROWS", help="rows a forward or backward pass; lower it when memory runs "
                   "out (models below 20M parameters: 80, else 16)")
    g.add_argument("--rollout-rows", type=positive(), default=320, metavar="ROWS", help="rows a generate call; lower it when memory runs out (320)")
    g = parser.add_argument_group("sampling")
    g.add_argument("--no-reasoning", action="store_true", help="the control: the head reads the prompt's last token, nothing is sampled")
    g.add_argument("--max-new-tokens", type=positive(), metavar="N", help="longest rationale (tiny: 48, else 256)")
    g.add_argument("--temperature", type=positive(float), default=1.0, help="of sampling and scoring alike (1.0)")
    g = parser.add_argument_group("evaluation")
    g.add_argument("--eval-lists", type=positive(), metavar="N", help="test lists (models below 20M parameters: 200; on a GPU: 500; else 20)")
    g.add_argument("--eval-samples", type=positive(), default=1, metavar="N", help="rationales a candidate whose scores are averaged; "
                   "1 means one greedy rationale (1)")
    g = parser.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of data, weights, sampling and order (0)")


def check_common_flags(args):
    """The checks that need no model; returns (dataset, device, dtype). Raises InputError."""
    if args.num_candidates < 2:
        raise InputError("--num-candidates: a list to rank needs at least 2")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    policy.resolve(args.model)
    dataset = data.load(args.data, args.split, args.seed)
    if args.num_candidates > len(dataset.items):
        raise InputError(f"--num-candidates {args.num_candidates}: {dataset.name} has only {len(dataset.items)} items")
    return dataset, device, dtype


def fill_model_defaults(args, model):
    """Defaults that depend on the model's size, where the user gave nothing."""
    small = sum(p.numel() for p in model.parameters()) < 20e6
    args.micro_batch = args.micro_batch or (80 if small else 16)
    args.max_new_tokens = args.max_new_tokens or (48 if small else 256)
    args.eval_lists = args.eval_lists or (200 if small else 500 if model.device.type == "cuda" else 20)


def sampling_of(args):
    return policy.Sampling(args.max_new_tokens, args.temperature, False, not args.no_share_prefix, args.rollout_rows)


def run_main(main):
    """Run a command line: what the user got wrong is one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--run", metavar="DIR", help="a run directory of train.py; its flags are the defaults here")
    parser.add_argument("--explain", type=positive(), metavar="N", help="print N lists with scores and rationales")
    parser.add_argument("--out", metavar="FILE", help="default: eval.json in the run directory, or in the current one")
    args = parser.parse_args()
    if args.run:
        config = Path(args.run) / "config.json"
        if not config.exists():
            raise InputError(f"--run {args.run}: no config.json there; give a directory that train.py wrote")
        if not (Path(args.run) / "checkpoint" / "config.json").exists():
            raise InputError(f"--run {args.run}: it holds no checkpoint yet; the run has not finished")
        flags = json.loads(config.read_text())["flags"]
        parser.set_defaults(**{k: v for k, v in flags.items() if k in vars(args) and k not in ("device", "dtype", "out")})
        args = parser.parse_args()
        args.model = str(Path(args.run) / "checkpoint")
    out = Path(args.out) if args.out else Path(args.run or ".") / "eval.json"
    dataset, device, dtype = check_common_flags(args)
    dataset.examples("test", 1, args.num_candidates, args.history_length, args.seed)  # bad lists are an error before any model
    if args.run:
        model, tokenizer, score_head = r2r.load_checkpoint(args.model, device, dtype)
    else:
        model, tokenizer = policy.load(args.model, device, dtype, dataset.texts(), args.seed)
        path = Path(args.model).expanduser() / "score_head.safetensors"
        score_head = r2r.ScoreHead.load(path).to(device) if path.exists() else None
    fill_model_defaults(args, model)
    reasoning = score_head.reasoning if score_head else not args.no_reasoning
    examples = dataset.examples("test", args.eval_lists, args.num_candidates, args.history_length, args.seed)
    torch.manual_seed(args.seed)
    results = model_scores(model, tokenizer, score_head, examples, sampling_of(args), args.eval_samples, args.micro_batch, reasoning)
    systems = {"random": random_scores(examples, args.seed), "popularity": popularity_scores(examples, dataset.popularity()),
               "rl" if score_head else "zero-shot": [scores for scores, _ in results]}
    systems = {name: evaluate(scores, examples, args.seed)[0] for name, scores in systems.items()}
    systems = write_eval(out, dataset.name, examples, systems, keep_other_systems=bool(args.run))
    if args.explain:
        explain(examples, results, args.explain)
        print()
    print(f"{dataset.name}: {len(examples)} test lists of {args.num_candidates} candidates\n{table(systems)}\nwritten to {out}")


if __name__ == "__main__":
    run_main(main)
