"""--facts: their numbers by brute force, that no target stands in its own evidence, and the command line."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch

import data
import eval as evaluation
import policy
import r2r
import train
from data import InputError
from test_train import SMALL, run


@pytest.fixture(scope="module", params=["leave-one-out", "temporal"])
def shop(request):
    """30 users, 40 items whose titles share words; some buy an item twice."""
    rng = random.Random(1)
    items = {f"i{n}": data.make_item(f"i{n}", " ".join(rng.choices("red blue green nail lip gloss care set".split(), k=4)),
                                     {"brand": [f"B{n % 6}"], "categories": ["All", f"K{n % 5}"] if n % 3 else []}) for n in range(40)}
    sequences = {f"u{u}": [data.Interaction(f"i{min(rng.choices(range(40), k=2))}", float(t)) for t in sorted(rng.sample(range(100), 8))] for u in range(30)}
    splits, length = (data.split_temporal if request.param == "temporal" else data.split_leave_one_out)(sequences)
    dataset = data.Dataset("shop", items, sequences, splits, length)
    dataset.facts = data.Facts(dataset)
    return dataset


def brute_force(dataset, user, history, candidate):
    """(together, title, popularity) from sets of users and dense vectors, without the user."""
    had = {u: {x.item_id for x in s[:dataset.train_length[u]]} for u, s in dataset.sequences.items() if u != user}
    n = lambda *ids: sum(set(ids) <= s for s in had.values())
    titles = {i: re.findall(r"\w+", x.title.lower()) for i, x in dataset.items.items()}
    vocabulary = sorted({w for t in titles.values() for w in t})
    df = [sum(w in t for t in titles.values()) for w in vocabulary]

    def vector(i):
        v = [(1 + math.log(titles[i].count(w))) * math.log(len(titles) / d) if w in titles[i] else 0.0 for w, d in zip(vocabulary, df)]
        norm = math.sqrt(sum(x * x for x in v))
        return [x / norm for x in v]

    weights = [0.8**age for age in range(len(history))][::-1]
    together = sum(w * n(h.id, candidate.id) / math.sqrt(n(h.id) * n(candidate.id)) for w, h in zip(weights, history) if n(h.id, candidate.id))
    title = sum(w * sum(x * y for x, y in zip(vector(h.id), vector(candidate.id))) for w, h in zip(weights, history))
    return together, title, n(candidate.id)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_facts_by_brute_force(shop, split):
    facts = shop.facts
    for e in shop.examples(split, 25, 8):
        for c, row in zip(e.candidates, facts.measure(e.user, e.history, e.candidates)):
            expected = brute_force(shop, e.user, e.history, c)
            assert row == pytest.approx(expected, abs=1e-9)
            for name, x, borders in zip(("together", "title", "popularity"), row, facts.borders):
                assert c.facts[name] == (1 + sum(b <= x for b in borders) if x else 0)
            for name in ("brand", "categories"):
                assert c.facts[name] == sum(bool(set(c.attributes.get(name, ())) & set(h.attributes.get(name, ()))) for h in e.history)


def test_counts_stop_at_nine(shop):
    """A level is a digit: `tiny` has a token for no other, and a scorecard points."""
    same = [x for x in shop.items.values() if x.attributes["brand"] == ("B1",)]
    for n in (8, 9, 10, 12):
        [told] = shop.facts.beside(None, (same * 3)[:n], same[:1])
        assert told.facts["brand"] == min(9, n)


def smooth_by_brute_force(dataset, user, history, candidate):
    """(together, brand, categories) of --smooth-facts, from a dense matrix and lists of pairs, without the user."""
    had = [{x.item_id for x in s[:dataset.train_length[u]]} for u, s in dataset.sequences.items() if u != user]
    ids = list(dataset.items)
    B = torch.tensor([[float(i in s) for i in ids] for s in had], dtype=torch.float64)
    B = B / B.sum(1, keepdim=True).clamp(min=1).sqrt() / B.sum(0).clamp(min=1).sqrt()
    weights = [0.8**age for age in range(len(history))][::-1]
    w = torch.zeros(len(ids), dtype=torch.float64)
    for x, h in zip(weights, history):
        w[ids.index(h.id)] += x
    told = [(w @ B.T @ B @ B.T @ B)[ids.index(candidate.id)].item()]
    for name in ("brand", "categories"):
        of = lambda i: dataset.items[i].attributes.get(name, (None,))[-1] if dataset.items[i].attributes.get(name) else None
        pairs = [(of(i), of(j)) for s in had for i in s for j in s if i != j and of(i) and of(j)]
        b, total = of(candidate.id), 0.0
        for x, h in zip(weights, history):
            if b and (a := of(h.id)) and (n := pairs.count((a, b))):
                share = sum(q == b for _, q in pairs) / len(pairs)
                total += x * math.sqrt(n / (sum(p == a for p, _ in pairs) + 20) / share)
        told.append(total)
    return told


@pytest.fixture(scope="module")
def smooth(shop):
    return replace(shop, facts=data.Facts(shop, smooth=True))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_smooth_facts_by_brute_force(shop, smooth, split):
    told = set()
    for plain, e in zip(shop.examples(split, 10, 8), smooth.examples(split, 10, 8)):
        for before, c, row in zip(plain.candidates, e.candidates, smooth.facts.measure(e.user, e.history, e.candidates)):
            together, *attributes = smooth_by_brute_force(shop, e.user, e.history, c)
            assert row == pytest.approx((together, *brute_force(shop, e.user, e.history, c)[1:], *attributes), abs=1e-9)
            assert list(c.facts) == list(before.facts) and c.facts["title"] == before.facts["title"]
            assert list(c.facts.values()) == [1 + sum(b <= x for b in borders) if x else 0 for x, borders in zip(row, smooth.facts.borders)]
            told |= set(c.facts.items())
    assert {name for name, level in told if level > 4} == set(smooth.facts.names)


def test_levels_are_used_evenly(shop):
    """Over positives and as many negatives, what is above zero falls into nine parts, as evenly as ties allow."""
    lists = [shop.example(t, 2) for t in shop.targets("train")]
    levels = [c.facts["title"] for e in lists for c in e.candidates if c.facts["title"]]
    assert set(levels) == set(range(1, 10)) and max(map(levels.count, range(1, 10))) < 2 * len(levels) / 9


@pytest.mark.parametrize("kind", ["plain", "smooth"])
def test_no_interaction_of_the_user_counts(shop, kind):
    """The facts of a user's lists are those of a data set in which he was never there; so no target knows itself."""
    facts = data.Facts(shop, smooth=kind == "smooth")
    for user in list(shop.sequences)[:10]:
        without = replace(shop, train_length=shop.train_length | {user: 0}, facts=None)
        stranger = data.Facts(without, smooth=kind == "smooth")
        for target in [t for split in shop.splits.values() for t in split if t[0] == user]:
            e = shop.example(target, 8)
            assert facts.measure(user, e.history, e.candidates) == stranger.measure(user, e.history, e.candidates)


@pytest.mark.parametrize("kind", ["plain", "smooth"])
def test_nothing_after_the_training_period_counts(shop, kind):
    cut = replace(shop, sequences={u: s[:shop.train_length[u]] for u, s in shop.sequences.items()}, facts=None)
    facts, blind = (data.Facts(d, smooth=kind == "smooth") for d in (shop, cut))
    for e in shop.examples("test", 20, 8):
        assert facts.measure(e.user, e.history, e.candidates) == blind.measure(e.user, e.history, e.candidates)


@pytest.mark.parametrize("kind", ["plain", "smooth"])
def test_facts_do_not_depend_on_the_other_candidates(shop, kind):
    facts = data.Facts(shop, smooth=kind == "smooth")
    for e in shop.examples("test", 10, 8):
        whole = [c.facts for c in facts.beside(e.user, e.history, e.candidates)]
        assert [c.facts for c in facts.beside(e.user, e.history, e.candidates[::-1])] == whole[::-1]
        assert [facts.beside(e.user, e.history, [c])[0].facts for c in e.candidates] == whole


def test_the_linear_baseline_is_the_regression(shop):
    """Its scores, but for a constant a list, are those of Newton's method on dense one-hot rows; it never looks at relevance."""
    examples, lists = shop.examples("test", 10, 8), shop.examples("train", 60, 8)
    dense = lambda e: torch.tensor([[float(level == n) for level in c.facts.values() for n in range(10)] for c in e.candidates]).double()
    rows, positive = torch.stack([dense(e) for e in lists]), torch.tensor([e.relevance.index(1.0) for e in lists])
    w = torch.zeros(rows.shape[-1], dtype=torch.float64)
    for _ in range(20):
        p = (rows @ w).softmax(-1)
        mean = torch.einsum("nk,nkf->nf", p, rows)
        gradient = (mean - rows[range(len(lists)), positive]).mean(0) + 2e-2 * w
        hessian = (torch.einsum("nk,nkf,nkg->fg", p, rows, rows) - mean.T @ mean) / len(lists) + 2e-2 * torch.eye(len(w))
        w = w - torch.linalg.solve(hessian, gradient)
    assert gradient.abs().max() < 1e-10
    scores = evaluation.facts_linear(shop, [replace(e, relevance=None) for e in examples], num_lists=60, decay=1e-2)
    for e, s in zip(examples, scores):
        s, expected = torch.tensor(s).double(), dense(e) @ w
        assert torch.allclose(s - s.mean(), expected - expected.mean(), atol=1e-4) and len(set(s.tolist())) > 1


def test_prompts_and_traces_state_them(shop):
    model, tokenizer = policy.load("tiny", texts=shop.texts() + [r2r.SYSTEM])
    policy.add_words(model, tokenizer, [f" [{name} {n}]" for name in shop.facts.names for n in range(10)])
    e = shop.examples("test", 1, 4)[0]
    stated = [data.facts_text(c) for c in e.candidates]
    assert stated[0] == "".join(f" [{name} {n}]" for name, n in e.candidates[0].facts.items()) and stated[0].startswith(" [together ")
    beside = r2r.build_prompt(tokenizer, e.history, e.candidates)
    only = r2r.build_prompt(tokenizer, e.history, [replace(c, only_facts=True) for c in e.candidates])
    for c, text, long, short in zip(e.candidates, stated, beside.suffix_ids, only.suffix_ids):
        assert f"\nCandidate: {c.title}" in tokenizer.decode(long) and f"{text}<|im_end|>" in tokenizer.decode(long)
        assert f"\nCandidate:{text}<|im_end|>" in tokenizer.decode(short)
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(shop.facts.names)  # a token each
        assert text in r2r.template_trace(e.history, c)[0]
    assert e.history[0].title in tokenizer.decode(beside.prefix_ids) and e.history[0].title not in tokenizer.decode(only.prefix_ids)


@pytest.mark.parametrize("kind", ["plain", "smooth"])
def test_scorecard_by_brute_force(shop, kind):
    """Points are weights of evidence, so a total from the threshold on is naive Bayes at even odds, evidence against left out."""
    shop = replace(shop, facts=data.Facts(shop, smooth=kind == "smooth"))
    nat = 1000  # next to no rounding
    card = data.fit_scorecard(shop, 40, 8, 6, nat)
    pairs = [(c.facts, y) for e in shop.examples("train", 40, 8, 6) for c, y in zip(e.candidates, e.relevance)]
    weight, usual, decided = {}, {}, 0
    for name in shop.facts.names:
        count = lambda level, labels: sum(f[name] == level for f, y in pairs if y in labels)
        for level in range(10):
            share = [(count(level, [label]) + n) / (sum(y == label for _, y in pairs) + 10 * n) for label, n in ((1, 1), (0, 7))]
            weight[name, level] = math.log(share[0] / share[1])
        usual[name] = weight[name, max(range(10), key=lambda level: count(level, (0, 1)))]
        assert card.points[name] == pytest.approx([nat * max(0.0, weight[name, level] - usual[name]) for level in range(10)], abs=0.51)
    for e in shop.examples("test", 20, 8, 6):
        for c in e.candidates:
            log_odds = sum(max(weight[fact], usual[fact[0]]) for fact in c.facts.items())
            trace, yes = r2r.tally_trace(c, card)
            assert r2r.parse_answer(trace) == yes and r2r.tally_trace(c, card, reasoning=False) == (trace.splitlines()[-1], yes)
            known, total = [(name, level) for name, level in c.facts.items() if card.points[name][level]], 0
            for (name, level), (fact, a, b, c_) in zip(known, re.findall(r" (\[.*?\]) (\d+)\+(\d+)=(\d+)", trace), strict=True):
                assert fact == f"[{name} {level}]" and (int(a), int(b), int(c_)) == (total, card.points[name][level], total + card.points[name][level])
                total = int(c_)
            if abs(log_odds) > 0.01:
                decided += 1
                assert yes == (log_odds > 0)
    assert decided > 100
    assert data.fit_scorecard(shop, 40, 8, 6, nat) == card


def test_lists_and_traces_from_files_have_them(shop, tmp_path):
    examples = shop.examples("test", 3, 8)
    data.save_lists(tmp_path / "lists.jsonl", examples)
    read = [shop.with_facts(e) for e in data.read_lists(tmp_path / "lists.jsonl", shop.items)]
    assert [[c.facts for c in e.candidates] for e in read] == [[c.facts for c in e.candidates] for e in examples]
    e = shop.examples("train", 1, 8)[0]
    line = {"user": e.user, "history": [h.id for h in e.history], "trace": "<answer>{}</answer>"}
    lines = [line | {"candidate": c.id, "label": int(y), "trace": f"<answer>{'yes' if y else 'no'}</answer>"} for c, y in zip(e.candidates, e.relevance)]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    lessons = train.recorded_lessons(shop, path, random.Random(0))
    expected = {c.id: c.facts for c in e.candidates}
    for _ in range(3):
        _, (candidate,), _ = next(lessons)
        assert candidate.facts == expected[candidate.id]
    path.write_text(json.dumps({k: v for k, v in lines[0].items() if k != "user"}) + "\n")
    with pytest.raises(InputError, match="user"):
        train.recorded_lessons(shop, path, random.Random(0))


def test_a_run_with_facts_and_its_evaluation(tmp_path):
    folder = tmp_path / "r"
    run("train.py", *SMALL, "--facts", "--out", folder)
    assert json.loads((folder / "config.json").read_text())["flags"]["facts"] == "only"
    before = json.loads((folder / "eval.json").read_text())["systems"]["rl"]
    for again in ([], ["--facts"]):  # given again without a value: the run's, not what a model that is no `tiny` would have
        out = run("eval.py", "--run", folder, "--explain", 1, *again).stdout
        assert json.loads((folder / "eval.json").read_text())["systems"]["rl"] == before and "[together " in out
    result = (folder / "result.json").read_text()
    run("eval.py", "--run", folder, "--facts", "beside")  # other prompts than the run's: not its result
    assert (folder / "result.json").read_text() == result
    assert "--method rerec" in run("train.py", "--method", "rerec", "--facts", code=2).stderr
    assert "add --facts" in run("train.py", "--teacher", "tally", code=2).stderr and "add --facts" in run("eval.py", "--smooth-facts", code=2).stderr
    assert "--method rerec" in run("train.py", "--method", "rerec", "--smooth-facts", code=2).stderr


def test_the_tally_teacher_in_a_small_catalogue():
    """Its points come from lists like the run's, which 20 candidates would not be."""
    rng = random.Random(0)
    items = {f"i{n}": data.make_item(f"i{n}", f"Thing {n}", {"brand": [f"B{n % 2}"]}) for n in range(15)}
    sequences = {f"u{u}": [data.Interaction(f"i{2 * i + u % 2}", float(t)) for t, i in enumerate(rng.sample(range(7), 6))] for u in range(40)}  # a brand each
    dataset = data.Dataset("x", items, sequences, *data.split_leave_one_out(sequences))
    dataset.facts = data.Facts(dataset)
    args = type("Args", (), {"seed": 0, "num_candidates": 5, "history_length": 10, "no_reasoning": False, "teacher": "tally"})
    history, candidates, traces = next(train.template_lessons(dataset, args, random.Random(0)))
    assert len(traces) == len(candidates) == 3 and all("Tally: [" in t for t in traces if "yes" in t) and any("yes" in t for t in traces)


def test_a_run_with_the_tally_teacher(tmp_path):
    """Its lessons are tallies: a model that starts from nothing writes one after a few steps' cold start."""
    folder = tmp_path / "r"
    run("train.py", *SMALL, "--facts", "--smooth-facts", "--teacher", "tally", "--sft-steps", 60, "--sft-lr", "3e-3", "--out", folder)
    assert json.loads((folder / "config.json").read_text())["flags"]["teacher"] == "tally"
    before = json.loads((folder / "eval.json").read_text())["systems"]["rl"]
    out = run("eval.py", "--run", folder, "--explain", 1).stdout
    assert "Tally: [" in out and json.loads((folder / "eval.json").read_text())["systems"]["rl"] == before


def test_facts_asked_for_again_on_resume(tmp_path, monkeypatch):
    """`--facts` without a value means what the run has; a run without facts gets none on the way."""
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(tmp_path), "--facts"])
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"facts": "only"}, "versions": {}}))
    assert train.parse_flags().facts == "only"
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"facts": None}, "versions": {}}))
    with pytest.raises(InputError, match="--facts None -> auto"):
        train.parse_flags()
