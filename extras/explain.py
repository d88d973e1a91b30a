"""Lists and requests as a person wants to see them (`eval.py --explain N`)."""

import sys
import textwrap

from data import describe
from eval import ranking

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
