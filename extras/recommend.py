"""Recommendations for a user, or an answer to a typed request (`eval.py --recommend`, `--ask`).

The model cannot read a whole catalogue, so a baseline retrieves and the model ranks what was retrieved.
"""

import re
from collections import Counter

import torch

import r2r
import rerec
from data import InputError, Query, attribute_pairs
from extras.explain import show, show_text

def retrieve(dataset, users, name, count, seed=0):
    """Yields, for each user, the ids of the `count` items new to the user that a baseline ranks highest."""
    from extras.baselines import fit_baselines, score_rows
    if count > len(dataset.items):
        raise InputError(f"--retrieve {count}: {dataset.name} has only {len(dataset.items)} items")
    ranker = fit_baselines(dataset, [name], seed)[name]
    index = {item: n for n, item in enumerate(dataset.item_ids)}
    histories = [[index[x.item_id] for x in dataset.sequences[user]] for user in users]
    for row, history in zip(score_rows(ranker, users, histories), histories):
        row[history] = -torch.inf
        left = min(count, len(index) - len(set(history)))
        yield [dataset.item_ids[n] for n in row.topk(left).indices.tolist()]

def recommend_users(dataset, args, model, tokenizer, head):
    """Print the best --top items of each user; `all`: those of the test split."""
    users = list(dict.fromkeys(user for user, _ in dataset.targets("test", args.seed)))
    users = users if args.recommend == ["all"] else args.recommend
    if unknown := [user for user in users if not dataset.sequences.get(user)]:
        raise InputError(f"--recommend {unknown[0]}: no such user in {dataset.name}, or one without history")
    settings = {"num_samples": args.eval_samples, "max_new_tokens": args.max_new_tokens,
                "temperature": args.temperature, "micro_batch": args.micro_batch}
    for user, ids in zip(users, retrieve(dataset, users, args.retriever, args.retrieve, args.seed)):
        show(f"\n=== user {user}")
        ranked = r2r.recommend(model, tokenizer, head, dataset, user, ids, args.top, args.history_length,
                               **settings)
        for place, r in enumerate(ranked, start=1):
            show(f" {place:4d}. {r.score:+8.3f}  {r.item.title}")
            show_text(r.rationale, "")

def ask(dataset, args, model, tokenizer):
    """Answer a request that somebody typed, from the items whose titles and attributes share most with it."""
    words = {i: set(re.findall(r"\w+", " ".join([x.title, *(v for _, v in attribute_pairs(x))]).lower()))
             for i, x in dataset.items.items()}
    number = Counter(word for every in words.values() for word in every)
    asked = set(re.findall(r"\w+", args.ask.lower()))
    score = {i: sum(1 / number[word] for word in asked & every) for i, every in words.items()}
    best = sorted(score, key=score.get, reverse=True)[:args.num_candidates]
    query = Query("asked", args.ask, "explicit", 0, [dataset.items[i] for i in best], ())
    (text, judged, _), = rerec.answer(model, tokenizer, [query], args)
    show("candidates: " + "; ".join(item.title for item in query.candidates))
    show(f"\n{text.strip()}\n\nanswer: {judged.title or '(none)'}")
