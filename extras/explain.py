"""Lists and requests as a person wants to see them (`eval.py --explain N`), and as TREC's tools do."""

import random
import re
import sys
import textwrap

from data import describe

def show(text):
    """Print what a console may not be able to."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))

def show_text(text, label):
    text = text.strip().replace("\n", " / ") or "(no rationale)"
    show(textwrap.indent(textwrap.fill(text, 100), f"{label:>17}| "))

def explain_lists(examples, results, before):
    """The history, then the candidates, best first, with score and rationale.
    results: of `model_scores`; before: the rationales before RL, of the first lists."""
    for n, (example, (scores, rationales)) in enumerate(zip(examples, results), start=1):
        show(f"\n=== list {n}, user {example.user}\nhistory, oldest first")
        for item in example.history:
            show(f"    {describe(item)}")
        show("ranking (* = what the user chose)")
        for rank, i in enumerate(ranking(scores), start=1):
            mark = "*" if example.relevance[i] > 0 else " "
            show(f" {mark}{rank:3d}. {scores[i]:+8.3f}  {describe(example.candidates[i])}")
            if n <= len(before):
                show_text(before[n - 1][i], "before")
            show_text(rationales[i][0], "after" if n <= len(before) else "")

def explain_requests(queries, answers, before):
    """The request and its candidates, then the response, after that before RL. answers: of `RequestTest`."""
    for n, (query, (text, judged, _)) in enumerate(zip(queries, answers), start=1):
        show(f"\n=== request {n} ({query.kind}): {query.text}")
        for c in query.candidates:
            show(f" {'*' if c.id in query.truths else ' '} {describe(c)}")
        if n <= len(before):
            show(textwrap.indent(before[n - 1][0].strip() or "(no answer)", "   before | "))
        show(textwrap.indent(text.strip() or "(no answer)", "   | "))
        show(f"   {'right' if judged.correct else 'wrong'}")

def query_table(systems):
    """Accuracy by kind and by number of conditions, a column a system; then NDCG@10, format and length."""
    first, columns = next(iter(systems.values())), list(systems.values())
    lines = [f"{'accuracy (top-1)':<18} {'requests':>8}" + "".join(f" {name:>9}" for name in systems)]

    def line(label, cells, metric="accuracy", digits=3):
        lines.append(f"{label:<18} {cells[0]['num_queries']:8d}"
                     + "".join(f" {c[metric]['mean']:9.{digits}f}" for c in cells))

    for group, unit in (("by_kind", ""), ("by_conditions", " conditions")):
        for value in first[group]:
            line(f"{value}{unit}", [s[group][value] for s in columns])
    line("all", columns)
    lines.append(f"{'  95% interval':<27}"
                 + "".join(f" {s['accuracy']['low']:.2f}-{s['accuracy']['high']:.2f}" for s in columns))
    line("NDCG@10", columns, "ndcg@10")
    line("format rate", columns, "format_rate")
    line("tokens", columns, "length", 1)
    return "\n".join(lines)

def ranking(scores, seed=0):
    """Indices by descending score; ties in a random order that follows from the seed."""
    jitter = random.Random(seed)
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), jitter.random()))

def save_predictions(path, examples, scores):
    """Ranked lists in TREC format, `query Q0 item rank score system` a line; judgements in PATH.qrels.

    scores: {system: [(K,) ...]}. A query is LINE/USER: its line in the file of --save-candidates, and the
    user. White space in names becomes %20 and the like, `%` becomes %25: two names never meet.
    """
    def name(text):
        return re.sub(r"[\s%]", lambda m: f"%{ord(m[0]):02X}", str(text)) or "%"

    queries = [f"{n}/{name(e.user)}" for n, e in enumerate(examples, start=1)]
    with open(path, "w", encoding="utf-8") as f:
        for system, lists in scores.items():
            for n, (query, e, s) in enumerate(zip(queries, examples, lists)):
                for rank, i in enumerate(ranking(s, n), start=1):
                    f.write(f"{query} Q0 {name(e.candidates[i].id)} {rank} {float(s[i])!r} {name(system)}\n")
    with open(f"{path}.qrels", "w", encoding="utf-8") as f:
        for query, e in zip(queries, examples):
            f.writelines(f"{query} 0 {name(c.id)} {y:g}\n" for c, y in zip(e.candidates, e.relevance))
