"""Rank held-out lists: metrics with 95% bootstrap intervals, a table, `eval.json`, baselines, and explanations to read.

    python eval.py --run runs/toy-tiny                        a finished run, on its own test lists
    python eval.py --model Qwen2.5-1.5B --data beauty         an untrained model: scored by log p(yes) - log p(no)
    python eval.py --baselines --data beauty                  what a reviewer will ask for, on the same lists
    python eval.py --baselines --full --data beauty           the baselines rank the whole catalogue
    python eval.py --run runs/toy-tiny --explain 3            three lists as a person wants to see them
    python eval.py --open-ended answers.jsonl --data recbench:movie --data-dir DIR    RecBench+'s metrics without candidates
    python eval.py --run runs/toy-tiny --test-time 1,2,4,8,16 --test-lengths 8,16,48  what more rationales, or longer ones, buy and cost
    python eval.py --plot runs/seed0 runs/seed1               a table over seeds, and a figure, of finished runs

Every system is a function from lists to scores and goes through `evaluate`. Equal scores count as the expected value over random
orders of the tied, so no system gains by being undecided. Intervals resample users, not lists.

Baselines (`fit_baselines`) learn from the training period alone and are chosen by NDCG@10 over the whole catalogue on validation:
    random, popularity    training counts
    title-overlap         TF-IDF cosine of a title to those of the history, older ones weighing less
    item-knn              cosine of co-occurrence with the items of the history, likewise
    lightgcn              rewards.LightGCN, BPR; a user without training interactions is the mean of the history's items
    sasrec                SASRec below
    facts-linear          with --facts: logistic regression on the levels that the model is told, fitted on lists of training

Choices of ours: `--full` leaves out what the user had before the target, and gives the baselines the whole sequence before it; on
lists they see what the language model sees, the last --history-length interactions.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import policy
import r2r
import rerec
from data import InputError, describe
from rewards import fit_lightgcn, open_ended

CUTOFFS = (1, 5, 10, 20)
METRICS = [*(f"ndcg@{k}" for k in CUTOFFS), *(f"hr@{k}" for k in CUTOFFS), "mrr", "rank"]


# --- metrics --------------------------------------------------------------------------------------------------------------


def harmonic(n, known=[0.0]):
    """1 + 1/2 + … + 1/n, looked up."""
    while len(known) <= n:
        known.append(known[-1] + 1 / len(known))
    return known[n]


def expected_metrics(groups):
    """The expected metrics of a ranking with ties, over all orders of the tied: {"ndcg@1": …, "hr@1": …, …, "mrr", "rank"}.

    groups: (number of items, relevance of the relevant ones among them) for each distinct score, best first. `rank` is that of
    the first relevant item. Of n tied items, m of them relevant, behind `start` others: each takes each place with
    probability 1/n, and the first relevant one place start + j with P(j) = C(n - j, m - 1) / C(n, m).
    """
    dcg, hits, mrr, rank, start = Counter(), {}, 0.0, None, 0
    for n, relevant in groups:
        if relevant:
            for k in CUTOFFS:
                places = range(start + 1, min(start + n, k) + 1)
                dcg[k] += sum(2.0**y - 1 for y in relevant) * sum(1 / math.log2(r + 1) for r in places) / n
            if rank is None:
                m = len(relevant)
                rank = start + (n + 1) / (m + 1)
                hits = {k: 1 - math.comb(n - min(n, max(0, k - start)), m) / math.comb(n, m) for k in CUTOFFS}
                if m == 1:
                    mrr = (harmonic(start + n) - harmonic(start)) / n
                else:
                    mrr = sum(math.comb(n - j, m - 1) / math.comb(n, m) / (start + j) for j in range(1, n - m + 2))
        start += n
    ideal = sorted((2.0**y - 1 for _, relevant in groups for y in relevant), reverse=True)
    best = {k: sum(g / math.log2(r + 2) for r, g in enumerate(ideal[:k])) for k in CUTOFFS}
    return {**{f"ndcg@{k}": dcg[k] / best[k] if best[k] else 0.0 for k in CUTOFFS}, **{f"hr@{k}": hits.get(k, 0.0) for k in CUTOFFS},
            "mrr": mrr, "rank": float(start + 1 if rank is None else rank)}


def list_metrics(scores, relevance):
    """expected_metrics of one list: (K,) scores and relevance. Raises ValueError when a score is not a number."""
    pairs = sorted(((float(s), float(y)) for s, y in zip(scores, relevance, strict=True)), key=lambda p: -p[0])
    if any(math.isnan(s) for s, _ in pairs):
        raise ValueError("a score is not a number")
    groups = [[y for _, y in group] for _, group in itertools.groupby(pairs, key=lambda p: p[0])]
    return expected_metrics([(len(g), [y for y in g if y > 0]) for g in groups])


def intervals(columns, users=None, samples=2000, seed=0):
    """{name: values of the lists (L,)} -> {name: {"mean", "low", "high"}}: 95% percentile bootstrap over users (None: one list each).

    A user's lists are drawn together: two lists of one user are not independent.
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
        times = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape, dtype=torch.float64))
        means.append((times @ sums) / (times @ sizes)[:, None])
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
    return {n: {"mean": m, "low": a, "high": b} for n, m, a, b in zip(names, values.mean(0).tolist(), low, high)}


def interval(values, users=None, **settings):
    """intervals() of one column."""
    return intervals({"": values}, users, **settings)[""]


def evaluate(scores, examples):
    """scores: one (K,) sequence an example -> ({metric: interval}, {metric: [value a list]})."""
    rows = [list_metrics(s, e.relevance) for s, e in zip(scores, examples, strict=True)]
    values = {name: [row[name] for row in rows] for name in METRICS}
    return intervals(values, [e.user for e in examples]), values


def difference(a, b, users=None):
    """The mean of a - b on the same lists, with its interval, as text."""
    d = interval([x - y for x, y in zip(a, b, strict=True)], users)
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def paired_differences(values, users, metrics=METRICS):
    """{system: {metric: values}} -> {"a - b": {metric: interval}} for each pair of systems, on the same lists."""
    pairs = [(a, b) for b, a in itertools.combinations(values, 2)]
    columns = {(a, b, m): [x - y for x, y in zip(values[a][m], values[b][m])] for a, b in pairs for m in metrics}
    result = intervals(columns, users) if columns else {}
    return {f"{a} - {b}": {m: result[a, b, m] for m in metrics} for a, b in pairs}


def slices(values, examples, counts):
    """Metrics by length of the history, and by training count of the positive (0: a cold item), for each system:
    {"history" | "popularity": {bin: {"num_lists", "systems": {system: {metric: interval}}}}}."""
    def bin_of(n, edges):
        low = max(e for e in edges if e <= n)
        high = next((e - 1 for e in edges if e > low), None)
        return str(low) if high == low else f"{low}-{high}" if high else f"{low}+"

    positive = [e.candidates[max(range(len(e.relevance)), key=e.relevance.__getitem__)].id for e in examples]
    keys = {"history": [bin_of(len(e.history), (0, 1, 3, 5, 10)) for e in examples],
            "popularity": ["0 (cold)" if not counts[i] else bin_of(counts[i], (1, 6, 21, 101)) for i in positive]}
    result = {}
    for name, bins in keys.items():
        result[name] = {}
        for key in sorted(set(bins), key=lambda b: int(re.match(r"\d+", b)[0])):
            where = [n for n, b in enumerate(bins) if b == key]
            found = intervals({(s, m): [v[m][n] for n in where] for s, v in values.items() for m in METRICS}, [examples[n].user for n in where])
            result[name][key] = {"num_lists": len(where), "systems": {s: {m: found[s, m] for m in METRICS} for s in values}}
    return result


# --- rankers ----------------------------------------------------------------------------------------------------------------


def random_scores(examples, seed=0):
    rng = random.Random(f"random/{seed}")
    return [[rng.random() for _ in e.candidates] for e in examples]


def popularity_scores(examples, counts):
    return [[counts[c.id] for c in e.candidates] for e in examples]


def model_scores(model, tokenizer, score_head, examples, sampling, num_samples=1, micro_batch=32, reasoning=True, label="eval"):
    """Scores and rationales of a language model, a few lists at a time: [(scores (K,), rationales [K][num_samples])]."""
    results = []
    rows = max((len(e.candidates) for e in examples), default=1) * num_samples
    size = max(1, sampling.max_rows // rows)
    with tqdm(total=len(examples), desc=label, unit="list", leave=False) as bar:
        for start in range(0, len(examples), size):
            part = [(e.history, e.candidates) for e in examples[start:start + size]]
            results += r2r.score_lists(model, tokenizer, score_head, part, sampling, num_samples, micro_batch, reasoning)
            bar.update(len(part))
    return results


def position_probe(score, examples, orders=5, seed=0):
    """The same lists with their candidates in `orders` orders: does a score depend on the place? score: examples -> [scores (K,)].

    Returns {"orders", "max_score_difference", "same_ranking": share of lists ranked the same in all orders, "ndcg@10": of each}.
    """
    results, ndcg = [], []
    for order in range(orders):
        permutations = [random.Random(f"{seed}/{order}/{n}").sample(range(len(e.candidates)), len(e.candidates)) if order
                        else list(range(len(e.candidates))) for n, e in enumerate(examples)]
        shuffled = [replace(e, candidates=[e.candidates[i] for i in p], relevance=[e.relevance[i] for i in p])
                    for e, p in zip(examples, permutations)]
        scores = [[float(x) for x in s] for s in score(shuffled)]
        ndcg.append(sum(list_metrics(s, e.relevance)["ndcg@10"] for s, e in zip(scores, shuffled)) / len(examples))
        results.append([[x for _, x in sorted(zip(p, s))] for s, p in zip(scores, permutations)])  # back in the first order
    first = results[0]
    rank = lambda s: sorted(range(len(s)), key=lambda i: (-s[i], i))
    apart = max(abs(x - y) for r in results[1:] for a, b in zip(first, r) for x, y in zip(a, b))
    same = sum(all(rank(r[n]) == rank(first[n]) for r in results) for n in range(len(examples)))
    return {"orders": orders, "max_score_difference": apart, "same_ranking": same / len(examples), "ndcg@10": ndcg}


# --- baselines ----------------------------------------------------------------------------------------------------------------
# A baseline is a function (users, histories) -> scores (B, I) of the whole catalogue, in the order of dataset.item_ids; histories
# are lists of item numbers, oldest first. Lists and the whole catalogue are ranked by the same scores.

BASELINES = ("random", "popularity", "title-overlap", "item-knn", "lightgcn", "sasrec", "facts-linear")
DECAYS = (1.0, 0.9, 0.8, 0.6, 0.4)  # weight of an item relative to the one after it


def history_weights(histories, num_items, decay):
    """(I, B): the sum over a history's occurrences of an item of decay^(how many items came after)."""
    entries = [(i, b, decay**age) for b, history in enumerate(histories) for age, i in enumerate(reversed(history))]
    rows, columns, values = zip(*entries) if entries else ((), (), ())
    where = torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
    return torch.zeros(num_items, len(histories)).index_put_(where, torch.tensor(values), accumulate=True)


def title_overlap(dataset):
    """TF-IDF cosine: score_i = sum over the history of decay^age cos(title_i, title_h). tf = 1 + log count, idf = log(I / df)."""
    words = [Counter(re.findall(r"\w+", item.title.lower())) for item in dataset.items.values()]
    df = Counter(w for row in words for w in row)
    column = {w: n for n, w in enumerate(df)}
    entries = torch.tensor([(n, column[w], (1 + math.log(c)) * math.log(len(words) / df[w])) for n, row in enumerate(words) for w, c in row.items()],
                           dtype=torch.float64).reshape(-1, 3)
    norm = torch.zeros(len(words), dtype=torch.float64).index_add_(0, entries[:, 0].long(), entries[:, 2]**2).sqrt().clamp(min=1e-12)
    tfidf = torch.sparse_coo_tensor(entries[:, :2].long().T, (entries[:, 2] / norm[entries[:, 0].long()]).float(),
                                    (len(words), max(1, len(column))), check_invariants=True).coalesce()
    transposed = tfidf.T.coalesce()
    return lambda decay: lambda users, histories: torch.sparse.mm(tfidf, torch.sparse.mm(transposed, history_weights(histories, len(words), decay)))\
        .T.contiguous()


def item_knn(dataset, index):
    """score_i = sum over the history, i itself apart, of decay^age cos(i, h); cos(i, j) = users of both / sqrt(users of i * users of j)."""
    pairs = torch.tensor(sorted({(u, index[i]) for u, s in enumerate(dataset.training().values()) for i in s}))
    count = torch.bincount(pairs[:, 1], minlength=len(index)).float()
    scaled = torch.sparse_coo_tensor(pairs.T, count[pairs[:, 1]].rsqrt(), (int(pairs[:, 0].max()) + 1, len(index)),
                                     check_invariants=True).coalesce()
    transposed, known = scaled.T.coalesce(), (count > 0).float()[:, None]

    def ranker(decay):
        def score(users, histories):
            weights = history_weights(histories, len(index), decay)  # (I, B)
            return (torch.sparse.mm(transposed, torch.sparse.mm(scaled, weights)) - known * weights).T.contiguous()
        return score
    return ranker


def lightgcn_scores(dataset, index, user_index, model):
    with torch.no_grad():
        users_matrix, items_matrix = model.propagate()

    def score(users, histories):
        rows = [users_matrix[user_index[u]] if u in user_index else items_matrix[h].mean(0) if h else items_matrix.new_zeros(items_matrix.shape[1])
                for u, h in zip(users, histories)]
        return torch.stack(rows) @ items_matrix.T
    return score


class SASRec(nn.Module):
    """SASRec (Kang & McAuley 2018): a causal transformer over a user's items, whose states score the next item.

    The score of an item is the state's product with that item's input embedding (tied). Inside, items count from 1 and 0 is
    padding on the right: causality alone keeps padding out of every real position, so no padding mask is needed.
    """

    def __init__(self, num_items, dim=64, layers=2, heads=2, max_len=50, dropout=0.5):
        super().__init__()
        self.max_len = max_len
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(max_len, dim)
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(dim, heads, dim, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        for weight in (self.items.weight, self.positions.weight, *(p for p in self.encoder.parameters() if p.dim() > 1)):
            nn.init.normal_(weight, std=0.02)  # also makes the layers differ: TransformerEncoder starts them as copies
        with torch.no_grad():
            self.items.weight[0] = 0

    def forward(self, sequences):
        """sequences (B, T) long, T <= max_len -> hidden (B, T, D); the state at t has seen items 0..t."""
        T = sequences.shape[1]
        x = self.items(sequences) * self.items.embedding_dim**0.5 + self.positions.weight[:T]  # (B, T, D)
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=x.device, dtype=x.dtype)
        return self.encoder(self.dropout(x), mask, is_causal=True)

    @torch.no_grad()
    def scores(self, histories):
        """histories: lists of item indices 0..I-1, oldest first -> next-item scores (B, I); 0 all over for an empty history."""
        sequences, lengths = pad([[i + 1 for i in h[-self.max_len:]] for h in histories], self.items.weight.device)
        hidden = self(sequences)[torch.arange(len(histories)), lengths.clamp(min=1) - 1]  # (B, D)
        return (hidden * (lengths > 0)[:, None]) @ self.items.weight[1:].T


def pad(rows, device):
    """Lists of numbers -> (B, T) long, 0 on the right, T >= 1; and their lengths (B,)."""
    T = max(1, max(map(len, rows), default=1))
    padded = torch.tensor([r + [0] * (T - len(r)) for r in rows], dtype=torch.long, device=device).view(-1, T)
    return padded, torch.tensor([len(r) for r in rows], dtype=torch.long, device=device)


def fit_sasrec(num_items, sequences, evaluate=None, epochs=50, lr=1e-3, num_negatives=1024, batch_size=256, seed=0, every=2,
               patience=5, device="cpu", **sizes):
    """Train a SASRec on sequences (lists of item indices 0..I-1, oldest first); returns it in eval mode.

    evaluate: model -> float, higher is better, on *validation* targets; called `every` epochs, the best state is returned, and
    training stops after `patience` calls without a better one. sizes: dim, layers, heads, max_len, dropout of SASRec.
    The same seed gives the same model; the global random state is left as it was.

    Deviations: 1. softmax over the target and `num_negatives` items, instead of a logistic loss with one negative; the
    negatives are uniform, drawn without replacement and shared by the batch, and those of them that a user has in `sequences`
    are masked for that user (so nothing pushes the history's own items down: leave them out of a ranking). 2. Batches hold
    sequences of similar length, cut to the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = [[i + 1 for i in s] for s in sequences if len(s) > 1]  # one item alone has no next item
    if not sequences:
        raise ValueError("SASRec needs at least one sequence of two or more items")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # for the weights and dropout
        torch.manual_seed(seed)
        model = SASRec(num_items, **sizes).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98))
        best, best_state, waited = -float("inf"), None, 0
        bar = tqdm(range(1, epochs + 1), desc="SASRec", unit="epoch", leave=False)
        for epoch in bar:
            jitter = torch.rand(len(sequences), generator=generator).tolist()  # new batches every epoch, of like lengths
            order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]) + 2 * jitter[n])
            batches = [order[b:b + batch_size] for b in range(0, len(order), batch_size)]
            for b in torch.randperm(len(batches), generator=generator).tolist():
                batch = [sequences[n] for n in batches[b]]
                own, _ = pad(batch, device)  # (B, all T): the mask needs also the items that max_len cuts off
                latest, _ = pad([s[-model.max_len - 1:] for s in batch], device)
                inputs, targets = latest[:, :-1], latest[:, 1:]  # (B, T)
                negatives = 1 + torch.randperm(num_items, generator=generator)[:num_negatives].to(device)  # (N,)
                column = own.new_full((num_items + 1,), len(negatives))  # item -> where it stands among the negatives; N: nowhere
                column[negatives] = torch.arange(len(negatives), device=device)
                seen = torch.zeros(len(own), len(negatives) + 1, dtype=torch.bool, device=device)
                seen = seen.scatter_(1, column[own], True)[:, :-1]  # (B, N): this negative is one of the user's items
                real = targets > 0
                row = real.nonzero()[:, 0]  # (P,): the user of each of the P positions that have a target
                hidden = model(inputs)[real]  # (P, D)
                positive = (hidden * model.items(targets[real])).sum(1, keepdim=True)  # (P, 1)
                negative = (hidden @ model.items(negatives).T).masked_fill(seen[row], -float("inf"))  # (P, N)
                loss = F.cross_entropy(torch.cat([positive, negative], 1), torch.zeros_like(row))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if evaluate is not None and epoch % every == 0:
                value = evaluate(model.eval())
                model.train()
                bar.set_postfix(loss=f"{loss.item():.3f}", validation=f"{value:.4f}")
                waited += 1
                if value > best:
                    best, best_state, waited = value, {k: v.clone() for k, v in model.state_dict().items()}, 0
                if waited == patience:
                    break
    if best_state is not None:
        model.load_state_dict(best_state)
    return model.eval()


def fit_baselines(dataset, names=BASELINES, seed=0, num_validation=2000):
    """Train what there is to train, on the training period alone, chosen on validation: {name: ranker}; `random` and
    `facts-linear`, which rank lists alone, have none."""
    index = {i: n for n, i in enumerate(dataset.item_ids)}
    training = dataset.training()
    if not training:
        raise InputError(f"{dataset.name}: no interactions in the training period to learn baselines from")
    targets = dataset.targets("validation", seed)[:num_validation] if dataset.splits["validation"] else []

    def validate(ranker):
        rows = full_ranking(dataset, ranker, targets)
        return sum(row["ndcg@10"] for row in rows) / len(rows)

    def best_decay(ranker):
        return ranker(max(DECAYS, key=lambda d: validate(ranker(d))) if targets else 1.0)

    def fitted(fit, *arguments, **options):
        try:
            return fit(*arguments, seed=seed, **options)
        except ValueError as error:
            raise InputError(f"{dataset.name}: {error}; leave this baseline out") from None

    rankers = {}
    counts = dataset.popularity()
    for name in tqdm(names, desc="baselines", unit="model", leave=False):
        if name == "popularity":
            row = torch.tensor([float(counts[i]) for i in dataset.item_ids])
            rankers[name] = lambda users, histories: row.expand(len(users), -1)
        elif name == "title-overlap":
            rankers[name] = best_decay(title_overlap(dataset))
        elif name == "item-knn":
            rankers[name] = best_decay(item_knn(dataset, index))
        elif name == "lightgcn":
            user_index = {u: n for n, u in enumerate(training)}
            pairs = torch.tensor([(user_index[u], index[i]) for u, s in training.items() for i in s])
            scores_of = lambda model: lightgcn_scores(dataset, index, user_index, model)
            rankers[name] = scores_of(fitted(fit_lightgcn, len(user_index), len(index), pairs,
                                             evaluate=(lambda m: validate(scores_of(m))) if targets else None))
        elif name == "sasrec":
            sasrec = fitted(fit_sasrec, len(index), [[index[i] for i in s] for s in training.values()],
                            evaluate=(lambda m: validate(lambda users, histories: m.scores(histories))) if targets else None)
            rankers[name] = lambda users, histories: sasrec.scores(histories)
    return rankers


def facts_linear(dataset, examples, history_length=10, num_lists=2000, seed=0, decay=1e-4):
    """What a linear model makes of `--facts`: multinomial logistic regression of the positive on the candidates' levels, one weight a level,
    fitted on lists of training. It shows what a language model that is told the same adds. Scores of the examples: [(K,) …]."""
    def levels(lists):  # (lists, K, facts): the number of each level's weight
        return torch.tensor([[[10 * n + level for n, level in enumerate(c.facts.values())] for c in e.candidates] for e in lists])

    lists = dataset.examples("train", num_lists, len(examples[0].candidates), history_length, seed)
    rows, positive = levels(lists), torch.tensor([e.relevance.index(max(e.relevance)) for e in lists])
    weights = torch.zeros(10 * rows.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(weights[rows].sum(-1), positive) + decay * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return [weights.detach()[levels([e])[0]].sum(-1).tolist() for e in examples]


def baseline_scores(dataset, ranker, examples, batch=256):
    """A baseline's scores of lists: [(K,) …]."""
    index = {i: n for n, i in enumerate(dataset.item_ids)}
    scores = []
    for start in range(0, len(examples), batch):
        part = examples[start:start + batch]
        rows = ranker([e.user for e in part], [[index[x.id] for x in e.history] for e in part])
        scores += [row[[index[c.id] for c in e.candidates]] for row, e in zip(rows, part)]
    return scores


def full_ranking(dataset, ranker, targets, batch=256):
    """expected_metrics of each target among all items but those that the user had before it."""
    index = {i: n for n, i in enumerate(dataset.item_ids)}
    rows = []
    for start in range(0, len(targets), batch):
        part = targets[start:start + batch]
        pasts = [[index[x.item_id] for x in dataset.sequences[u][:p]] for u, p in part]
        truth = torch.tensor([index[dataset.sequences[u][p].item_id] for u, p in part])
        scores = ranker([u for u, _ in part], pasts).double()  # (B, I)
        own = scores.gather(1, truth[:, None])
        excluded = torch.zeros(scores.shape, dtype=torch.bool)
        for b, past in enumerate(pasts):
            excluded[b, past] = True
        excluded.scatter_(1, truth[:, None], False)  # a repeated purchase is still a target
        above, tied = (((scores > own) & ~excluded).sum(1).tolist(), ((scores == own) & ~excluded).sum(1).tolist())
        rows += [expected_metrics([(a, []), (t, [1.0])]) for a, t in zip(above, tied)]
    return rows


# --- reports ----------------------------------------------------------------------------------------------------------------


def ranking(scores, seed=0):
    """Indices by descending score; ties in a random order that follows from the seed."""
    jitter = random.Random(seed)
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), jitter.random()))


def table(systems, metrics=("ndcg@10", "hr@10", "mrr")):
    """A printable table of {name: {metric: interval}}; the interval is shown for the first metric."""
    width = max(12, *map(len, systems))
    lines = [f"{'system':<{width}} {metrics[0]:>8} {'95% interval':>16}" + "".join(f" {m:>8}" for m in metrics[1:])]
    for name, values in systems.items():
        first = values[metrics[0]]
        lines.append(f"{name:<{width}} {first['mean']:8.3f}   [{first['low']:.3f}, {first['high']:.3f}]"
                     + "".join(f" {values[m]['mean']:8.3f}" for m in metrics[1:]))
    return "\n".join(lines)


def slice_table(dimensions, metric="ndcg@10"):
    lines = []
    for dimension, bins in dimensions.items():
        names = list(next(iter(bins.values()))["systems"])
        lines.append(f"\n{metric} by {'length of the history' if dimension == 'history' else 'training count of the positive'}\n"
                     f"{'':>10} {'lists':>6} " + " ".join(f"{n:>13}" for n in names))
        lines += [f"{key:>10} {b['num_lists']:6d} " + " ".join(f"{b['systems'][n][metric]['mean']:13.3f}" for n in names) for key, b in bins.items()]
    return "\n".join(lines)


def write_eval(path, name, examples, systems, values, keep_other_systems=False, renew=False, **more):
    """Write eval.json. values: {system: {metric: value a list}}, for the paired differences between systems. With keep_other_systems, what an
    earlier file holds on the very same lists stays in it; with renew, the result.json of a finished run beside it takes all this up."""
    path, requests = Path(path), hasattr(examples[0], "truths")
    metric, metrics = ("accuracy", rerec.METRICS) if requests else ("ndcg@10", METRICS)
    users = [e.user or e.id if requests else e.user for e in examples]
    ids = [(e.user, [h.id for h in e.history], [c.id for c in e.candidates], list(e.truths if requests else e.relevance)) for e in examples]
    lists, number = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16], {u: n for n, u in enumerate(dict.fromkeys(users))}
    report = {"data": name, "num_lists": len(examples), "lists": lists, "systems": systems,
              "differences": paired_differences(values, users, metrics), **more,
              "users": [number[u] for u in users], "values": {system: v[metric] for system, v in values.items()}}
    if keep_other_systems and path.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # what --full wrote, or what is no report at all
            earlier = json.loads(path.read_text())
            if (earlier["data"], earlier["lists"]) == (name, lists):
                changed = {s for s, v in report["values"].items() if v != earlier["values"].get(s)}
                report = earlier | {k: earlier.get(k, {}) | v if isinstance(v, dict) else v for k, v in report.items()}
                column = report["values"]  # of a system that was not evaluated again the main metric is on record
                for a, b in (pair.split(" - ") for pair in report["differences"]):
                    if (a in values) != (b in values) and changed & {a, b}:
                        report["differences"][f"{a} - {b}"] = {metric: interval([x - y for x, y in zip(column[a], column[b])], users)}
    text = json.dumps({k: v for k, v in report.items() if k not in ("users", "values")}, indent=1).removesuffix("\n}")
    path.write_text(text + "".join(f",\n {json.dumps(k)}: {json.dumps(report[k])}" for k in ("users", "values")) + "\n}\n")
    if renew and path.name == "eval.json" and (path.parent / "result.json").exists():
        write_result(path.parent)
    return report["systems"]


def save_predictions(path, examples, scores):
    """Ranked lists in TREC format, `query Q0 item rank score system` a line, and the judgements in PATH.qrels.

    scores: {system: [(K,) …]}. A query is named LINE/USER: its line in the file of --save-candidates, and the user. White space in
    names becomes %20 and the like, `%` becomes %25: two names never meet. Tied scores are written in random order, with their true, equal scores.
    """
    name = lambda text: re.sub(r"[\s%]", lambda m: f"%{ord(m[0]):02X}", str(text)) or "%"
    queries = [f"{n}/{name(e.user)}" for n, e in enumerate(examples, start=1)]
    with open(path, "w", encoding="utf-8") as f:
        for system, lists in scores.items():
            for n, (query, e, s) in enumerate(zip(queries, examples, lists)):
                for rank, i in enumerate(ranking(s, n), start=1):
                    f.write(f"{query} Q0 {name(e.candidates[i].id)} {rank} {float(s[i])!r} {name(system)}\n")
    with open(f"{path}.qrels", "w", encoding="utf-8") as f:
        for query, e in zip(queries, examples):
            f.writelines(f"{query} 0 {name(c.id)} {y:g}\n" for c, y in zip(e.candidates, e.relevance))


# --- requests (ReRec) ---------------------------------------------------------------------------------------------------------


def query_answers(model, tokenizer, queries, sampling, personalized=False, list_length=1, label="eval"):
    """A language model's greedy answers to requests, a few at a time: [(text, metrics)]."""
    results = []
    with tqdm(total=len(queries), desc=label, unit="request", leave=False) as bar:
        for start in range(0, len(queries), sampling.max_rows):
            part = queries[start:start + sampling.max_rows]
            results += rerec.answer(model, tokenizer, part, replace(sampling, greedy=True), personalized, list_length)
            bar.update(len(part))
    return results


def summarise_queries(queries, rows):
    """{metric: interval} over all requests, and the same under by_kind and by_conditions."""
    def summary(chosen):
        users = [queries[n].user or queries[n].id for n in chosen]
        return intervals({m: [rows[n][m] for n in chosen] for m in rerec.METRICS}, users) | {"num_queries": len(chosen)}

    def split(label):
        values = sorted({label(q) for q in queries})
        return {v: summary([n for n, q in enumerate(queries) if label(q) == v]) for v in values}

    return summary(range(len(queries))) | {"by_kind": split(lambda q: q.kind), "by_conditions": split(lambda q: str(q.num_conditions))}


def by_metric(rows):
    """{system: [{metric: value} a request]} -> {system: {metric: [value a request]}}"""
    return {name: {m: [row[m] for row in r] for m in rerec.METRICS} for name, r in rows.items()}


def query_table(systems):
    """Accuracy by kind and by number of conditions, a column a system; then NDCG@10, format and length."""
    lines = [f"{'accuracy (top-1)':<18} {'requests':>8}" + "".join(f" {name:>9}" for name in systems)]
    first = next(iter(systems.values()))

    def line(label, parts, metric="accuracy", digits=3):
        lines.append(f"{label:<18} {parts[0]['num_queries']:8d}" + "".join(f" {p[metric]['mean']:9.{digits}f}" for p in parts))

    for kind in first["by_kind"]:
        line(kind, [s["by_kind"][kind] for s in systems.values()])
    for n in first["by_conditions"]:
        line(f"{n} condition{'s' * (n != '1')}", [s["by_conditions"][n] for s in systems.values()])
    line("all", list(systems.values()))
    lines.append(f"{'  95% interval':<27}" + "".join(f" {s['accuracy']['low']:.2f}-{s['accuracy']['high']:.2f}" for s in systems.values()))
    for label, metric, digits in (("NDCG@10", "ndcg@10", 3), ("format rate", "format_rate", 3), ("tokens a response", "length", 1)):
        line(label, list(systems.values()), metric, digits)
    return "\n".join(lines)


def evaluate_rerec_run(args, flags, out, dataset, device, dtype, train):
    """eval.py --run on a run of --method rerec: its checkpoint on its own test requests, with its own settings."""
    model, tokenizer = policy.load(args.model, device, dtype)
    fill_model_defaults(args, model)
    source = data.query_source(dataset, flags["query_kinds"], flags["max_conditions"], args.num_candidates, args.history_length, args.seed)
    queries = source.draw("test", args.eval_lists)
    results = train.gather(query_answers(model, tokenizer, train.part(queries), sampling_of(args), flags["personalized"], flags["list_length"]))
    if train.rank():
        return
    rows = {"random": rerec.random_metrics(queries, flags["list_length"], args.seed), "rl": [metrics for _, metrics in results]}
    systems = write_eval(out, dataset.name, queries, {name: summarise_queries(queries, r) for name, r in rows.items()}, by_metric(rows), True,
                         as_trained(args, flags))
    for n, (query, (text, metrics)) in enumerate(list(zip(queries, results))[:args.explain or 0]):
        print(f"\n=== request {n + 1} ({query.kind}): {query.text}")
        for c in query.candidates:
            print(f" {'*' if c.id in query.truths else ' '} {describe(c)}")
        print(textwrap.indent(text.strip() or "(no answer)", "   | ") + f"\n   {'right' if metrics['accuracy'] else 'wrong'}")
    print(f"{dataset.name}: {len(queries)} test requests of {args.num_candidates} candidates\n{query_table(systems)}\nwritten to {out}")


def read_responses(path, queries):
    """[(query, response)] of a JSONL of {"id", "response"}; an id is the query's, or the benchmark's own, its last part. Raises InputError."""
    by_id = {}
    for q in queries:
        for name in {q.id, q.id.split("-", 2)[-1]}:
            by_id.setdefault(name, []).append(q)
    pairs = []
    for number, line in data.read_lines(path, data.BadLines()):
        try:
            record = json.loads(line)
            name, response = str(record["id"]), record["response"]
        except data.MALFORMED as error:
            raise InputError(f"{path} line {number}: expected {{\"id\", \"response\"}}; {type(error).__name__}: {error}") from None
        if not isinstance(response, str):
            raise InputError(f"{path} line {number}: the response must be a text")
        if len(found := by_id.get(name, [])) != 1:
            where = f"several queries have it: {', '.join(q.id for q in found[:3])}" if found else "no query has it"
            raise InputError(f"{path} line {number}: id {name!r}: {where}")
        pairs.append((found[0], response))
    if not pairs:
        raise InputError(f"{path}: no responses in it")
    return pairs


def evaluate_open_ended(dataset, pairs, out):
    """RecBench+'s own metrics of answers without candidates, under its matching rule and under normalised exact match."""
    report = {"data": dataset.name, "num_queries": len(pairs), "open_ended": {}, "queries": {q.id: {} for q, _ in pairs}}
    print(f"{dataset.name}: {len(pairs)} open-ended answers\n{'matching':<10}" + "".join(f" {m:>10}" for m in ("precision", "recall", "ndcg", "ftr")))
    for match in ("recbench", "exact"):
        rows = [open_ended(response, q.titles or [c.title for c in q.candidates if c.id in q.truths], match) for q, response in pairs]
        report["open_ended"][match] = found = intervals({m: [float(r[m]) for r in rows] for m in rows[0]}, [q.user or q.id for q, _ in pairs])
        for (q, _), row in zip(pairs, rows):
            report["queries"][q.id][match] = row
        print(f"{match:<10}" + "".join(f" {found[m]['mean']:10.4f}" for m in ("precision", "recall", "ndcg", "ftr")))
    Path(out).write_text(json.dumps(report, indent=1) + "\n")
    print(f"ftr: answers that list nothing. written to {out}")


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


# --- test-time reasoning ------------------------------------------------------------------------------------------------------


def group_ndcg(scores, relevance, n):
    """NDCG@10 of a list ranked by the mean of n of its rationales' scores: (K, N) -> its mean over the N // n disjoint groups of n."""
    groups = [list_metrics(scores[:, g * n:(g + 1) * n].mean(1), relevance)["ndcg@10"] for g in range(scores.shape[1] // n)]
    return sum(groups) / len(groups)


def test_time(model, tokenizer, score_head, examples, sampling, micro_batch=32, numbers=(), lengths=(), num_samples=1, seed=0):
    """What thinking more buys and costs at test time: {"rationales" | "greedy" | "length": [{"value", "ndcg@10": interval, "tokens", "seconds"}]}.

    tokens, seconds: sampled and spent a list. `rationales`: so many sampled ones averaged, all cut from one draw of the largest number; the
    time of fewer is measured on the first lists, as many as fill a generate call with single rationales. `greedy`: one greedy rationale.
    `length`: at most so many tokens, each drawn anew, with `num_samples` a candidate (1: greedy).
    """
    def roll(lists, n, greedy, **settings):
        torch.manual_seed(seed)
        scores, tokens, size, started = [], 0, max(1, sampling.max_rows // (n * len(lists[0].candidates))), time.perf_counter()
        for start in tqdm(range(0, len(lists), size), desc="test time", leave=False):
            part = [(e.history, e.candidates) for e in lists[start:start + size]]
            rollout = r2r.scored_rollout(model, tokenizer, score_head, part, replace(sampling, greedy=greedy, **settings), n, micro_batch)
            scores += [s.float().cpu() for s in rollout.lists(rollout.scores)]
            tokens += sum(map(len, rollout.responses))
        return scores, tokens / len(lists), (time.perf_counter() - started) / len(lists)

    def row(value, n, scores, tokens, seconds):
        ndcg = interval([group_ndcg(s, e.relevance, n) for s, e in zip(scores, examples)], [e.user for e in examples])
        return {"value": value, "ndcg@10": ndcg, "tokens": tokens, "seconds": seconds}

    result = {}
    if numbers:
        most, few = max(numbers), examples[:max(1, sampling.max_rows // len(examples[0].candidates))]
        scores, tokens, seconds = roll(examples, most, False)
        result["rationales"] = [row(n, n, scores, tokens * n / most, seconds if n == most else roll(few, n, False)[2]) for n in numbers]
        result["greedy"] = [row(1, 1, *roll(examples, 1, True))]
    if lengths:
        result["length"] = [row(n, num_samples, *roll(examples, num_samples, num_samples == 1, max_new_tokens=n)) for n in lengths]
    return result


def test_time_table(result):
    lines = [f"{'test time':<18} {'ndcg@10':>8} {'interval':>16} {'tokens a list':>14} {'seconds a list':>15}"]
    for label, name in (("{} averaged", "rationales"), ("{} greedy", "greedy"), ("at most {} tokens", "length")):
        lines += [f"{label.format(r['value']):<18} {r['ndcg@10']['mean']:8.3f}   [{r['ndcg@10']['low']:.3f}, {r['ndcg@10']['high']:.3f}] "
                  f"{r['tokens']:14.0f} {r['seconds']:15.3f}" for r in result.get(name, ())]
    return "\n".join(lines)


# --- results and figures ------------------------------------------------------------------------------------------------------
# result.json is all that tables and figures need of a run: flags, curve, metrics, machine, seconds; no path of the machine is in it.

CURVE = ("loss", "utility", "reward", "accuracy", "length", "format_rate", "entropy", "kl", "seconds")
PLACES = ("out", "resume", "overwrite", "cache_dir", "mirror", "data_dir", "save_candidates", "save_every", "keep")  # flags not in a result
LISTS = ("method", "split", "num_candidates", "negatives", "history_length", "candidates", "since", "until", "core", "require", "query_kinds",
         "max_conditions", "list_length")  # flags that make other test lists
SAME = (*LISTS, "data", "seed", "device", "micro_batch", "rollout_rows", "eval_lists")  # flags that tell no configurations apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: told apart by all eyes


def main_metric(result):
    return "accuracy" if result["flags"]["method"] == "rerec" else "ndcg@10"


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else float(f"{x:.6g}") if isinstance(x, float) else x


def describe_run(folder, seconds, processes):
    """The part of result.json that evaluation does not change."""
    config, stages = json.loads((folder / "config.json").read_text()), {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        stages.setdefault((row := json.loads(line))["stage"], []).append(row)
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = {"processor": processor[1] if processor else platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), "processes": processes,
               "gpu": torch.cuda.get_device_name() if config["device"].startswith("cuda") else None}
    curve = {}
    for stage, rows in stages.items():  # means over windows of equal length, at most 100 of them; `step` is a window's last
        windows = [rows[n:n + math.ceil(len(rows) / 100)] for n in range(0, len(rows), math.ceil(len(rows) / 100))]
        curve[stage] = {"step": [w[-1]["step"] for w in windows]} | {k: [sum(r[k] for r in w) / len(w) for w in windows] for k in CURVE if k in rows[0]}
    return {"flags": {k: Path(v).name if isinstance(v, str) else v for k, v in config["flags"].items() if k not in PLACES},
            **{k: config[k] for k in ("seed", "versions", "device", "dtype")}, "machine": machine,
            "seconds": {stage: sum(r["seconds"] for r in rows) for stage, rows in stages.items()} | {"all": seconds}, "curve": curve}


def write_result(folder, seconds=None, processes=1):
    """Write a run's result.json from its other files; seconds None: only its evaluation is renewed, from eval.json."""
    path, report = Path(folder) / "result.json", json.loads((Path(folder) / "eval.json").read_text())
    result = json.loads(path.read_text()) if seconds is None else describe_run(Path(folder), seconds, processes)
    result.pop("test_time", None)
    result |= {k: report[k] for k in ("data", "num_lists", "lists", "systems", "test_time", "users") if k in report}
    result["differences"] = {pair: {m: v[m] for m in v if m == main_metric(result)} for pair, v in report.get("differences", {}).items()}
    result["values"] = {system: [round(x, 4) for x in v] for system, v in report.get("values", {}).items() if system != "random"}
    path.write_text("{" + ",".join(f"\n {json.dumps(k)}: {json.dumps(v)}" for k, v in rounded(result).items()) + "\n}\n")


def as_trained(args, flags):
    """Whether responses are sampled as the run's flags say: only then they belong into its result."""
    return all(getattr(args, k) == flags.get(k, False) for k in ("max_new_tokens", "temperature", "eval_samples", "facts", "smooth_facts"))


def read_result(path):
    """A run's result.json, given the run directory or the file; a copy named NAME-seedN.json is labelled NAME. Raises InputError."""
    try:
        result = json.loads((Path(path) / "result.json" if Path(path).is_dir() else Path(path)).read_text())
        if (name := re.fullmatch(r"(.+)-seed\d+\.json", Path(path).name)):
            result["label"] = name[1]
        main_metric(result), result["systems"]["rl"], result["curve"], result["lists"], result["seconds"]["all"], result["machine"]["gpu"]
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--plot {path}: no result of a finished run ({error!r}); give run directories of train.py, or copies of their result.json") from None


def configurations(results):
    """Runs that differ in the seed alone, together: ({label: results}, notes). A label, where the files have none, holds the flags that tell
    them apart, except for the value that most have; of flags that change together the first, switches before others; the rest is noted."""
    value = lambda r, k: json.dumps(r["flags"].get(k) or 0, separators=(",", ":"))  # 0, too: a switch that is off, or that an older run did not know
    column = {k: [value(r, k) for r in results] for k in dict.fromkeys(k for r in results for k in r["flags"]) if k not in SAME}
    together, groups = {}, {}
    for k in sorted((k for k in column if len(set(column[k])) > 1), key=lambda k: "true" not in column[k]):
        together.setdefault(tuple(map(column[k].index, column[k])), []).append(k)
    for r in results:
        groups.setdefault(tuple(value(r, k) for k, *_ in together.values()), []).append(r)
    usual = [next((v for v, n in Counter(values).items() if 2 * n > len(groups)), "0") for values in zip(*groups)]
    named = {}
    for values, runs in groups.items():
        words = [k.replace("_", "-") + (" " + v.strip('"[]')) * (v != "true") for (k, *_), v, u in zip(together.values(), values, usual) if v != u]
        label = ", ".join(words) or {"r2rank": "R2Rank", "rerec": "ReRec"}[runs[0]["flags"]["method"]]
        names = {r.get("label") for r in runs}
        label = names.pop() or label if len(names) == 1 else label
        if label in named:
            raise InputError(f"--plot: runs called {label} have different flags; give them different names")
        named[label] = sorted(runs, key=lambda r: r["seed"])
        if len({r["seed"] for r in runs}) < len(runs):
            raise InputError(f"--plot: two runs of {label} have the same flags and the same seed; give one of them")
    return named, [f"with {k.replace('_', '-')} {', '.join(others).replace('_', '-')} changed, too" for k, *others in together.values() if others]


def over_seeds(found):
    """Intervals, one a seed -> {"mean", "sd" (n - 1), "low", "high": their range, "values"}; of one seed its own interval, without "sd"."""
    values = [v["mean"] for v in found]
    mean = sum(values) / len(values)
    spread = {"sd": (sum((v - mean)**2 for v in values) / (len(values) - 1))**0.5, "low": min(values), "high": max(values)} if len(values) > 1 else found[0]
    return {**spread, "mean": mean, "values": values}


def against(runs, others, system="rl"):
    """The mean over lists and seeds of `system` of `others` minus `rl` of `runs`, on the lists that both have, and its 95% bootstrap over users:
    of lists alone, since a seed's luck is in it as it is. None, where they have no list in common."""
    columns = {}  # lists: ([values of one side], [of the other], users)
    for side, group in enumerate((runs, others)):
        for r in group:
            if (system if side else "rl") in r.get("values", {}):
                columns.setdefault(r["lists"], ([], [], r["users"]))[side].append(r["values"][system if side else "rl"])
    mean = lambda rows: [sum(values) / len(rows) for values in zip(*rows)]
    shared = {name: (a, b, users) for name, (a, b, users) in columns.items() if a and b}
    if shared:
        return interval([y - x for a, b, _ in shared.values() for x, y in zip(mean(a), mean(b))],
                        [(name, u) for name, (_, _, users) in shared.items() for u in users])


def summarise_results(results):
    """Blocks of runs on like lists: [{"title", "columns", "first", "runs": {label: results}, "rows": {label or baseline: {column: over_seeds}},
    "test_time": {label: …}, "notes"}]; the first column is the main metric, `against` the paired difference to the configuration `first`."""
    blocks, summaries = {}, []
    for r in results:
        blocks.setdefault(json.dumps([r["data"], r["num_lists"], *(r["flags"].get(k) or 0 for k in LISTS)]), []).append(r)
    for block in blocks.values():
        (runs, notes), metric, kinds = configurations(block), main_metric(block[0]), list(block[0]["systems"]["rl"].get("by_kind", ()))
        first = next((label for label in runs if label.lower() in ("r2rank", "rerec")), next(iter(runs)))
        runs = {first: runs[first]} | runs  # in front
        value = lambda system, column: system["by_kind"][column][metric] if column in kinds else system[column]
        columns = [metric, *(kinds or ("hr@1", "hr@10", "mrr"))]
        rows, lists, thinking = {}, {}, {}
        for label, group in runs.items():
            rows[label] = {c: over_seeds([value(r["systems"]["rl"], c) for r in group]) for c in columns}
            rows[label]["seconds"] = over_seeds([{"mean": r["seconds"]["all"]} for r in group])
            before = "sft" if "sft" in group[0]["systems"] else "zero-shot"
            if all(f"rl - {before}" in r["differences"] for r in group):
                rows[label] |= {"before": over_seeds([r["systems"][before][metric] for r in group]),
                                "gain": over_seeds([r["differences"][f"rl - {before}"][metric] for r in group])}
            thinking[label] = {}
            for name, n in sorted({(name, row["value"]) for r in group for name, many in r.get("test_time", {}).items() for row in many}):
                found = [row for r in group for row in r.get("test_time", {}).get(name, ()) if row["value"] == n]
                thinking[label].setdefault(name, []).append({"value": n, "ndcg@10": over_seeds([row["ndcg@10"] for row in found]), **{
                    k: sum(row[k] for row in found) / len(found) for k in ("tokens", "seconds")}})
        for r in block:  # a baseline does not depend on the configuration: it counts once for each set of lists
            lists.setdefault(r["lists"], {}).update(r["systems"])
        for name in dict.fromkeys(s for systems in lists.values() for s in systems if s not in ("rl", "sft", "zero-shot")):
            rows[name] = {c: over_seeds([value(systems[name], c) for systems in lists.values() if name in systems]) for c in columns}
        for name in rows:
            if name != first and (found := against(runs[first], *((runs[name],) if name in runs else (block, name)))):
                rows[name]["against"] = found
        if len(lists) > len({r["seed"] for r in block}):
            notes.append("runs of one seed were evaluated on different lists: do not compare them")
        machines = Counter("{gpu}, {processor}, {cores} core(s), {threads} thread(s), {processes} process(es)".format(**r["machine"]).removeprefix("None, ") for r in block)
        notes += [f"{n} run(s) on {machine}" for machine, n in machines.items()]
        title = f"{block[0]['data']}: {block[0]['num_lists']} {'requests' if kinds else 'lists'} of " + (
            block[0]["flags"].get("candidates") or f"{block[0]['flags']['num_candidates']} candidates")
        summaries.append({"title": title, "columns": columns, "first": first, "runs": runs, "rows": rows, "test_time": thinking, "notes": notes})
    return summaries


def result_table(block):
    """A row a configuration or baseline, means over seeds: the main metric, its deviation and range, paired difference to the first
    configuration; the others; seconds; paired gain over the model before RL."""
    metric, *others = block["columns"]
    width = max(12, *map(len, block["rows"]))
    spread = lambda v: f"{'± %.3f' % v['sd'] if 'sd' in v else '':>7} [{v['low']:.3f}, {v['high']:.3f}]"
    paired = any("against" in row for row in block["rows"].values())
    lines = [f"{block['title']}; means over seeds ± standard deviation [range]; of one seed [95% interval]",
             f"{'':<{width}} seeds {metric:>8} {'':>22} " + f" {'- ' + block['first'] + ', paired':<23}" * paired + "".join(f" {m:>11}" for m in others) +
             "  seconds  before   gain"]
    for label, row in block["rows"].items():
        line = f"{label:<{width}} {len(row[metric]['values']):5d} {row[metric]['mean']:8.3f} {spread(row[metric])} "
        v = row.get("against")
        line += f" {'%+.3f [%+.3f, %+.3f]' % (v['mean'], v['low'], v['high']) if v else '':<23}" * paired + "".join(f" {row[m]['mean']:11.3f}" for m in others)
        line += f" {row['seconds']['mean']:8.0f}" if "seconds" in row else ""
        lines.append(line + (f" {row['before']['mean']:7.3f} {row['gain']['mean']:+6.3f} {spread(row['gain'])}" if "gain" in row else ""))
    thinking = [f"\n{label}\n{test_time_table(rows)}" for label, rows in block["test_time"].items() if rows]
    return "\n".join([*lines, *(f"note: {n}" for n in block["notes"]), *thinking])


def plot_results(blocks, out):
    """Learning curves, final metrics and, where measured, test-time reasoning: a row of panels a block. Raises InputError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.colors import to_rgba
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib for its figure: pip install matplotlib") from None
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
             "axes.labelcolor": "0.3", "font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none", "svg.hashsalt": "results"}
    with matplotlib.rc_context(style):
        panels = 2 + any(rows for block in blocks for rows in block["test_time"].values())
        heights = [max(3.2, 0.9 + 0.24 * len(block["rows"])) for block in blocks]
        figure = Figure((4.8 * panels, sum(heights)), layout="constrained")
        for block, axes in zip(blocks, figure.subplots(len(blocks), panels, squeeze=False, height_ratios=heights)):
            colours = dict(zip(block["runs"], itertools.cycle(to_rgba(c, alpha) for alpha in (1, 0.5) for c in COLOURS)))
            plot_curves(axes[0], block, colours)
            plot_bars(axes[1], block, colours)
            if any(block["test_time"].values()):
                plot_test_time(axes[2], block, colours)
            elif panels > 2:
                axes[2].set_axis_off()
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def plot_curves(axes, block, colours):
    """What RL maximises on its training lists, a moving mean over a tenth of the steps: means over seeds in a band of their range."""
    name, ends = "accuracy" if block["columns"][0] == "accuracy" else "utility", []
    for label, results in block["runs"].items():
        if seeds := [r["curve"]["rl"] for r in results if "rl" in r["curve"]]:
            rows, half = list(zip(*(s[name] for s in seeds))), len(seeds[0]["step"]) // 20
            points = range((len(rows) - 1) % max(1, len(rows) // 50), len(rows), max(1, len(rows) // 50))  # 50 to 99 of them, with the last
            smooth = lambda values: [sum(part := values[max(0, n - half):n + half + 1]) / len(part) for n in points]
            steps = [seeds[0]["step"][n] for n in points]
            mean, low, high = (smooth([f(row) for row in rows]) for f in (lambda row: sum(row) / len(row), min, max))
            axes.plot(steps, mean, color=colours[label])
            axes.fill_between(steps, low, high, color=colours[label], alpha=0.15, linewidth=0)
            ends.append((mean[-1], textwrap.fill(label, 22, break_on_hyphens=False), colours[label]))
    bottom, top = axes.get_ylim()
    place = top  # labels stand at the ends of their lines, from above, none on another
    for y, text, colour in sorted(ends, reverse=True):
        height = (text.count("\n") + 1) * 0.05 * (top - bottom)
        place = min(place, y + height / 2)
        axes.annotate(text, (1, place), (4, 0), ("axes fraction", "data"), "offset points", va="top", color=colour, annotation_clip=False)
        place -= height + 0.01 * (top - bottom)
    axes.set_title(f"{block['title'].split(':')[0]}: {'accuracy' if name == 'accuracy' else 'expected NDCG@10'} in training")
    axes.set_xlabel("RL step" + (" (band: range of the seeds)" if any(len(r) > 1 for r in block["runs"].values()) else ""))


def plot_bars(axes, block, colours):
    """The main metric on test lists of configurations and, in grey, baselines."""
    metric = block["columns"][0]
    for y, (label, row) in enumerate(block["rows"].items()):
        v = row[metric]
        axes.barh(y, v["mean"], 0.7, color=colours.get(label, "0.8"))
        axes.hlines(y, v["low"], v["high"], color="black", linewidth=1)
        axes.scatter(v["values"], [y] * len(v["values"]), s=6, color="black")
        axes.annotate(f"{v['mean']:.3f}", (v["high"], y), (4, 0), textcoords="offset points", va="center")
        if "before" in row:
            axes.vlines(row["before"]["mean"], y - 0.35, y + 0.35, color="white", linewidth=2)
    axes.set_yticks(range(len(block["rows"])), [textwrap.fill(label, 26, break_on_hyphens=False) for label in block["rows"]])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(f"{'accuracy' if metric == 'accuracy' else 'NDCG@10'} on test {'requests' if metric == 'accuracy' else 'lists'}")
    axes.set_xlabel("dots: seeds (of one seed: its 95% interval); white: before RL", fontsize=7)


def plot_test_time(axes, block, colours):
    """NDCG@10 against sampled tokens: rationales averaged, and longest rationale; seconds beside each."""
    for label, result in block["test_time"].items():
        numbers, lengths = result.get("rationales", []), result.get("length", [])
        lengths = [r for n, r in enumerate(lengths) if not n or r["tokens"] > 1.02 * lengths[n - 1]["tokens"]]  # not those that no rationale reaches
        for rows, style, unit, place, va in ((numbers, "o-", "averaged", 6, "bottom"), (lengths, "s:", "tokens", -7, "top"),
                                             ([] if lengths else result.get("greedy", []), "s", "greedy", -7, "top")):
            axes.plot([r["tokens"] for r in rows], [r["ndcg@10"]["mean"] for r in rows], style, color=colours[label], markersize=4)
            for r in rows:
                text = f"{r['value']}{f' {unit}' * (r is rows[-1])}\n{r['seconds']:.2g} s"
                axes.annotate(text, (r["tokens"], r["ndcg@10"]["mean"]), (0, place), textcoords="offset points", ha="center", va=va, fontsize=7,
                              color=colours[label])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.margins(x=0.1, y=0.25)
    axes.set_title("NDCG@10 by thinking at test time")
    axes.set_xlabel("sampled tokens a list (beside: seconds a list)")


def complete_states(folder):
    """The states of a run directory, the oldest first; none that was still being written when the run was killed."""
    return sorted(p for p in (Path(folder) / "states").glob("[12]-*") if not p.suffix)


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
    g.add_argument("--data", default="toy", help=f"toy; {', '.join(data.AMAZON_2014)} (Amazon 2014); amazon2023:CATEGORY; ml-100k; ml-1m; recbench:movie or "
                   "recbench:book, with --data-dir; or a folder with NAME.inter and NAME.item (toy)")
    g.add_argument("--split", choices=("temporal", "leave-one-out"), help="temporal: 80/10/10 by time, the default of Amazon 2023 and MovieLens; "
                   "leave-one-out: the default of Amazon 2014 and folders; the toy's users are apart")
    g.add_argument("--num-candidates", type=positive(), default=20, metavar="K", help="candidates a list, one of them the positive (20)")
    g.add_argument("--negatives", choices=data.NEGATIVES, default="uniform", help="drawn uniformly, by popularity, or from the positive's category (uniform)")
    g.add_argument("--history-length", type=positive(), default=10, metavar="N", help="latest interactions shown (10)")
    g.add_argument("--facts", nargs="?", choices=("auto", "beside", "only"), const="auto", help="tell of each candidate, in levels from 0 to 9, what is known from "
                   "the training period: had together with the history, words and attributes shared with it, popularity; `beside` the text, or `only` "
                   "that (auto: only for tiny, else beside)")
    g.add_argument("--smooth-facts", action="store_true", help="with --facts, for sparse data: together by paths of two steps, attributes by how often their "
                   "values are had together, in the place of equal ones")
    g.add_argument("--candidates", metavar="FILE", help="evaluate on the lists of this JSONL: user, history (its latest --history-length items count), "
                   "candidates (item ids), relevance")
    g.add_argument("--save-candidates", metavar="FILE", help="write the evaluated lists as such a JSONL")
    g.add_argument("--data-dir", metavar="DIR", help="folder of the benchmark's files, for --data recbench:movie and recbench:book")
    g.add_argument("--cache-dir", metavar="DIR", help=f"for downloads and parsed files ({data.DEFAULT_CACHE})")
    g.add_argument("--mirror", metavar="URL", help="download from here instead of the official places")
    g.add_argument("--skip-bad-lines", action="store_true", help="count and report lines that cannot be read, instead of stopping there")
    g.add_argument("--since", metavar="DATE", help="drop earlier interactions, such as those before 2021-06-30")
    g.add_argument("--until", metavar="DATE", help="drop interactions of this day and later")
    g.add_argument("--core", type=positive(), default=0, metavar="N", help="then keep only users and items with N interactions, again and again")
    g.add_argument("--require", type=lambda text: [name.strip() for name in text.split(",")], default=[], metavar="FIELDS", help="drop items whose Amazon metadata lack one of these, "
                   "such as title,description")
    g = parser.add_argument_group("model")
    g.add_argument("--model", default="tiny", help="tiny, a local directory, a hub id, or a bare name such as Qwen2.5-1.5B (tiny)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the weights; training keeps float32 copies for the optimiser; on a CPU with units for it bfloat16 makes a step 1.2 times as fast (auto: bfloat16 on cuda, else float32)")
    g.add_argument("--no-share-prefix", action="store_true", help="give every row its own copy of the prefix (slower; for comparison)")
    g.add_argument("--micro-batch", type=positive(), metavar="ROWS", help="rows a forward or backward pass; lower it when memory runs "
                   "out (models below 20M parameters: 80; else 16, on a CPU 4)")
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


def numbers(text):
    """An argparse type: whole numbers above 0 with commas between them, in ascending order."""
    return sorted({positive()(n) for n in text.split(",")})


def check_file(flag, path):
    """Raise InputError now, and not after the work, when `path` cannot become a file."""
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise InputError(f"{flag} {path}: give a file in a folder that exists")


def check_common_flags(args):
    """The checks that need no model; returns (dataset, device, dtype). Raises InputError."""
    if args.num_candidates < 2:
        raise InputError("--num-candidates: a list to rank needs at least 2")
    check_file("--save-candidates", args.save_candidates)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.model:
        policy.resolve(args.model)
    dataset = data.load(args.data, args.split, args.seed, args.negatives, args.cache_dir, args.mirror, args.skip_bad_lines, args.since,
                        args.until, args.core, args.require, args.data_dir, args.history_length)
    if args.facts:
        if dataset.bench:
            raise InputError("--facts are about lists to rank, and RecBench+'s files hold requests; leave it out")
        args.facts = args.facts if args.facts != "auto" else "only" if args.model == "tiny" else "beside"
        dataset.facts = data.Facts(dataset, args.facts == "only", args.smooth_facts)
    elif args.smooth_facts:
        raise InputError("--smooth-facts says how --facts are counted: add --facts, or leave it out")
    if args.num_candidates > len(dataset.items) and not (args.candidates or getattr(args, "full", False)):
        raise InputError(f"--num-candidates {args.num_candidates}: {dataset.name} has only {len(dataset.items)} items")
    return dataset, device, dtype


def test_lists(dataset, args, num_lists):
    """The lists to evaluate on: those of --candidates with the latest --history-length items of their histories, or seeded ones of the test
    split; written to --save-candidates."""
    if args.candidates:
        lists = data.read_lists(args.candidates, dataset.items)[:num_lists]
        examples = [dataset.with_facts(replace(e, history=e.history[-args.history_length:])) for e in lists]
    else:
        examples = dataset.examples("test", num_lists, args.num_candidates, args.history_length, args.seed)
    if args.save_candidates:
        data.save_lists(args.save_candidates, examples)
    return examples


def fill_model_defaults(args, model, device=None):
    """Defaults that depend on the model's size, and on where it is or (device) will be, where the user gave nothing."""
    small = sum(p.numel() for p in model.parameters()) < 20e6
    kind = torch.device(device or model.device).type
    args.micro_batch = args.micro_batch or (80 if small else 4 if kind == "cpu" else 16)
    args.max_new_tokens = args.max_new_tokens or (48 if small else 256)
    args.eval_lists = args.eval_lists or (200 if small else 500 if kind == "cuda" else 20)


def sampling_of(args):
    return policy.Sampling(args.max_new_tokens, args.temperature, False, not args.no_share_prefix, args.rollout_rows)


def run_main(main):
    """Run a command line: what the user got wrong is one line on stderr and exit code 2."""
    try:
        main()
    except (InputError, OSError) as error:  # a disk that is full, a folder that is gone: the error names the file
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


def main():
    import train  # only here, as it imports this file
    with train.processes():
        run_command(train)


def run_command(train):
    """What the command line asks for. Of several processes each scores its part of the lists or requests, and rank 0 does the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.set_defaults(model=None)
    g = parser.add_argument_group("what to evaluate, and how to report it")
    g.add_argument("--run", metavar="DIR", help="a run directory of train.py; its flags are the defaults here")
    g.add_argument("--baselines", nargs="*", choices=BASELINES, metavar="NAME", help=f"also evaluate {', '.join(BASELINES)} (all, where none is named); "
                   "with neither --run nor --model, only these, on all test lists")
    g.add_argument("--full", action="store_true", help="the baselines rank the whole catalogue, for every test interaction")
    g.add_argument("--slices", action="store_true", help="print NDCG@10 by length of the history and by popularity of the positive")
    g.add_argument("--probe-orders", type=positive(), metavar="N", help="score the same lists with their candidates in N orders, and compare")
    g.add_argument("--save-predictions", metavar="FILE", help="write ranked lists of all systems in TREC run format, judgements in FILE.qrels")
    g.add_argument("--open-ended", nargs="?", const="", metavar="FILE", help="answers without candidates, titles separated by [SEP], by RecBench+'s own "
                   "metrics: those of a JSONL of {id, response}, or of the model; with --data recbench:…")
    g.add_argument("--explain", type=positive(), metavar="N", help="print N lists with scores and rationales")
    g.add_argument("--test-time", type=numbers, default=[], metavar="N,…", help="NDCG@10 and cost of so many rationales averaged, such as 1,2,4,8,16")
    g.add_argument("--test-lengths", type=numbers, default=[], metavar="N,…", help="NDCG@10 and cost of rationales of at most so many tokens, such as 8,16,48")
    g.add_argument("--plot", nargs="+", metavar="RUN", help="a table over seeds, and a figure (SVG, or as --out ends), of finished run directories or "
                   "copies of their result.json")
    g.add_argument("--out", metavar="FILE", help="default: eval.json in the run directory, or in the current one; with --plot results.svg, in results/ where there is one")
    args = parser.parse_args()
    if args.plot:
        if extra := [f"--{k.replace('_', '-')}" for k, v in vars(args).items() if k not in ("plot", "out") and v != parser.get_default(k)]:
            raise InputError(f"--plot reads finished runs and goes with --out alone; drop {', '.join(extra)}")
        return evaluate_results(args.plot, Path(args.out or Path("results" if Path("results").is_dir() else ".") / "results.svg"))
    if args.run and args.model:
        raise InputError("--run brings its own model: leave out --model, or --run")
    if args.run:
        config = Path(args.run) / "config.json"
        if not config.exists():
            raise InputError(f"--run {args.run}: no config.json there; give a directory that train.py wrote")
        places = [Path(args.run) / "checkpoint", *reversed(complete_states(args.run))]  # states: of a run that has not finished
        checkpoint = next((p for p in places if (p / "config.json").exists()), None)
        if not checkpoint:
            raise InputError(f"--run {args.run}: it holds no checkpoint yet; the run has not come far enough")
        flags = json.loads(config.read_text())["flags"]
        kept = ("device", "dtype", "out", "save_candidates")
        parser.set_defaults(**{k: v for k, v in flags.items() if k in vars(args) and k not in kept})
        args = parser.parse_args()
        args.model = str(checkpoint)
        if flags.get("facts") and args.facts == "auto":  # given again without a value
            args.facts = flags["facts"]
    baselines = None if args.baselines is None else args.baselines or [b for b in BASELINES if args.facts and not args.full or b != "facts-linear"]
    if "facts-linear" in (baselines or ()) and (args.full or not args.facts):
        raise InputError("--baselines facts-linear ranks lists by what --facts tells: add --facts, and leave out --full")
    if args.full and (args.run or args.model or not baselines):
        raise InputError("--full is for baselines alone: add --baselines, and leave out --run and --model")
    if args.full and (args.candidates or args.save_candidates or args.save_predictions):
        raise InputError("--full ranks the whole catalogue; it goes with neither --candidates, --save-candidates nor --save-predictions")
    if not (args.run or args.model or baselines or args.open_ended):
        args.model = "tiny"
    if args.probe_orders == 1:
        raise InputError("--probe-orders 1: there is nothing to compare; give at least 2")
    if not args.model and (args.probe_orders or args.explain):
        raise InputError("--probe-orders and --explain look at a language model: add --run or --model")
    rerec_run = args.run and flags.get("method") == "rerec"
    lists_alone = ("baselines", "slices", "probe_orders", "save_predictions", "candidates", "save_candidates")
    if rerec_run and (ignored := [f"--{k.replace('_', '-')}" for k in lists_alone if getattr(args, k) not in (None, False)]):
        raise InputError(f"{', '.join(ignored)}: about lists to rank, and this is a run of --method rerec, which answers requests; leave it out")
    thinking = args.test_time or args.test_lengths
    if thinking and (not args.model or rerec_run):
        raise InputError("--test-time and --test-lengths are about R2Rank's rationales: add --run of such a run, or --model")
    out = Path(args.out) if args.out else Path(args.run or ".") / "eval.json"
    check_file("--out", out)
    check_file("--save-predictions", args.save_predictions)
    if thinking and train.world() > 1:
        raise InputError("--test-time and --test-lengths measure seconds: start them without torchrun")
    dataset, device, dtype = train.rank_0_first(lambda: check_common_flags(args))
    if train.rank():
        if not args.model or args.open_ended is not None:
            return
        args.save_candidates = baselines = None
    device = train.own_gpu(device)
    if args.full:
        return evaluate_full(dataset, args, baselines, out)
    if args.open_ended is not None:
        if not dataset.bench:
            raise InputError("--open-ended: give RecBench+'s files with --data recbench:movie --data-dir DIR; only they have answers without candidates")
        if args.open_ended:
            return evaluate_open_ended(dataset, read_responses(args.open_ended, dataset.bench.queries), out)
        queries = data.query_source(dataset, seed=args.seed).draw("test", args.eval_lists or 100)
        model, tokenizer = policy.load(args.model, device, dtype, dataset.texts(), args.seed)
        fill_model_defaults(args, model)
        responses = rerec.answer_open_ended(model, tokenizer, queries, replace(sampling_of(args), greedy=True))
        return evaluate_open_ended(dataset, list(zip(queries, responses)), out)
    if rerec_run:
        return evaluate_rerec_run(args, flags, out, dataset, device, dtype, train)
    if dataset.bench:
        raise InputError(f"--data {args.data}: these are requests, for a run of train.py --method rerec (--run DIR) or for --open-ended")
    if not args.candidates:
        dataset.examples("test", 1, args.num_candidates, args.history_length, args.seed)  # bad lists are an error before any model
    if args.model:
        if args.run:
            model, tokenizer, score_head = r2r.load_checkpoint(args.model, device, dtype)
            if checkpoint.name.startswith("1-sft"):  # its head has learned nothing yet
                score_head = None
        else:
            model, tokenizer = policy.load(args.model, device, dtype, dataset.texts(), args.seed)
            path = Path(args.model).expanduser() / "score_head.safetensors"
            score_head = r2r.ScoreHead.load(path).to(device) if path.exists() else None
        fill_model_defaults(args, model)
        reasoning = score_head.reasoning if score_head else not args.no_reasoning
        if thinking and not reasoning:
            raise InputError("--test-time and --test-lengths: there are no rationales, this is the control without reasoning")
    examples = test_lists(dataset, args, args.eval_lists)
    counts = dataset.popularity()
    scores = {"random": random_scores(examples, args.seed), "popularity": popularity_scores(examples, counts)}
    more = {}
    if baselines:
        rankers = fit_baselines(dataset, baselines, args.seed)
        scores |= {name: baseline_scores(dataset, ranker, examples) for name, ranker in rankers.items()}
        if "facts-linear" in baselines:
            scores["facts-linear"] = facts_linear(dataset, examples, args.history_length, seed=args.seed)
    if args.model:
        def score(lists, label="eval"):
            torch.manual_seed(args.seed + train.rank())
            return train.gather(model_scores(model, tokenizer, score_head, train.part(lists), sampling_of(args), args.eval_samples, args.micro_batch,
                                             reasoning, label))

        name, results = "rl" if score_head else "zero-shot", score(examples)
        scores[name] = [s for s, _ in results]
        if thinking:
            more["test_time"] = test_time(model, tokenizer, score_head, examples, sampling_of(args), args.micro_batch, args.test_time,
                                          args.test_lengths, args.eval_samples, args.seed)
        if args.probe_orders:
            more["position_probe"] = {name: position_probe(lambda lists: [s for s, _ in score(lists, "probe")], examples, args.probe_orders, args.seed)}
    if train.rank():
        return
    evaluated = {name: evaluate(s, examples) for name, s in scores.items()}
    values, users = {name: v for name, (_, v) in evaluated.items()}, [e.user for e in examples]
    more["slices"] = slices(values, examples, counts)
    systems = write_eval(out, dataset.name, examples, {name: s for name, (s, _) in evaluated.items()}, values, bool(args.run),
                         bool(args.run) and as_trained(args, flags), **more)
    if args.save_predictions:
        save_predictions(args.save_predictions, examples, scores)
    if args.explain:
        explain(examples, results, args.explain)
        print()
    print(f"{dataset.name}: {len(examples)} test lists of {len(examples[0].candidates)} candidates\n"
          f"{table(systems, ('ndcg@10', 'hr@1', 'hr@5', 'hr@10', 'mrr', 'rank'))}")
    last = list(values)[-1]
    if baselines and len(values) > 2:
        for other in list(values)[:-1]:
            print(f"{last} - {other}, paired: {difference(values[last]['ndcg@10'], values[other]['ndcg@10'], users)} NDCG@10")
    if args.slices:
        print(slice_table(more["slices"]))
    if "test_time" in more:
        print("\n" + test_time_table(more["test_time"]))
    for name, probe in more.get("position_probe", {}).items():
        print(f"{name}, candidates in {probe['orders']} orders: scores differ by at most {probe['max_score_difference']:.1e}, "
              f"{100 * probe['same_ranking']:.1f}% of the lists are ranked the same; NDCG@10 {min(probe['ndcg@10']):.3f} to {max(probe['ndcg@10']):.3f}")
    print(f"written to {out}")


def evaluate_results(paths, out):
    """--plot: the table of runs first; it does not need matplotlib, without which the figure is an error."""
    check_file("--out", out)
    if out.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"--out {out}: a figure's file ends in .svg, .png or .pdf")
    blocks = summarise_results([read_result(path) for path in paths])
    print("\n\n".join(map(result_table, blocks)), flush=True)
    plot_results(blocks, out)
    print(f"figure written to {out}")


def evaluate_full(dataset, args, baselines, out):
    """--full: the baselines rank the whole catalogue."""
    targets = dataset.targets("test", args.seed)[:args.eval_lists]
    users, values = [u for u, _ in targets], {}
    rankers = fit_baselines(dataset, baselines, args.seed)
    if "random" in baselines:
        generator = torch.Generator().manual_seed(args.seed)
        rankers = {"random": lambda users, histories: torch.rand(len(users), len(dataset.items), generator=generator)} | rankers
    for name, ranker in rankers.items():
        rows = full_ranking(dataset, ranker, targets)
        values[name] = {m: [row[m] for row in rows] for m in METRICS}
    systems = {name: intervals(v, users) for name, v in values.items()}
    examples = [data.Example(u, dataset.sequences[u][:p], [dataset.items[dataset.sequences[u][p].item_id]], [1.0]) for u, p in targets]
    report = {"data": dataset.name, "num_targets": len(targets), "num_items": len(dataset.items), "full": systems,
              "differences": paired_differences(values, users), "slices": slices(values, examples, dataset.popularity())}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{dataset.name}: {len(targets)} test interactions, each ranked among {len(dataset.items)} items\n"
          f"{table(systems, ('ndcg@10', 'hr@1', 'hr@5', 'hr@10', 'hr@20', 'mrr', 'rank'))}")
    if args.slices:
        print(slice_table(report["slices"]))
    print(f"written to {out}")


if __name__ == "__main__":
    run_main(main)
