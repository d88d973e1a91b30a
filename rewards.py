"""Rewards and ranking metrics; for ReRec the boxed answer, its alignment with the truth, and LightGCN.

A ranking is given as the relevance of *all* its candidates, best-ranked first:

    DCG@k = sum_{r<=k} (2^y_r - 1) / log2(r + 1)        NDCG@k = DCG@k / DCG@k of the ideal order
"""

import hashlib
import math
import os
import re
import unicodedata
from difflib import SequenceMatcher
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from data import title_key


def ndcg_at_k(ranked_relevance, k):
    """NDCG@k in [0, 1] with gain 2^y - 1 and discount 1/log2(rank + 1); 0 when nothing is relevant."""
    def dcg(relevance):
        return sum((2.0**y - 1.0) / math.log2(r + 2) for r, y in enumerate(relevance[:k]))

    ranked_relevance = [float(y) for y in ranked_relevance]
    ideal = dcg(sorted(ranked_relevance, reverse=True))
    return dcg(ranked_relevance) / ideal if ideal > 0 else 0.0


def hit_at_k(ranked_relevance, k):
    """1.0 when one of the first k is relevant, else 0.0."""
    return float(any(y > 0 for y in ranked_relevance[:k]))


def reciprocal_rank(ranked_relevance):
    """1 / rank of the first relevant candidate; 0.0 when there is none."""
    return next((1.0 / (r + 1) for r, y in enumerate(ranked_relevance) if y > 0), 0.0)


def discounted_gains(relevance, k):
    """gains 2^y - 1 (K,), discounts 1/log2(rank + 1) (k,), and the ideal DCG@k (scalar), as tensors."""
    gains = torch.exp2(relevance) - 1
    discounts = 1 / torch.log2(torch.arange(2, k + 2, dtype=gains.dtype, device=gains.device))
    return gains, discounts, (gains.sort(descending=True).values[:k] * discounts).sum()


# --- ReRec: the answer and its graphs -------------------------------------------------------------------------------------


def shown_title(item):
    """The title as prompts show it, so that no item's text can be taken for an answer: one line, no `\\boxed`, braces in pairs."""
    title = re.sub(r"\\+boxed", "boxed", " ".join(item.title.split()))
    depth = 0
    for c in title:
        depth += (c == "{") - (c == "}")
        if depth < 0:
            break
    return title if depth == 0 else title.replace("{", "(").replace("}", ")")


def normalise(title):
    """Titles are compared without case, compatibility forms, surrounding quotes and runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", title).casefold().split()).strip("\"'“”‘’` ")


def find_box(text):
    """(start, end) of the first `\\boxed{…}` with balanced braces, or None where it never closes. Time is linear in the text."""
    start = text.find("\\boxed{")
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start) if start >= 0 else ():
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start, brace.end()
    return None


def parse_boxed(text):
    """What the first `\\boxed{…}` holds, or None where there is none (or where the first one never closes)."""
    box = find_box(text)
    return text[box[0] + 7:box[1] - 1].strip() if box else None


def parse_answers(boxed, candidates):
    """The candidates that a box names, in order: [Item or None]; None stands for a title that no candidate has.

    Titles are separated by `;` and may contain it: of the stretches that start at a title, the longest that some candidate is
    called counts. A candidate named again is left out. No box, or an empty one: [].
    """
    by_title = {}
    for c in candidates:
        if title := normalise(shown_title(c)):
            by_title.setdefault(title, c)
    parts = (boxed or "").split(";")
    longest = 1 + max((t.count(";") for t in by_title), default=0)
    found, named, start = [], set(), 0
    while start < len(parts):
        end = next((e for e in range(min(len(parts), start + longest), start, -1) if normalise(";".join(parts[start:e])) in by_title), None)
        if end is None:
            end = start + 1
            if parts[start].strip():
                found.append(None)
        elif (item := by_title[normalise(";".join(parts[start:end]))]).id not in named:
            named.add(item.id)
            found.append(item)
        start = end
    return found


def attribute_graph(items):
    """N(item): item id -> its neighbours on the item-attribute graph, (attribute, value) pairs."""
    return {x.id: frozenset((name, value) for name, values in x.attributes.items() for value in values) for x in items}


def query_alignment(predicted, truths, graph):
    """QAS(p, t) = |N(p) & N(t)| / |N(t)| (METHODS §2), in [0, 1]; with several truths N(t) is what they all have.

    predicted: an item id or None; truths: item ids; graph: `attribute_graph`. 0 for an item that is not in the graph, and where
    the truths have nothing in common.
    """
    if predicted not in graph or not truths or any(t not in graph for t in truths):
        return 0.0
    wanted = frozenset.intersection(*(graph[t] for t in truths))
    return len(graph[predicted] & wanted) / len(wanted) if wanted else 0.0


def preference_alignment(predicted, truths, embeddings):
    """PAS(p, t) = cosine of the items' LightGCN embeddings, in [-1, 1]; several truths: the largest (ours).

    embeddings: item id -> (D,) tensor. 0 where the prediction, or every truth, has none (no training interaction).
    """
    known = [embeddings[t] for t in truths if t in embeddings]
    if predicted not in embeddings or not known:
        return 0.0
    return torch.cosine_similarity(embeddings[predicted][None], torch.stack(known), dim=-1).max().item()


# --- LightGCN --------------------------------------------------------------------------------------------------------------


class Propagate(torch.autograd.Function):
    """x (N, D) -> A_hat x (N, D). A_hat is symmetric, so the gradient of x is A_hat grad: the same product, no transpose.

    A_hat comes by rows: row n has `neighbours[offsets[n]:offsets[n + 1]]` with those `weights`. embedding_bag sums them in
    one kernel (1.7 ms on one core for Beauty's 307,552 entries, D = 64; torch.sparse takes 12 ms as CSR and 17 as COO).
    """

    @staticmethod
    def forward(ctx, x, neighbours, offsets, weights):
        ctx.save_for_backward(neighbours, offsets, weights)
        weights = weights.to(x.dtype)
        return F.embedding_bag(neighbours, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)

    @staticmethod
    def backward(ctx, grad):
        return Propagate.apply(grad.contiguous(), *ctx.saved_tensors), None, None, None


class LightGCN(nn.Module):
    """LightGCN (He et al. 2020): embeddings = mean over l = 0..L of A_hat^l E0, with A_hat = D^-1/2 A D^-1/2 (users + items).

    pairs: (E, 2) long, (user, item) training interactions; a pair given twice counts once. A user or an item without any
    has an empty row in A_hat and keeps E0 / (L + 1). A score is users[u] @ items[i].
    """

    def __init__(self, num_users, num_items, pairs, dim=64, layers=3):
        super().__init__()
        self.num_users, self.layers = num_users, layers
        self.embedding = nn.Parameter(nn.init.normal_(torch.empty(num_users + num_items, dim), std=0.1))
        keys = torch.unique(pairs[:, 0].cpu() * num_items + pairs[:, 1].cpu())  # a number a pair; each once
        user, item = keys // num_items, keys % num_items
        row, column = torch.cat([user, item + num_users]), torch.cat([item + num_users, user])
        order = row.argsort(stable=True)
        degree = torch.bincount(row, minlength=num_users + num_items)
        self.register_buffer("neighbours", column[order], persistent=False)
        self.register_buffer("offsets", F.pad(degree.cumsum(0), (1, 0)), persistent=False)
        # Only nodes with an edge appear here, so no degree is 0.
        self.register_buffer("weights", (degree[row] * degree[column]).float().rsqrt()[order], persistent=False)

    def propagate(self):
        """-> users (U, D), items (I, D)."""
        layer = total = self.embedding
        for _ in range(self.layers):
            layer = Propagate.apply(layer, self.neighbours, self.offsets, self.weights)
            total = total + layer
        total = total / (self.layers + 1)
        return total[:self.num_users], total[self.num_users:]


def fit_lightgcn(num_users, num_items, pairs, dim=64, layers=3, epochs=100, lr=0.01, l2=1e-4, batch_size=8192, seed=0,
                 evaluate=None, every=5, patience=3, device="cpu"):
    """Train a LightGCN with BPR on pairs (E, 2); returns it in eval mode.

    Negatives are uniform over the items that are not among the user's `pairs`. evaluate: model -> float, higher is better,
    called `every` epochs; the best state is returned, and training stops after `patience` calls without a better one.
    The same seed gives the same model; the global random state is left as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = LightGCN(num_users, num_items, pairs, dim, layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    keys = torch.unique(pairs[:, 0].cpu() * num_items + pairs[:, 1].cpu())  # a number a pair, sorted: found by binary search
    user, item = keys // num_items, keys % num_items
    trainable = (torch.bincount(user) < num_items)[user].nonzero()[:, 0]  # who has every item has no negative
    if not len(trainable):
        raise ValueError("LightGCN needs at least one user with some, but not all, of the items")

    def draw_negatives(user):
        negative = torch.randint(num_items, user.shape, generator=generator)
        todo = torch.arange(len(user))
        while len(todo):
            key = user[todo] * num_items + negative[todo]
            todo = todo[keys[torch.searchsorted(keys, key).clamp(max=len(keys) - 1)] == key]
            negative[todo] = torch.randint(num_items, todo.shape, generator=generator)
        return negative

    best, best_state, waited = -float("inf"), None, 0
    bar = tqdm(range(1, epochs + 1), desc="LightGCN", unit="epoch", leave=False)
    for epoch in bar:
        order = trainable[torch.randperm(len(trainable), generator=generator)]
        triples = torch.stack([user[order], item[order] + num_users, draw_negatives(user[order]) + num_users])  # (3, E)
        for batch in triples.to(device).split(batch_size, dim=1):
            u, i, j = F.embedding(batch, torch.cat(model.propagate()))  # (B, D) each; unlike [batch], its gradient adds up in one order
            bpr = F.softplus((u * (j - i)).sum(1)).mean()  # -log sigmoid(positive - negative)
            loss = bpr + l2 / 2 * F.embedding(batch, model.embedding).square().sum() / batch.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if evaluate is not None and epoch % every == 0:
            with torch.no_grad():
                value = evaluate(model.eval())
            model.train()
            bar.set_postfix(bpr=f"{bpr.item():.3f}", validation=f"{value:.4f}")
            waited += 1
            if value > best:
                best, best_state, waited = value, {k: v.clone() for k, v in model.state_dict().items()}, 0
            if waited == patience:
                break
    if best_state is not None:
        model.load_state_dict(best_state)
    return model.eval()


def item_embeddings(dataset, cache_dir, dim=64, layers=3, seed=0):
    """LightGCN's item embeddings, item id -> (D,), learnt from the training interactions alone; items without any are left out.

    About 1,000 steps, which is where Beauty's validation metrics stop rising (30 to 80 epochs of 19 steps). Trained once: the result
    is kept as CACHE_DIR/lightgcn-HASH.safetensors, the hash over the training pairs and settings. A data set without training
    interactions gives {}.
    """
    users = {user: n for n, user in enumerate(dataset.sequences)}
    items = {item: n for n, item in enumerate(dataset.items)}
    pairs = sorted({(users[u], items[x.item_id]) for u, s in dataset.sequences.items() for x in s[:dataset.train_length[u]]})
    if not pairs:
        return {}
    pairs = torch.tensor(pairs)
    epochs = max(1, round(1000 / math.ceil(len(pairs) / 8192)))
    key = hashlib.sha256(pairs.numpy().tobytes() + repr((list(items), len(users), dim, layers, epochs, seed)).encode()).hexdigest()[:16]
    path = Path(cache_dir).expanduser() / f"lightgcn-{key}.safetensors"
    try:
        vectors = load_file(path)["items"]
    except (OSError, SafetensorError, KeyError):  # not there yet, or broken off while it was written
        vectors = fit_lightgcn(len(users), len(items), pairs, dim, layers, epochs, seed=seed).propagate()[1].detach().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({"items": vectors}, temporary)
        temporary.replace(path)
    seen = set(pairs[:, 1].tolist())
    return {item: vectors[n] for item, n in items.items() if n in seen}


# --- RecBench+'s open-ended answers --------------------------------------------------------------------------------------------

SEPARATOR = "[SEP]"
MAX_PREDICTIONS = 200  # only the first so many are compared with the truths; all of them count in the precision
MAX_TITLE = 300        # a longer prediction is no title


def open_ended(response, truths, match="recbench"):
    """Score an answer without candidates, titles separated by [SEP]: {"precision", "recall", "ndcg": float, "ftr": bool}.

    truths: the right titles as the data writes them, with the year. NDCG: gain 1, discount 1/log2(rank + 1), over all
    predictions; the ideal has all truths first.

    match="recbench": the benchmark's rule for movies, without its knowledge graph [A]; reproduces its published scores.
      - A prediction loses the white space, then ' and then " around it, then a trailing " (1994)". Case and a truth's year stay.
      - It hits the first truth, in the data's order, with SequenceMatcher(None, prediction, truth).ratio() >= 0.8. So a short
        title given without its year misses: "Pulp Fiction" against "Pulp Fiction (1994)" has 24/31.
      - precision = truths hit / all predictions, empty and repeated ones too; recall = truths hit / truths. A truth hit twice
        counts once in both, but gains twice in NDCG, which can exceed 1.
      - ftr (fail to recommend) = no [SEP] in the response. The rest is computed all the same, the response being one prediction.

    match="exact" [C]: the names of `title_key` are equal, and so are the years where both have one. Empty predictions are
      dropped, each truth is hit once and a repeated prediction never, so all three lie in [0, 1]. One title without [SEP] is an
      answer; ftr = no prediction of 1 to MAX_TITLE characters.

    Time: O(len(response)), and MAX_PREDICTIONS comparisons a truth, each bounded by the truth's length (exact: by MAX_TITLE).
    """
    if not isinstance(response, str) or isinstance(truths, str):
        raise TypeError("open_ended(response, truths): a text and a list of titles")  # a bare title would be read as its letters
    if match not in ("recbench", "exact"):
        raise ValueError(f"match must be recbench or exact, not {match!r}")
    predictions = response.split(SEPARATOR)
    if match == "recbench":
        ftr, truths = len(predictions) == 1, list(dict.fromkeys(truths))
        hits = [_recbench_hit(p, truths) for p in predictions[:MAX_PREDICTIONS]]
    else:
        predictions = [p for p in map(str.strip, predictions) if p]
        ftr = all(len(p) > MAX_TITLE for p in predictions)
        truths = [t for t in dict.fromkeys(map(title_key, truths)) if t[0]]
        hits = _exact_hits([title_key(p) if len(p) <= MAX_TITLE else ("", "") for p in predictions[:MAX_PREDICTIONS]], truths)
    num_hit = sum(t in hits for t in truths)
    dcg = sum(1 / math.log2(r + 2) for r, hit in enumerate(hits) if hit is not None)
    ideal = sum(1 / math.log2(r + 2) for r in range(len(truths)))
    return {"precision": num_hit / len(predictions) if predictions else 0.0, "recall": num_hit / len(truths) if truths else 0.0,
            "ndcg": dcg / ideal if truths else 0.0, "ftr": ftr}


def _recbench_hit(prediction, truths):
    """The truth that the benchmark takes the prediction for, or None."""
    name = prediction.strip().strip("'").strip('"').strip()
    name = re.sub(r"\s\(\d{4}\)$", "", name).strip()
    for truth in truths if name else ():
        matcher = SequenceMatcher(None, name, truth)
        # The quick ratios are upper bounds of the ratio, so they change no result; a megabyte against a title stops at the first.
        if matcher.real_quick_ratio() >= 0.8 and matcher.quick_ratio() >= 0.8 and matcher.ratio() >= 0.8:
            return truth
    return None


def _exact_hits(keys, truths):
    """For each prediction's (name, year) the truth it hits, or None."""
    named, left, seen, hits = set(keys), list(truths), set(), []
    for name, year in keys:
        fits = [t for t in left if t[0] == name and (not year or not t[1] or t[1] == year)] if (name, year) not in seen else []
        # Without a year and with a choice (two King Kongs), not the one that another prediction names with its year.
        hit = min(fits, key=named.__contains__) if name and fits else None
        if hit:
            left.remove(hit)
        seen.add((name, year))
        hits.append(hit)
    return hits
