"""Metrics, baselines and reports: against brute force, dense algebra and independent re-scoring."""

import contextlib
import itertools
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import data
import eval as evaluation
import policy
from data import Example, InputError, Interaction, Item
from eval import expected_metrics, list_metrics
from test_train import run


def brute_force(scores, relevance):
    """Metrics averaged over every order that sorts the scores, written from the definitions."""
    orders = [p for p in itertools.permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in zip(p, p[1:]))]
    total = Counter()
    for p in orders:
        ranked = [relevance[i] for i in p]
        for k in (1, 5, 10, 20):
            dcg = lambda ys: sum((2**y - 1) / math.log2(r + 2) for r, y in enumerate(ys[:k]))
            total[f"ndcg@{k}"] += dcg(ranked) / dcg(sorted(ranked, reverse=True))
            total[f"hr@{k}"] += any(y > 0 for y in ranked[:k])
        first = next(r for r, y in enumerate(ranked, start=1) if y > 0)
        total["mrr"] += 1 / first
        total["rank"] += first
    return {m: v / len(orders) for m, v in total.items()}


@pytest.mark.parametrize("seed", range(25))
def test_ties_count_as_the_mean_over_all_their_orders(seed):
    rng = random.Random(seed)
    k = rng.randint(2, 7)
    scores = [rng.choice((0.0, 0.5, 1.0, -2.0)) for _ in range(k)]
    relevance = [rng.choice((0, 0, 1, 2, 0.5)) for _ in range(k - 1)] + [1]
    found, expected = list_metrics(scores, relevance), brute_force(scores, relevance)
    assert set(found) == set(expected) == set(evaluation.METRICS)
    assert all(found[m] == pytest.approx(expected[m], abs=1e-12) for m in expected)


def test_one_positive_among_many_ties():
    found = expected_metrics([(3, []), (1000, [1.0]), (50, [])])
    assert found["mrr"] == pytest.approx(sum(1 / r for r in range(4, 1004)) / 1000)
    assert found["hr@10"] == pytest.approx(7 / 1000) and found["hr@1"] == 0 and found["rank"] == 3 + 1001 / 2
    assert found["ndcg@5"] == pytest.approx((1 / math.log2(5) + 1 / math.log2(6)) / 1000)


def test_a_score_that_is_not_a_number_is_no_score():
    with pytest.raises(ValueError, match="not a number"):
        list_metrics([0.1, float("nan")], [1, 0])
    with pytest.raises(ValueError):
        list_metrics([0.1], [1, 0])
    assert list_metrics([float("inf"), -float("inf")], [1, 0])["mrr"] == 1.0


def test_the_bootstrap_draws_users_not_lists():
    rng = random.Random(0)
    values = [rng.random() for _ in range(60)]
    alone = evaluation.interval(values)
    assert alone == evaluation.interval(values, [f"u{n}" for n in range(60)])
    twice = evaluation.interval(values * 2, [f"u{n}" for n in range(60)] * 2)  # the same lists twice tell nothing new
    assert all(twice[k] == pytest.approx(alone[k]) for k in alone)
    naive = evaluation.interval(values * 2)
    assert naive["high"] - naive["low"] < 0.8 * (alone["high"] - alone["low"])
    error = 1.96 * torch.tensor(values).std().item() / 60**0.5  # the normal approximation
    assert alone["high"] - alone["mean"] == pytest.approx(error, rel=0.15) and alone["mean"] - alone["low"] == pytest.approx(error, rel=0.15)


def test_the_bootstrap_against_a_plain_one():
    """Users with different numbers of lists: resample users, average over all their lists."""
    rng = random.Random(1)
    lists = {u: [rng.gauss(u % 3, 1) for _ in range(rng.randint(1, 5))] for u in range(30)}
    users, values = zip(*((u, v) for u, vs in lists.items() for v in vs))
    means = sorted(sum(map(sum, drawn)) / sum(map(len, drawn)) for drawn in (rng.choices(list(lists.values()), k=30) for _ in range(4000)))
    found = evaluation.interval(values, users)
    assert found["low"] == pytest.approx(means[100], abs=0.06) and found["high"] == pytest.approx(means[3900], abs=0.06)


# --- a shop with structure -----------------------------------------------------------------------------------------------


def make_shop(num_users=60, num_items=40, seed=0, negatives="uniform", split=data.split_leave_one_out):
    rng = random.Random(seed)
    items = {f"i{n}": Item(f"i{n}", f"thing {n % 7} word{n % 5} x{n}", {"brand": (f"b{n % 4}",), "categories": ("all", f"kind {n % 5}")}) for n in range(num_items)}
    sequences = {f"u{u}": [Interaction(i, float(t)) for t, i in enumerate(rng.sample(list(items), rng.randint(3, 9)))] for u in range(num_users)}
    if split is data.split_temporal:  # users begin at different times; many ties
        sequences = {u: [x._replace(timestamp=rng.randint(0, 3) + x.timestamp + 5 * (n % 9)) for x in s] for n, (u, s) in enumerate(sequences.items())}
        sequences = {u: sorted(s, key=lambda x: x.timestamp) for u, s in sequences.items()}
    splits, train_length = split(sequences)
    return data.Dataset("shop", items, sequences, splits, train_length, negatives=negatives)


def test_title_overlap_is_the_cosine_of_tf_idf():
    shop = make_shop()
    words = [re.findall(r"\w+", i.title) for i in shop.items.values()]
    vocabulary = sorted({w for row in words for w in row})
    idf = {w: math.log(len(words) / sum(w in row for row in words)) for w in vocabulary}
    dense = torch.tensor([[idf[w] * (1 + math.log(row.count(w))) if w in row else 0.0 for w in vocabulary] for row in words])
    cosine = torch.nn.functional.cosine_similarity(dense[:, None], dense[None], dim=-1)
    histories = [[3, 5, 3], [], [39]]
    scores = evaluation.title_overlap(shop)(0.5)(["a", "b", "c"], histories)
    expected = torch.stack([0.25 * cosine[3] + 0.5 * cosine[5] + cosine[3], torch.zeros(40), cosine[39]])
    assert torch.allclose(scores, expected, atol=1e-5)


def test_item_knn_is_the_cosine_of_co_occurrence():
    shop = make_shop()
    index = {i: n for n, i in enumerate(shop.items)}
    matrix = torch.zeros(60, 40)
    for u, s in enumerate(shop.training().values()):
        matrix[u, [index[i] for i in s]] = 1
    together = matrix.T @ matrix
    cosine = (together / (together.diag()[:, None] * together.diag()).sqrt().clamp(min=1e-9)).fill_diagonal_(0)
    histories = [[3, 5, 7], [], [39]]
    scores = evaluation.item_knn(shop, index)(0.5)(["a", "b", "c"], histories)
    expected = torch.stack([0.25 * cosine[3] + 0.5 * cosine[5] + cosine[7], torch.zeros(40), cosine[39]])
    assert torch.allclose(scores, expected, atol=1e-5)


def test_full_ranking_counts_everything_but_the_past():
    shop = make_shop()
    fixed = torch.randn(40, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    targets = shop.splits["test"]
    rows = evaluation.full_ranking(shop, lambda users, histories: fixed.expand(len(users), -1), targets, batch=7)
    for (user, p), row in zip(targets, rows):
        past = {x.item_id for x in shop.sequences[user][:p]}
        left = [i for i in shop.items if i not in past]
        truth = shop.sequences[user][p].item_id
        assert row == pytest.approx(list_metrics([fixed[shop.item_ids.index(i)] for i in left], [float(i == truth) for i in left]))


def with_other_test_items(shop):
    """The same shop, its test interactions replaced by other items."""
    tested = set(shop.splits["test"])
    sequences = {u: [x._replace(item_id=next(i for i in shop.items if i not in {y.item_id for y in s})) if (u, p) in tested else x
                     for p, x in enumerate(s)] for u, s in shop.sequences.items()}
    assert sequences != shop.sequences
    return replace(shop, sequences=sequences)


@pytest.mark.parametrize("split", [data.split_leave_one_out, data.split_temporal])
def test_baselines_never_see_the_test_interactions(monkeypatch, split):
    """Fitted on a shop and on its twin that differs in every test interaction, they score alike, to the last bit."""
    for fit in ("fit_lightgcn", "fit_sasrec"):
        original = getattr(evaluation, fit)
        monkeypatch.setattr(evaluation, fit, lambda *a, original=original, **k: original(*a, **{**k, "epochs": 4}))
    shop = make_shop(split=split)
    users, histories = ["u0", "u1", "stranger", "u2"], [[1, 2, 3], [4], [5, 6], []]
    one, two = evaluation.fit_baselines(shop), evaluation.fit_baselines(with_other_test_items(shop))
    assert list(one) == [b for b in evaluation.BASELINES if b not in ("random", "facts-linear")]
    for name in one:
        scores = one[name](users, histories)
        assert scores.shape == (4, 40) and torch.equal(scores, two[name](users, histories)), name
    assert shop.popularity() == with_other_test_items(shop).popularity() and shop.training() == with_other_test_items(shop).training()


@pytest.mark.parametrize("teacher", ["template", "tally"])
@pytest.mark.parametrize("split", [data.split_leave_one_out, data.split_temporal])
def test_no_held_out_pair_reaches_a_template_trace_or_baseline(split, teacher, monkeypatch):
    """What is handed to training: prompts, traces, weights and counts hold no (user, item) pair of validation or test."""
    import train
    shop = make_shop(num_items=80, split=split)
    held_out = {(u, shop.sequences[u][p].item_id) for s in ("validation", "test") for u, p in shop.splits[s]}
    assert held_out and not held_out & {(u, i) for u, s in shop.training().items() for i in s}
    seen, original = set(), shop.example
    shop.example = lambda target, *a: (lambda e: seen.update((e.user, x.id) for x in e.history + e.candidates) or e)(original(target, *a))
    args = type("Args", (), {"seed": 0, "num_candidates": 20, "history_length": 10, "no_reasoning": False, "teacher": teacher})
    if teacher == "tally":
        shop.facts = data.Facts(shop)
    lessons = train.template_lessons(shop, args, random.Random(0))
    with contextlib.suppress(InputError):  # interactions at random carry little evidence: there are weights, but tallies may not tell candidates apart
        for _ in range(300):
            next(lessons)
    if teacher == "tally":
        monkeypatch.setattr(data, "fit_scorecard", lambda *a, **k: data.Scorecard({name: [0] * 10 for name in shop.facts.names}, 1))
        with pytest.raises(InputError, match="tally teacher tells no candidates apart"):
            next(train.template_lessons(shop, args, random.Random(0)))
    assert len({u for u, _ in seen}) > 20 and not seen & held_out


@pytest.mark.parametrize("negatives", ["popularity", "category"])
def test_harder_negatives(negatives):
    shop = make_shop(num_users=200, negatives=negatives)
    counts, drawn = shop.popularity(), Counter()
    for e in shop.examples("test", None, 5):
        positive = e.candidates[e.relevance.index(1.0)]
        others = [c for c in e.candidates if c.id != positive.id]
        assert len({c.id for c in e.candidates}) == 5 and not {c.id for c in others} & {x.item_id for x in shop.sequences[e.user]}
        drawn.update(c.id for c in others)
        if negatives == "category":
            same = [i for i in shop.items.values() if i.attributes["categories"] == positive.attributes["categories"]]
            free = len({i.id for i in same} - {x.item_id for x in shop.sequences[e.user]})
            assert sum(c in same for c in others) == min(4, free)
    if negatives == "popularity":
        by_count = sorted(counts, key=counts.get)
        assert sum(drawn[i] for i in by_count[-10:]) > 1.3 * sum(drawn[i] for i in by_count[:10])
    again = make_shop(num_users=200, negatives=negatives).examples("test", 3, 5)
    assert [c.id for e in again for c in e.candidates] == [c.id for e in shop.examples("test", 3, 5) for c in e.candidates]


def test_negatives_by_category_need_one():
    shop = make_shop()
    with pytest.raises(InputError, match="categories, category"):
        replace(shop, items={i: Item(i, x.title) for i, x in shop.items.items()}, negatives="category")


# --- files and reports ---------------------------------------------------------------------------------------------------


def test_lists_survive_a_file(tmp_path, toy):
    shop = make_shop()
    shop = replace(shop, has_clock=True, sequences={u: [x._replace(rating=4.5, timestamp=1e9 + 1e6 * n) for n, x in enumerate(s)] for u, s in shop.sequences.items()})
    for d in (toy, shop):
        examples = d.examples("test", 10)
        data.save_lists(tmp_path / "lists.jsonl", examples)
        back = data.read_lists(tmp_path / "lists.jsonl", d.items)
        assert back == examples
        assert [(h.ago, h.rating) for e in back for h in e.history] == [(h.ago, h.rating) for e in examples for h in e.history]
    record = json.loads((tmp_path / "lists.jsonl").read_text().splitlines()[0])
    assert list(record)[:4] == ["user", "history", "candidates", "relevance"] and record["relevance"].count(1) == 1


def test_of_a_list_in_a_file_the_latest_items_count(tmp_path):
    """With --history-length a model is tested on what it was trained on, whoever wrote the lists; facts are those of that history."""
    shop = make_shop()
    shop.facts = data.Facts(shop)
    path = tmp_path / "lists.jsonl"
    data.save_lists(path, shop.examples("test", 10, 5, 4))
    args = lambda n: type("Args", (), {"candidates": path, "save_candidates": None, "history_length": n})
    whole, cut = (evaluation.test_lists(shop, args(n), 10) for n in (4, 2))
    assert max(len(e.history) for e in whole) == 4
    for a, b in zip(whole, cut):
        assert [x.id for x in b.history] == [x.id for x in a.history[-2:]] and [c.id for c in b.candidates] == [c.id for c in a.candidates]
        assert [c.facts for c in b.candidates] == [c.facts for c in shop.facts.beside(b.user, b.history, b.candidates)]
    assert [c.facts for e in whole for c in e.candidates] != [c.facts for e in cut for c in e.candidates]


def test_an_evaluation_renews_its_differences_to_what_is_on_record(tmp_path, toy):
    """`sft` stays as it was, `rl` changes: so does rl - sft."""
    examples = toy.examples("test", 20)
    scored = {name: evaluation.evaluate(evaluation.random_scores(examples, seed), examples) for seed, name in enumerate(("sft", "rl", "new"))}
    write = lambda *names, **as_: evaluation.write_eval(tmp_path / "eval.json", "toy", examples, {as_.get(n, n): scored[n][0] for n in names},
                                                       {as_.get(n, n): scored[n][1] for n in names}, True)
    read = lambda: json.loads((tmp_path / "eval.json").read_text())["differences"]["rl - sft"]
    write("sft", "rl")
    before = read()
    write("rl")
    assert read() == before
    write("new", new="rl")
    users = [e.user for e in examples]
    want = evaluation.interval([a - b for a, b in zip(scored["new"][1]["ndcg@10"], scored["sft"][1]["ndcg@10"])], users)
    assert read() == {"ndcg@10": pytest.approx(want)} and read()["ndcg@10"] != before["ndcg@10"]


@pytest.mark.parametrize("line, words", [
    ('{"user": "u", "history": [], "candidates": ["i0", "nowhere"], "relevance": [1, 0]}', ["line 2", "nowhere"]),
    ('{"user": "u", "history": [], "candidates": ["i0", "i1"], "relevance": [1]}', ["line 2", "one relevance"]),
    ('{"user": "u", "history": [], "candidates": ["i0", "i0"], "relevance": [1, 0]}', ["line 2", "different"]),
    ('{"user": "u", "history": [], "candidates": ["i0", "i1"], "relevance": [0, 0]}', ["line 2", "relevant"]),
    ('{"user": "u", "history": [], "candidates": ["i0", "i1"], "relevance": [1, -1]}', ["line 2", ">= 0"]),
    ('{"user": "u", "history": ["i3"], "ago": [], "candidates": ["i0", "i1"], "relevance": [1, 0]}', ["line 2"]),
    ('[1]', ["line 2", "history"]), ("{", ["line 2"]), ('{"user": "u"}', ["line 2", "candidates"]),
])
def test_broken_lists_are_named(tmp_path, line, words):
    path = tmp_path / "lists.jsonl"
    path.write_text('{"user": "u", "history": [], "candidates": ["i0", "i1"], "relevance": [1, 0.5]}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        data.read_lists(path, make_shop().items)
    assert all(w in str(error.value) for w in words), error.value


def test_names_never_meet_in_trec_files(tmp_path):
    items = [Item(i, i) for i in ("a b", "a_b", "a%20b", "é")]
    evaluation.save_predictions(tmp_path / "r", [Example("u 1", [], items, [1, 0, 0, 0])], {"my system": [[4, 3, 2, 1]]})
    lines = (tmp_path / "r").read_text().splitlines()
    assert lines[0] == "1/u%201 Q0 a%20b 1 4.0 my%20system" and len({line.split(" ")[2] for line in lines}) == 4
    assert rescore(tmp_path / "r", tmp_path / "r.qrels") == {"my%20system": (1.0, 1.0)}


def test_a_list_of_nobody_belongs_to_nobody(tmp_path):
    """Without a user, or with null, each list is its own: not the user whose name is the line number."""
    (tmp_path / "l").write_text('{"candidates": ["i0", "i1"], "relevance": [1, 0]}\n{"user": null, "candidates": ["i0", "i1"], "relevance": [1, 0]}\n')
    assert [e.user for e in data.read_lists(tmp_path / "l", make_shop().items)] == ["line 1", "line 2"]


def rescore(run_file, qrels_file):
    """NDCG@10 and reciprocal rank of a TREC run, from the files alone: {system: (ndcg, mrr)}."""
    judged = {}
    for line in qrels_file.read_text().splitlines():
        query, _, doc, y = line.split(" ")
        judged.setdefault(query, {})[doc] = float(y)
    runs = {}
    for line in run_file.read_text().splitlines():
        query, q0, doc, rank, score, system = line.split(" ")
        runs.setdefault(system, {}).setdefault(query, []).append((float(score), int(rank), doc))
    results = {}
    for system, queries in runs.items():
        ndcg = mrr = 0.0
        for query, rows in queries.items():
            rows.sort(key=lambda r: (-r[0], r[1]))
            assert [r[1] for r in rows] == list(range(1, len(rows) + 1)) and len(rows) == len(judged[query])
            gains = [2 ** judged[query][doc] - 1 for _, _, doc in rows]
            ideal = sum(g / math.log2(n + 2) for n, g in enumerate(sorted(gains, reverse=True)[:10]))
            ndcg += sum(g / math.log2(n + 2) for n, g in enumerate(gains[:10])) / ideal
            mrr += 1 / next(n for n, g in enumerate(gains, start=1) if g > 0)
        results[system] = (ndcg / len(judged), mrr / len(judged))
    return results


def test_baselines_on_the_command_line(tmp_path):
    """Lists written, read again and re-scored by other means give the same numbers."""
    names = ["title-overlap", "item-knn"]
    first = run("eval.py", "--baselines", *names, "--save-candidates", "lists.jsonl", "--save-predictions", "run.trec", "--slices",
                "--eval-lists", 60, cwd=tmp_path).stdout
    report = json.loads((tmp_path / "eval.json").read_text())
    assert list(report["systems"]) == ["random", "popularity", *names] and report["num_lists"] == 60
    assert all(set(s) == set(evaluation.METRICS) and all(v["low"] <= v["mean"] <= v["high"] for v in s.values()) for s in report["systems"].values())
    assert all(n in first for n in names) and "by training count of the positive" in first
    scored = rescore(tmp_path / "run.trec", tmp_path / "run.trec.qrels")
    for name in ("random", "title-overlap", "item-knn"):
        assert scored[name][0] == pytest.approx(report["systems"][name]["ndcg@10"]["mean"], abs=0.02 if name != "random" else 1e-9)  # ties
        assert scored[name][1] == pytest.approx(report["systems"][name]["mrr"]["mean"], abs=0.02 if name != "random" else 1e-9)
    for dimension in report["slices"].values():
        assert sum(b["num_lists"] for b in dimension.values()) == 60
        total = sum(b["num_lists"] * b["systems"]["item-knn"]["ndcg@10"]["mean"] for b in dimension.values())
        assert total / 60 == pytest.approx(report["systems"]["item-knn"]["ndcg@10"]["mean"])
    gap = report["differences"]["item-knn - title-overlap"]["ndcg@10"]
    assert gap["mean"] == pytest.approx(report["systems"]["item-knn"]["ndcg@10"]["mean"] - report["systems"]["title-overlap"]["ndcg@10"]["mean"])
    assert gap["low"] <= gap["mean"] <= gap["high"]
    run("eval.py", "--baselines", *names, "--candidates", "lists.jsonl", "--out", "again.json", cwd=tmp_path)
    assert json.loads((tmp_path / "again.json").read_text())["systems"] == report["systems"]


def test_full_catalogue_on_the_command_line(tmp_path):
    run("eval.py", "--baselines", "random", "popularity", "title-overlap", "--full", cwd=tmp_path)
    report = json.loads((tmp_path / "eval.json").read_text())
    assert sum(b["num_lists"] for b in report["slices"]["popularity"].values()) == 180
    assert report["num_items"] == 400 and report["num_targets"] == 180 and list(report["full"]) == ["random", "popularity", "title-overlap"]
    assert report["full"]["title-overlap"]["hr@10"]["mean"] > 0.1 > report["full"]["random"]["hr@10"]["mean"]


@pytest.mark.parametrize("flags, words", [
    (["--full"], "--baselines"), (["--full", "--baselines", "--model", "tiny"], "leave out"), (["--baselines", "--explain", "2"], "--run or --model"),
    (["--full", "--baselines", "--candidates", "x"], "--candidates"), (["--candidates", "none.jsonl", "--baselines"], "none.jsonl"),
    (["--probe-orders", "1"], "at least 2"), (["--baselines", "--out", "nowhere/x.json"], "--out nowhere/x.json"), (["--core", "5"], "toy"),
    (["--baselines", "--save-predictions", "nowhere/x"], "--save-predictions"), (["--run", "r", "--model", "tiny"], "leave out"),
    (["--data", "nowhere"], "ml-100k"), (["--require", "title"], "Amazon"), (["--data", "toy", "--split", "temporal"], "--split"),
])
def test_contradictions_are_refused(tmp_path, flags, words):
    if "--require" in flags:
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "s.inter").write_text("user_id:token\titem_id:token\na\tx\n")
        (tmp_path / "s" / "s.item").write_text("item_id:token\ttitle:token_seq\nx\tX\n")
        flags = [*flags, "--data", tmp_path / "s"]
    assert words in run("eval.py", *flags, cwd=tmp_path, code=2).stderr


# --- position bias ---------------------------------------------------------------------------------------------------------


def test_scores_of_r2rank_do_not_depend_on_the_order(model, tokenizer, score_head, toy):
    examples = toy.examples("test", 4)

    def score(lists):
        results = evaluation.model_scores(model, tokenizer, score_head, lists, policy.Sampling(12, max_rows=40), micro_batch=7)
        return [s for s, _ in results]

    probe = evaluation.position_probe(score, examples, orders=5)
    assert probe["max_score_difference"] < 1e-5 and probe["same_ranking"] == 1.0 and len(probe["ndcg@10"]) == 5
    assert max(probe["ndcg@10"]) - min(probe["ndcg@10"]) < 1e-9


def test_the_probe_finds_a_position_bias(toy):
    examples = toy.examples("test", 20)
    probe = evaluation.position_probe(lambda lists: [[-0.1 * n for n in range(len(e.candidates))] for e in lists], examples)
    assert probe["max_score_difference"] > 1 and probe["same_ranking"] == 0.0
