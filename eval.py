"""Evaluate on held-out lists: metrics with 95% bootstrap intervals, tables, baselines, rationales to read.

    python eval.py --run runs/toy-tiny                      a run, on its own test lists
    python eval.py --run runs/toy-tiny --explain 3          three lists as a person wants to see them
    python eval.py --run runs/toy-tiny --recommend u001     what the model recommends to a user
    python eval.py --run runs/toy-tiny-rerec --ask "..."    a request of your own
    python eval.py --model Qwen2.5-1.5B --data beauty       an untrained model: log p(yes) - log p(no)
    python eval.py --baselines --data beauty                what to compare with, on the same lists
    python eval.py --open-ended answers.jsonl --data recbench:movie --data-dir DIR     RecBench+'s own metrics

Every system is a function from lists to scores and goes through `evaluate`. Equal scores count as the
expected value over random orders of the tied: no system gains by being undecided. Intervals resample users.
A finished run's eval.json and result.json are never changed: what is evaluated again goes to another file.
"""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # flags first: torch takes seconds
    from extras.flags import parse_eval_flags, run_main
    ARGS = run_main(lambda: parse_eval_flags(description=__doc__))

import torch
from tqdm import tqdm

import data
import policy
import r2r
import rerec
from data import InputError

CUTOFFS = (1, 5, 10, 20)
METRICS = [*(f"ndcg@{k}" for k in CUTOFFS), *(f"hr@{k}" for k in CUTOFFS), "mrr", "rank"]
QUERY_METRICS = ("accuracy", "ndcg@10", "format_rate", "length")


# --- metrics --------------------------------------------------------------------------------------------

def expected_metrics(groups):
    """The expected metrics of a ranking with ties, over all orders of the tied: {"ndcg@1", ..., "rank"}.

    groups: (number of items, relevance of the relevant ones among them) for each distinct score, best first.
    `rank` is that of the first relevant item. Of n tied items, m of them relevant, behind `start` others:
    each takes each place with probability 1/n, the first relevant one place start + j with C(n - j, m - 1)
    / C(n, m).
    """
    dcg, hits, mrr, rank, start = Counter(), {}, 0.0, None, 0
    for n, relevant in groups:
        for k in CUTOFFS if relevant else ():
            places = range(start + 1, min(start + n, k) + 1)
            dcg[k] += sum(2.0**y - 1 for y in relevant) * sum(1 / math.log2(r + 1) for r in places) / n
        if relevant and rank is None:
            m = len(relevant)
            rank = start + (n + 1) / (m + 1)
            hits = {k: 1 - math.comb(n - min(n, max(0, k - start)), m) / math.comb(n, m) for k in CUTOFFS}
            places = range(1, n - m + 2)
            mrr = sum(math.comb(n - j, m - 1) / math.comb(n, m) / (start + j) for j in places)
        start += n
    ideal = sorted((2.0**y - 1 for _, relevant in groups for y in relevant), reverse=True)
    best = {k: sum(g / math.log2(r + 2) for r, g in enumerate(ideal[:k])) for k in CUTOFFS}
    ndcg = {f"ndcg@{k}": dcg[k] / best[k] if best[k] else 0.0 for k in CUTOFFS}
    return ndcg | {f"hr@{k}": hits.get(k, 0.0) for k in CUTOFFS} | {
        "mrr": mrr, "rank": float(start + 1 if rank is None else rank)}

def list_metrics(scores, relevance):
    """expected_metrics of one list: (K,) scores and relevance. Raises ValueError for a score that is NaN."""
    pairs = [(float(s), float(y)) for s, y in zip(scores, relevance, strict=True)]
    if any(math.isnan(s) for s, _ in pairs):
        raise ValueError("a score is not a number")
    pairs.sort(key=lambda p: -p[0])
    groups = [[y for _, y in group] for _, group in itertools.groupby(pairs, key=lambda p: p[0])]
    return expected_metrics([(len(g), [y for y in g if y > 0]) for g in groups])

def intervals(columns, users=None, samples=2000, seed=0):
    """{name: values (L,)} -> {name: {"mean", "low", "high"}}: 95% percentile bootstrap over users.

    A user's lists are drawn together, since they are not independent; users None: each list is a user's.
    """
    names = list(columns)
    values = torch.tensor([columns[n] for n in names], dtype=torch.float64).T  # (L, C)
    users = range(len(values)) if users is None else users
    number = {u: n for n, u in enumerate(dict.fromkeys(users))}
    owner = torch.tensor([number[u] for u in users])
    sums = torch.zeros(len(number), len(names), dtype=torch.float64).index_add_(0, owner, values)
    sizes = torch.bincount(owner).double()
    generator, means = torch.Generator().manual_seed(seed), []
    for _ in range(0, samples, 100):
        draws = torch.randint(len(number), (100, len(number)), generator=generator)
        times = torch.zeros(draws.shape, dtype=torch.float64)  # how often each user was drawn
        times.scatter_add_(1, draws, torch.ones_like(times))
        means.append((times @ sums) / (times @ sizes)[:, None])
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), quantiles, dim=0).tolist()
    rows = zip(names, values.mean(0).tolist(), low, high)
    return {name: {"mean": m, "low": a, "high": b} for name, m, a, b in rows}

def evaluate(scores, examples):
    """scores: one (K,) sequence an example -> ({metric: interval}, {metric: [value a list]})."""
    rows = [list_metrics(s, e.relevance) for s, e in zip(scores, examples, strict=True)]
    values = {name: [row[name] for row in rows] for name in METRICS}
    return intervals(values, [e.user for e in examples]), values

def difference(a, b, users=None):
    """The mean of a - b on the same lists, with its interval, as text."""
    d = intervals({"": [x - y for x, y in zip(a, b, strict=True)]}, users)[""]
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"

def paired_differences(values, users, metrics=METRICS):
    """{system: {metric: values}} -> {"a - b": {metric: interval}}, each pair of systems on the same lists."""
    pairs = [(a, b) for b, a in itertools.combinations(values, 2)]
    columns = {(a, b, m): [x - y for x, y in zip(values[a][m], values[b][m])]
               for a, b in pairs for m in metrics}
    found = intervals(columns, users) if columns else {}
    return {f"{a} - {b}": {m: found[a, b, m] for m in metrics} for a, b in pairs}

def table(systems, metrics=("ndcg@10", "hr@10", "mrr")):
    """A printable table of {name: {metric: interval}}; the interval is shown for the first metric."""
    width = max(12, *map(len, systems))
    first, *others = metrics
    lines = [f"{'system':<{width}} {first:>8} {'95% interval':>16}" + "".join(f" {m:>8}" for m in others)]
    for name, values in systems.items():
        v = values[first]
        lines.append(f"{name:<{width}} {v['mean']:8.3f}   [{v['low']:.3f}, {v['high']:.3f}]"
                     + "".join(f" {values[m]['mean']:8.3f}" for m in others))
    return "\n".join(lines)


# --- lists (R2Rank) -------------------------------------------------------------------------------------

def model_scores(model, tokenizer, head, examples, args, label="eval"):
    """A language model's [(scores (K,), rationales [K][samples])] of lists, a few at a time."""
    results = []
    rows = max((len(e.candidates) for e in examples), default=1) * args.eval_samples
    size = max(1, policy.MAX_ROWS // rows)
    with tqdm(total=len(examples), desc=label, unit="list", leave=False) as bar:
        for start in range(0, len(examples), size):
            lists = [(e.history, e.candidates) for e in examples[start:start + size]]
            results += r2r.score_lists(model, tokenizer, head, lists, args, args.eval_samples)
            bar.update(len(lists))
    return results

class ListTest:
    """Held-out lists: what train.py and this file measure systems on, and how they report it."""

    def __init__(self, dataset, args):
        self.dataset, self.args = dataset, args
        if args.candidates:
            misses, length = getattr(args, "count_misses", False), args.history_length
            lists = data.read_lists(args.candidates, dataset.items, misses)[:args.eval_lists]
            self.items = [replace(e, history=e.history[-length:]) for e in lists]
        else:
            self.items = dataset.examples("test", args.eval_lists, args.num_candidates, args.history_length,
                                          args.seed)
        self.users = [e.user for e in self.items]
        self.hash = data.fingerprint(self.items)

    def measure(self, model, tokenizer, head, items, label):
        """Of some of the lists: [(K scores, a rationale of each candidate)]."""
        found = model_scores(model, tokenizer, head, items, self.args, label)
        return [(scores.tolist(), [texts[0] for texts in rationales]) for scores, rationales in found]

    def report(self, results):
        """The report of {system: scores of all lists} beside random and popularity: printed, and a dict."""
        rng, counts = random.Random(f"random/{self.args.seed}"), self.dataset.popularity()
        scores = {"random": [[rng.random() for _ in e.candidates] for e in self.items],
                  "popularity": [[counts[c.id] for c in e.candidates] for e in self.items]} | results
        self.scores = scores
        evaluated = {name: evaluate(s, self.items) for name, s in scores.items()}
        systems = {name: found for name, (found, _) in evaluated.items()}
        total = len(self.items)
        print(f"\n{self.dataset.name}: {total} test lists of {len(self.items[0].candidates)} candidates")
        print(table(systems))
        known = sum(any(y and counts[c.id] for c, y in zip(e.candidates, e.relevance)) for e in self.items)
        if known < total / 2:
            print(f"note: in {total - known} of {total} lists what the user chose was never bought in "
                  f"training: popularity can then be below random")
        values = {name: v for name, (_, v) in evaluated.items()}
        return finish_report(self, systems, values, "ndcg@10", METRICS)

def finish_report(test, systems, values, metric, metrics):
    """The dict that becomes eval.json; prints the paired differences to the last system."""
    last = list(values)[-1]
    for name in [n for n in ("head-only", "sft", "zero-shot") if n in values and n != last]:
        found = difference(values[last][metric], values[name][metric], test.users)
        print(f"{last} - {name}, paired: {found} {metric.replace('ndcg', 'NDCG')}")
    number = {u: n for n, u in enumerate(dict.fromkeys(test.users))}
    return {"data": test.dataset.name, "num_lists": len(test.items), "lists": test.hash, "systems": systems,
            "differences": paired_differences(values, test.users, metrics),
            "users": [number[u] for u in test.users],
            "values": {name: v[metric] for name, v in values.items()}}


# --- requests (ReRec) -----------------------------------------------------------------------------------

class RequestTest:
    """Held-out requests, likewise."""

    def __init__(self, dataset, source, args):
        self.dataset, self.args = dataset, args
        self.items = source.draw("test", args.eval_lists)
        self.users = [q.user or q.id for q in self.items]
        self.hash = data.fingerprint(self.items)

    def answers(self, model, tokenizer, items, label="eval"):
        """Greedy answers, a few at a time: [(text, Judged, number of tokens)]."""
        results = []
        with tqdm(total=len(items), desc=label, unit="request", leave=False) as bar:
            for start in range(0, len(items), 64):
                results += rerec.answer(model, tokenizer, items[start:start + 64], self.args)
                bar.update(len(items[start:start + 64]))
        return results

    def measure(self, model, tokenizer, head, items, label):
        """Of some of the requests: [({metric: value}, [the response])]."""
        answers = self.answers(model, tokenizer, items, label)
        return [({"accuracy": float(judged.correct), "format_rate": float(judged.boxed),
                  "length": float(length), "ndcg@10": rerec.answers_ndcg(judged.answers, query.truths, 10)},
                 [text]) for query, (text, judged, length) in zip(items, answers)]

    def guesses(self):
        """The same of answers drawn at random."""
        rng, rows = random.Random(f"random/{self.args.seed}"), []
        for q in self.items:
            ids = [rng.choice(q.candidates).id]
            rows.append({"accuracy": float(ids[0] in q.truths), "format_rate": 1.0, "length": 0.0,
                         "ndcg@10": rerec.answers_ndcg(ids, q.truths, 10)})
        return rows

    def summary(self, rows):
        """{metric: interval} over all requests, and the same under by_kind and by_conditions."""
        def of(chosen):
            columns = {m: [rows[n][m] for n in chosen] for m in QUERY_METRICS}
            return intervals(columns, [self.users[n] for n in chosen]) | {"num_queries": len(chosen)}

        def split(label):
            labels = [label(q) for q in self.items]
            return {v: of([n for n, found in enumerate(labels) if found == v]) for v in sorted(set(labels))}

        return of(range(len(rows))) | {"by_kind": split(lambda q: q.kind),
                                       "by_conditions": split(lambda q: str(q.num_conditions))}

    def report(self, results):
        """The report of {system: metrics of all requests}, beside guesses; printed, and as a dict."""
        from extras.explain import query_table
        rows = {"random": self.guesses()} | results
        systems = {name: self.summary(r) for name, r in rows.items()}
        values = {name: {m: [row[m] for row in r] for m in QUERY_METRICS} for name, r in rows.items()}
        print(f"\n{self.dataset.name}: {len(rows['random'])} test requests")
        print(query_table(systems))
        return finish_report(self, systems, values, "accuracy", QUERY_METRICS)


# --- command --------------------------------------------------------------------------------------------

def open_model(args, dataset):
    """(model, tokenizer, head or None, the name of the system) that the flags name. Raises InputError."""
    from extras.flags import pick_device
    from extras.models import check_model
    device, dtype = pick_device(args)
    if not args.run:
        model, tokenizer = policy.load(args.model, device, dtype, dataset.texts(), args.seed)
        path = Path(args.model).expanduser() / "score_head.safetensors"
        head = r2r.ScoreHead.load(path).to(device) if path.exists() else None
        args.no_reasoning = not head.reasoning if head else args.no_reasoning
        check_model(model, tokenizer, args.model)
        return model, tokenizer, head, "rl" if head else "zero-shot"
    folder, state_path = Path(args.run) / "checkpoint", Path(args.run) / "state.pt"
    if not state_path.exists():
        return *r2r.load_checkpoint(folder, device, dtype), "rl"
    # A run that has not finished: what its state holds, under the name of the stage.
    state = torch.load(state_path, map_location="cpu", weights_only=True)
    if any(".lora_" in name for name in state["weights"]):
        raise InputError(f"--run {args.run}: a run with --lora can be evaluated when it has finished")
    model, tokenizer = policy.load(str(folder), device, dtype, weights=state["weights"])
    stage, head = "rl" if state["stage"] == "rl" and state["step"] else "sft", None
    if state["head"] and stage == "rl":
        head = r2r.ScoreHead(model.config.get_text_config().hidden_size, reasoning=not args.no_reasoning)
        head.to(device).load_state_dict(state["head"])
    print(f"note: this run has not finished; its state is of {state['stage']} step {state['step']}")
    return model, tokenizer, head, stage

def read_rationales(folder):
    """What a run's model said about the first test lists, or requests, before RL: [texts]."""
    path = Path(folder) / "rationales.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    return said.get("sft") or said.get("zero-shot") or []

def main(args):
    from extras.flags import load_data
    dataset = load_data(args)
    out = Path(args.out or (Path(args.run) / "eval-again.json" if args.run else "eval.json"))
    if args.open_ended:
        from extras.recbench import evaluate_open_ended
        return evaluate_open_ended(dataset, args.open_ended, out)
    if args.method == "rerec":
        from extras.queries import query_source
        kinds, most = args.query_kinds, 2 if args.model == "tiny" else 3
        source = query_source(dataset, kinds, most, args.num_candidates, args.history_length, args.seed)
        test = RequestTest(dataset, source, args)
    else:
        test = ListTest(dataset, args)
    if args.save_candidates:
        data.save_lists(args.save_candidates, test.items)
    results = {}
    if args.baselines is not None:
        from extras.baselines import BASELINES, HANDICAPS, list_scores
        results |= list_scores(dataset, test.items, args.baselines or BASELINES, args.seed)
    if args.model or args.run:
        model, tokenizer, head, name = open_model(args, dataset)
        torch.manual_seed(args.seed)
        from extras.explain import explain_lists, explain_requests
        from extras.recommend import ask, recommend_users
        if args.ask:
            return ask(dataset, args, model, tokenizer)
        if args.recommend:
            return recommend_users(dataset, args, model, tokenizer, head)
        some, before = test.items[:args.explain], read_rationales(args.run) if args.run else []
        if args.explain and args.method == "rerec":
            return explain_requests(some, test.answers(model, tokenizer, some), before)
        if args.explain:
            return explain_lists(some, model_scores(model, tokenizer, head, some, args), before)
        results[name] = [row for row, _ in test.measure(model, tokenizer, head, test.items, "eval")]
    report = test.report(results)
    if args.baselines is not None:
        print(HANDICAPS)
    if args.save_predictions:
        from extras.explain import save_predictions
        save_predictions(args.save_predictions, test.items, test.scores)
    out.write_text(dump(report))
    print(f"written to {out}")

def dump(report):
    """JSON, a line a number where a person looks, and long columns on one line."""
    short = json.dumps({k: v for k, v in report.items() if k not in ("users", "values")}, indent=1)
    columns = "".join(f",\n {json.dumps(k)}: {json.dumps(report[k])}" for k in ("users", "values"))
    return short.removesuffix("\n}") + columns + "\n}\n"

if __name__ == "__main__":
    run_main(lambda: main(ARGS))
