"""What a language model is compared with: popularity, titles, item-kNN, LightGCN and SASRec.

    python extras/baselines.py --data beauty --full     every item ranked, for every test interaction
    python eval.py --baselines --data beauty            the same baselines on lists of candidates

A *ranker* is a function (users, histories) -> scores (B, I) of all items, in the order of dataset.item_ids.
Users are ids; histories are lists of item numbers (places in item_ids), oldest first. All learn from the
training period; decays and epochs are chosen by NDCG@10 on validation (all items ranked).
"""

import argparse
import copy
import json
import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what is in its folder

import torch
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2Model

from data import InputError
from eval import METRICS, expected_metrics, intervals, paired_differences, table
from extras.flags import add_common_flags, load_data, run_main
from rewards import fit_lightgcn

BASELINES = ("popularity", "title-overlap", "item-knn", "lightgcn", "sasrec")
HANDICAPS = """note: the baselines see the history that the language model sees; SASRec could use 50 items.
They do not learn from validation interactions, the last before the target: LightGCN never sees them."""
DECAYS = (1.0, 0.9, 0.8, 0.6, 0.4)  # weight of an item relative to the one after it

def feature_vectors(rows, idf):
    """Sparse (I, features) of the items' features; each weighs 1, or log(I / number of items with it)."""
    number = Counter(f for row in rows for f in row)
    column = {f: n for n, f in enumerate(number)}
    where = torch.tensor([(i, column[f]) for i, row in enumerate(rows) for f in row]).long().reshape(-1, 2).T
    weight = torch.tensor([math.log(len(rows) / n) if idf else 1.0 for n in number.values()])
    return torch.sparse_coo_tensor(where, weight[where[1]], (len(rows), len(number)), check_invariants=True)

def cosine_ranker(vectors, decay):
    """score_i = sum over the history of decay^age cos(v_i, v_h), where the latest item has age 0."""
    vectors = vectors.coalesce()
    scale = (vectors * vectors).sum(1).to_dense().clamp(min=1e-12).rsqrt()  # 1 / length
    def score(users, histories):
        weights = torch.zeros(len(histories), len(vectors))  # (B, I)
        for row, history in zip(weights, histories):
            ages = torch.arange(len(history) - 1.0, -1, -1)
            row.index_add_(0, torch.tensor(history, dtype=torch.long), decay**ages)
        # From the right: never the cosines of all pairs, (I, I), only (features, B).
        return (vectors @ (vectors.T @ (scale * weights).T)).T * scale
    return score

def lightgcn_ranker(number, model):
    """number: user -> the user's row in the model. Others are the mean of their history, without one 0."""
    with torch.no_grad():
        user_rows, item_rows = model.propagate()
    def score(users, histories):
        rows = [user_rows[number[u]] if u in number else item_rows[history].sum(0) / max(1, len(history))
                for u, history in zip(users, histories)]
        return torch.stack(rows) @ item_rows.T
    return score

class SASRec(nn.Module):
    """SASRec (Kang & McAuley 2018), a small GPT over a user's items: state . embedding scores the next item.
    Number num_items is padding, on the right, which causality keeps out of all real states."""

    def __init__(self, num_items, dim=64, layers=2, heads=2, max_len=50, dropout=0.5):
        super().__init__()
        self.max_len, self.padding = max_len, num_items
        self.body = GPT2Model(GPT2Config(
            vocab_size=num_items + 1, n_positions=max_len, n_embd=dim, n_layer=layers, n_head=heads,
            n_inner=dim, use_cache=False, bos_token_id=None, eos_token_id=None, activation_function="relu",
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
        self.items = self.body.wte

    def forward(self, rows):
        """rows (B, T) long, T <= max_len -> states (B, T, D); the one at t has seen the items 0..t."""
        return self.body(inputs_embeds=self.items(rows) * self.items.embedding_dim**0.5).last_hidden_state

    def pad(self, rows):
        rows = [torch.tensor(row or [self.padding]) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)

    @torch.no_grad()
    def scores(self, users, histories):
        """The ranker; an empty history scores all items 0."""
        rows = self.pad([h[-self.max_len:] for h in histories])
        lengths = (rows < self.padding).sum(1)
        states = self(rows)[torch.arange(len(rows)), lengths.clamp(min=1) - 1]  # (B, D)
        return (states * (lengths > 0)[:, None]) @ self.items.weight[:-1].T

    def loss(self, rows, negatives):
        """Cross-entropy of the next items in rows (B, T) against negatives (N,) that a row does not have."""
        has = torch.zeros(len(rows), self.padding + 1, dtype=torch.bool).scatter_(1, rows, True)[:, negatives]
        row, place = (rows[:, 1:] < self.padding).nonzero(as_tuple=True)  # (P,) each: what has a next item
        states = self(rows[:, :-1])[row, place]  # (P, D)
        target = (states * self.items(rows[row, place + 1])).sum(1, keepdim=True)  # (P, 1)
        others = (states @ self.items(negatives).T).masked_fill(has[row], -float("inf"))  # (P, N)
        return nn.functional.cross_entropy(torch.cat([target, others], 1), torch.zeros_like(row))

def fit_sasrec(num_items, sequences, epochs=50, lr=1e-3, num_negatives=1024, batch_size=256, seed=0,
               stop=None, **sizes):
    """Train a SASRec on sequences of item numbers; `stop` as in rewards.fit_lightgcn.
    Deviation: a softmax over the target and `num_negatives` items, uniform and shared by a batch, in place of
    a logistic loss with one. Nothing pushes down the history's items: leave them out of a ranking."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():  # weights and dropout draw from it
        torch.manual_seed(seed)
        model = SASRec(num_items, **sizes)
        sequences = [s[-model.max_len - 1:] for s in sequences if len(s) > 1]
        if not sequences:
            raise InputError("SASRec needs at least one sequence of two or more items")
        lengths = torch.tensor([len(s) for s in sequences])
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98))
        for epoch in tqdm(range(1, epochs + 1), desc="SASRec", unit="epoch", leave=False):
            # Batches hold similar lengths, for speed, and are others in each epoch.
            jitter = 2 * torch.rand(len(lengths), generator=generator)
            batches = (lengths + jitter).argsort().split(batch_size)
            for b in torch.randperm(len(batches), generator=generator).tolist():
                negatives = torch.randperm(num_items, generator=generator)[:num_negatives]
                optimizer.zero_grad()
                model.loss(model.pad([sequences[n] for n in batches[b].tolist()]), negatives).backward()
                optimizer.step()
            if stop and stop(model, epoch):
                break
    return model.eval()

def fit_ranker(fit, ranker_of, validate, every, patience):
    """The ranker of the best epoch; looks at one in `every`, and ends after `patience` without a better one.
    fit: takes `stop`, as fit_lightgcn; ranker_of: model -> ranker; validate: ranker -> float."""
    values, best = [], []
    def stop(model, epoch):
        if epoch % every == 0:
            ranker = ranker_of(copy.deepcopy(model).eval())
            values.append(validate(ranker))
            waited = len(values) - 1 - values.index(max(values))
            best[:] = best if waited else [ranker]
            return waited == patience
    fit(stop=stop)
    return best[0]

def fit_baselines(dataset, names=BASELINES, seed=0, num_validation=2000):
    """{name: ranker}. Raises InputError for unknown names, and where a baseline has nothing to learn from."""
    if unknown := ", ".join(name for name in names if name not in BASELINES):
        raise InputError(f"baseline {unknown}: there is none; give some of {', '.join(BASELINES)}")
    training, index = dataset.training(), {i: n for n, i in enumerate(dataset.item_ids)}
    if not training:
        raise InputError(f"{dataset.name}: no interactions in the training period to learn baselines from")
    rows = [[index[i] for i in ids] for ids in training.values()]
    pairs = torch.tensor([(u, i) for u, row in enumerate(rows) for i in row])
    def validate(ranker):
        targets = dataset.targets("validation", seed)[:num_validation]
        return sum(row["ndcg@10"] for row in full_ranking(dataset, ranker, targets))
    def fit(name):
        if name == "popularity":
            counts = pairs[:, 1].bincount(minlength=len(index)).float()
            return lambda users, histories: counts.expand(len(users), -1)
        if name == "lightgcn":
            ranker_of = partial(lightgcn_ranker, {user: n for n, user in enumerate(training)})
            fit = partial(fit_lightgcn, len(rows), len(index), pairs, seed=seed)
            return fit_ranker(fit, ranker_of, validate, every=5, patience=3)
        if name == "sasrec":
            fit = partial(fit_sasrec, len(index), rows, seed=seed)
            return fit_ranker(fit, lambda model: model.scores, validate, every=2, patience=5)
        features = [set(re.findall(r"\w+", x.title.lower())) for x in dataset.items.values()]
        if name == "item-knn":  # the features of an item are the users who had it
            features = [set() for _ in index]
            for u, i in pairs.tolist():
                features[i].add(u)
        vectors = feature_vectors([sorted(f) for f in features], idf=name == "title-overlap")
        return max((cosine_ranker(vectors, decay) for decay in DECAYS), key=validate)
    return {name: fit(name) for name in names}

def score_rows(ranker, users, histories, batch=256):
    """Yields the ranker's scores (I,) of each user; all of them at once may not fit."""
    for n in range(0, len(users), batch):
        yield from ranker(users[n:n + batch], histories[n:n + batch])

def list_scores(dataset, examples, names=BASELINES, seed=0):
    """What eval.py --baselines adds to its systems, the scores of each list: {name: [(K,) …]}."""
    index, scores = {i: n for n, i in enumerate(dataset.item_ids)}, {}
    users, histories = [e.user for e in examples], [[index[x.id] for x in e.history] for e in examples]
    for name, ranker in fit_baselines(dataset, names, seed).items():
        rows = score_rows(ranker, users, histories)
        scores[name] = [row[[index[c.id] for c in e.candidates]] for row, e in zip(rows, examples)]
    return scores

def full_ranking(dataset, ranker, targets):
    """expected_metrics of each target (user, position) among all items but those that the user had before."""
    index, metrics = {i: n for n, i in enumerate(dataset.item_ids)}, []
    sequences = [[index[x.item_id] for x in dataset.sequences[u][:p + 1]] for u, p in targets]
    rows = score_rows(ranker, [u for u, _ in targets], [s[:-1] for s in sequences])
    for row, (*past, truth) in zip(rows, sequences):
        others = torch.ones(len(row), dtype=torch.bool)
        others[past] = False
        others[truth] = True  # what is bought again is still a target
        above, tied = ((op(row, row[truth]) & others).sum().item() for op in (torch.gt, torch.eq))
        metrics.append(expected_metrics([(above, []), (tied, [1.0])]))
    return metrics

def main():
    parser = argparse.ArgumentParser(description="Rank the whole catalogue for all test interactions.")
    add_common_flags(parser)
    parser.add_argument("--full", action="store_true", required=True, help="(for lists: eval.py)")
    parser.add_argument("--baselines", nargs="+", default=BASELINES, metavar="NAME")
    parser.add_argument("--out", type=Path, default="baselines-full.json", metavar="FILE")
    args = parser.parse_args()
    dataset = load_data(args)
    targets = dataset.targets("test", args.seed)[:args.eval_lists]
    size, users, values = len(dataset.items), [user for user, _ in targets], {}
    rankers = {"random": lambda users, histories: torch.zeros(len(users), size)}  # all tied
    for name, ranker in (rankers | fit_baselines(dataset, args.baselines, args.seed)).items():
        rows = full_ranking(dataset, ranker, targets)
        values[name] = {metric: [row[metric] for row in rows] for metric in METRICS}
    full = {name: intervals(columns, users) for name, columns in values.items()}
    report = {"data": dataset.name, "num_targets": len(targets), "num_items": size, "full": full,
              "differences": paired_differences(values, users)}
    print(f"{dataset.name}: {len(targets)} test interactions, each ranked among {size} items")
    print(table(full, ("ndcg@10", "hr@1", "hr@5", "hr@10", "hr@20", "mrr", "rank")))
    args.out.write_text(json.dumps(report, indent=1) + "\n")

if __name__ == "__main__":
    run_main(main)
