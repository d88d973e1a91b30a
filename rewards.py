"""Rewards: ranking metrics; for ReRec the boxed answer, its alignment with the truth, and LightGCN.

A ranking is given as the relevance of *all* its candidates, the best-ranked first:

    DCG@k = sum_{r<=k} (2^y_r - 1) / log2(r + 1)        NDCG@k = DCG@k / DCG@k of the ideal order

R2Rank is trained on `discounted_gains`: another utility is a change of that function. QAS and PAS are from
ReRec (arXiv 2604.07851). LightGCN is He et al. 2020 (arXiv 2002.02126), trained with BPR.
"""

import hashlib
import math
import re
import unicodedata
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from data import InputError, attribute_pairs, title_key

CUTOFF = 10  # k of the NDCG that is trained on

def ndcg_at_k(ranked_relevance, k):
    """NDCG@k in [0, 1] with gain 2^y - 1 and discount 1/log2(rank + 1); 0 when nothing is relevant."""
    def dcg(relevance):
        return sum((2.0 ** float(y) - 1.0) / math.log2(r + 2) for r, y in enumerate(relevance[:k]))

    ideal = dcg(sorted(ranked_relevance, reverse=True))
    return dcg(ranked_relevance) / ideal if ideal > 0 else 0.0

def hit_at_k(ranked_relevance, k):
    """1.0 when one of the first k is relevant, else 0.0."""
    return float(any(y > 0 for y in ranked_relevance[:k]))

def reciprocal_rank(ranked_relevance):
    """1 / rank of the first relevant candidate; 0.0 when there is none."""
    return next((1.0 / r for r, y in enumerate(ranked_relevance, 1) if y > 0), 0.0)

def discounted_gains(relevance, k):
    """gains 2^y - 1 (K,), discounts 1/log2(rank + 1) (k,), and the ideal DCG@k (scalar), as tensors."""
    gains = torch.exp2(relevance) - 1
    discounts = 1 / torch.log2(torch.arange(2, k + 2, dtype=gains.dtype, device=gains.device))
    return gains, discounts, (gains.sort(descending=True).values[:k] * discounts).sum()


# --- ReRec: the answer and its alignment ----------------------------------------------------------------

def shown_title(item):
    """The title as prompts show it: one line without braces or `\\boxed`, so that it cannot be an answer."""
    title = " ".join(re.sub(r"\\+boxed", "boxed", item.title).split())
    return title.replace("{", "(").replace("}", ")")

def normalise(title):
    """A title without case, compatibility forms, surrounding quotes and runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", title).casefold().split()).strip("\"'“”‘’` ")

def unwrap(text):
    """What a model put into a box, without LaTeX commands and escapes, and without Markdown's stars."""
    text = re.sub(r"\\(?:text\w*|math\w*|emph)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\\([&%#_$])", r"\1", text).strip().strip("*").strip()

def find_box(text):
    """(start, end) of the first `\\boxed{...}` that closes and holds something, or None.

    One pass with a stack: time is linear in the text, however many boxes never close.
    """
    stack, boxes = [], []
    for match in re.finditer(r"\\boxed\{|[{}]", text):
        if match.group() != "}":
            stack.append(match.start() if len(match.group()) > 1 else None)
        elif stack:
            start = stack.pop()
            if start is not None and unwrap(text[start + 7:min(match.start(), start + 1007)]):
                boxes.append((start, match.end()))
    return min(boxes, default=None)

def parse_boxed(text):
    """What the first `\\boxed{...}` with something in it holds, or None where there is none."""
    box = find_box(text)
    return text[box[0] + 7:box[1] - 1].strip() if box else None

def parse_answers(boxed, candidates):
    """The candidates that a box names, in order: [Item or None]; None is a title that no candidate has.

    Titles are separated by `;` and may contain it: of the stretches that start at a title, the longest that
    some candidate is called counts. A title without its year is the candidate's if no other has that name. A
    candidate named again is left out. No box: [].
    """
    by_key = {title_key(unwrap(shown_title(c))): c for c in reversed(candidates)}  # (name, year or "")
    by_key = {key: c for key, c in by_key.items() if key[0]}  # no name: never a match

    def find(words):
        key = title_key(unwrap(words))
        named = [c for (name, _), c in by_key.items() if name == key[0]]
        return by_key.get(key) or (named[0] if len(named) == 1 and not key[1] else None)

    pieces, found, seen, start = (boxed or "").split(";"), [], set(), 0
    longest = 1 + max((c.title.count(";") for c in candidates), default=0)  # pieces in a title
    while start < len(pieces):
        ends = range(min(len(pieces), start + longest), start, -1)
        matches = ((end, find(";".join(pieces[start:end]))) for end in ends)
        end, item = next((match for match in matches if match[1]), (start + 1, None))
        if item and item.id not in seen or not item and pieces[start].strip():
            found.append(item)
            seen.add(item and item.id)
        start = end
    return found

def attribute_graph(items):
    """N(item): item id -> its neighbours on the item-attribute graph, (attribute, value) pairs."""
    return {item.id: frozenset(attribute_pairs(item)) for item in items}

def query_alignment(predicted, truths, graph):
    """QAS(p, t) = |N(p) & N(t)| / |N(t)| in [0, 1]; of several truths N(t) is what all have.

    predicted: an id or None. 0 for what is not in the graph, and where the truths share nothing.
    """
    if predicted not in graph or not truths or any(t not in graph for t in truths):
        return 0.0
    wanted = frozenset.intersection(*(graph[t] for t in truths))
    return len(graph[predicted] & wanted) / len(wanted) if wanted else 0.0

def preference_alignment(predicted, truths, embeddings):
    """PAS(p, t) = cosine of LightGCN embeddings, id -> (D,); of several truths the largest (ours).

    0 where the prediction, or every truth, has none.
    """
    known = [embeddings[t] for t in truths if t in embeddings]
    if predicted not in embeddings or not known:
        return 0.0
    return torch.cosine_similarity(embeddings[predicted][None], torch.stack(known), dim=-1).max().item()


# --- LightGCN ---------------------------------------------------------------------------------------------

class LightGCN(nn.Module):
    """Embeddings = mean over l = 0..L of A_hat^l E0, with A_hat = D^-1/2 A D^-1/2 over users and items.

    pairs: (E, 2) long, (user, item), each once however often it is given. Who is in none keeps E0 / (L + 1).
    A score is users[u] @ items[i].
    """

    def __init__(self, num_users, num_items, pairs, dim=64, layers=3, generator=None):
        super().__init__()
        self.num_users, self.layers, size = num_users, layers, num_users + num_items
        self.embedding = nn.Parameter(0.1 * torch.randn(size, dim, generator=generator))
        edges = torch.unique(pairs, dim=0).T + torch.tensor([[0], [num_users]])  # items come after users
        edges = torch.cat([edges, edges.flip(0)], 1)  # (2, 2E): both directions, so no degree in it is 0
        weights = torch.bincount(edges[0])[edges].prod(0).float().rsqrt()
        graph = torch.sparse_coo_tensor(edges, weights, (size, size), check_invariants=True).coalesce()
        self.register_buffer("graph", graph, persistent=False)

    def propagate(self):
        """-> users (U, D), items (I, D)."""
        layer = total = self.embedding
        for _ in range(self.layers):
            layer = torch.sparse.mm(self.graph, layer)
            total = total + layer
        total = total / (self.layers + 1)
        return total[:self.num_users], total[self.num_users:]

def fit_lightgcn(num_users, num_items, pairs, dim=64, layers=3, epochs=100, lr=0.01, l2=1e-4,
                 batch_size=8192, seed=0, stop=None):
    """Train a LightGCN with BPR on pairs (E, 2); returns it in eval mode. Raises InputError.

    stop: (model, epoch) -> whether to end, asked after each epoch. A seed gives one model.
    """
    generator = torch.Generator().manual_seed(seed)
    model = LightGCN(num_users, num_items, pairs, dim, layers, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    keys = torch.unique(pairs[:, 0] * num_items + pairs[:, 1])  # a number a pair, sorted
    trainable = keys[(torch.bincount(keys // num_items) < num_items)[keys // num_items]]
    if not len(trainable):  # who has every item has no negative
        raise InputError("LightGCN needs at least one user with some, but not all, of the items")
    for epoch in tqdm(range(1, epochs + 1), desc="LightGCN", unit="epoch", leave=False):
        shuffled = trainable[torch.randperm(len(trainable), generator=generator)]
        user, item = shuffled // num_items, shuffled % num_items
        negative, todo = torch.empty_like(item), torch.arange(len(item))
        while len(todo):  # drawn again until the user does not have it
            negative[todo] = torch.randint(num_items, todo.shape, generator=generator)
            key = user[todo] * num_items + negative[todo]
            todo = todo[keys[torch.searchsorted(keys, key).clamp(max=len(keys) - 1)] == key]
        for batch in torch.stack([user, item + num_users, negative + num_users]).split(batch_size, 1):
            # embedding(), unlike indexing, adds its gradient up in one order: same seed, same model.
            u, i, j = nn.functional.embedding(batch, torch.cat(model.propagate()))  # (B, D) each
            bpr = nn.functional.softplus((u * (j - i)).sum(1)).mean()  # -log sigmoid(u i - u j)
            norm = nn.functional.embedding(batch, model.embedding).square().sum() / batch.shape[1]
            optimizer.zero_grad()
            (bpr + l2 / 2 * norm).backward()
            optimizer.step()
        if stop and stop(model, epoch):
            break
    return model.eval()

def item_embeddings(dataset, cache_dir, dim=64, layers=3, seed=0):
    """LightGCN's embeddings of the items of the training period: item id -> (D,); kept in cache_dir.

    About 1,000 steps, where Beauty's validation metrics stop rising.
    """
    items, training = {item: n for n, item in enumerate(dataset.items)}, dataset.training()
    pairs = sorted({(u, items[i]) for u, ids in enumerate(training.values()) for i in ids})
    if not pairs:
        return {}
    epochs = max(1, round(1000 / math.ceil(len(pairs) / 8192)))
    key = hashlib.sha256(repr((list(items), pairs, dim, layers, epochs, seed)).encode()).hexdigest()
    path = Path(cache_dir).expanduser() / f"lightgcn-{key[:16]}.safetensors"
    try:
        vectors = load_file(path)["items"]
    except (OSError, SafetensorError, KeyError):  # not there yet, or broken off while it was written
        model = fit_lightgcn(len(training), len(items), torch.tensor(pairs), dim, layers, epochs, seed=seed)
        vectors = model.propagate()[1].detach().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"items": vectors}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return {item: vectors[items[item]] for item in dataset.popularity()}
