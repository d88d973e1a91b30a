"""Recommendations for a user, or an answer to a typed request (`eval.py --recommend`, `--ask`).

The model cannot read a whole catalogue, so a baseline retrieves and the model ranks what was retrieved. The
baseline is fitted on the training period once; what it retrieves for every user is kept in the run directory.
"""

import json
import re
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import r2r
import rerec
from data import InputError, Query, attribute_pairs
from extras.explain import show, show_text

def retrieve(dataset, name, count, folder=None, seed=0):
    """{user: ids of the `count` items that a baseline ranks highest, without those that the user has}."""
    path = Path(folder or ".") / f"retrieved-{name}-{count}.pt"
    kept = torch.load(path, weights_only=True) if folder and path.exists() else {}
    if kept.keys() == dataset.sequences.keys():
        return kept
    from extras.baselines import fit_baselines, score_rows
    if count > len(dataset.items):
        raise InputError(f"--retrieve {count}: {dataset.name} has only {len(dataset.items)} items")
    ranker = fit_baselines(dataset, [name], seed)[name]
    index = {item: n for n, item in enumerate(dataset.item_ids)}
    histories = [[index[x.item_id] for x in s] for s in dataset.sequences.values()]
    found = {}
    rows = score_rows(ranker, list(dataset.sequences), histories)
    for row, user, history in zip(tqdm(rows, "retrieve", len(histories)), dataset.sequences, histories):
        row[history] = -torch.inf
        left = min(count, len(index) - len(set(history)))
        found[user] = [dataset.item_ids[n] for n in row.topk(left).indices.tolist()]
    if folder:
        torch.save(found, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return found

def users_done(path):
    """The users of a file of recommendations; a last line that was broken off is taken away."""
    if not path.exists():
        return set()
    *lines, rest = path.read_text(encoding="utf-8").split("\n")  # a rationale may hold other ends of lines
    try:
        users = {json.loads(line)["user"] for line in lines}
        if not '{"user": '.startswith(rest[:9]):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise InputError(f"--json {path}: it holds something else than recommendations") from None
    if rest:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return users

def recommend_users(dataset, args, model, tokenizer, head):
    """Print, or write to --json, the best --top items of each user; `all`: those of the test split."""
    users = list(dict.fromkeys(user for user, _ in dataset.targets("test", args.seed)))
    users = users if args.recommend == ["all"] else args.recommend
    if unknown := [user for user in users if not dataset.sequences.get(user)]:
        raise InputError(f"--recommend {unknown[0]}: no such user in {dataset.name}, or one without history")
    retrieved = retrieve(dataset, args.retriever, args.retrieve, args.run, args.seed)
    path = Path(args.json) if args.json else None
    done = users_done(path) if path else set()
    for user in tqdm([user for user in users if user not in done], desc="recommend", disable=path is None):
        settings = {"num_samples": args.eval_samples, "max_new_tokens": args.max_new_tokens,
                    "temperature": args.temperature, "micro_batch": args.micro_batch}
        ranked = r2r.recommend(model, tokenizer, head, dataset, user, retrieved[user], args.top,
                               args.history_length, **settings)
        if path:
            items = [{"item": r.item.id, "title": r.item.title, "score": r.score, "rationale": r.rationale}
                     for r in ranked]
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"user": user, "items": items}, ensure_ascii=False) + "\n")
            continue
        show(f"\n=== user {user}")
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
