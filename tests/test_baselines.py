"""Baselines: against dense algebra and brute force; causality, padding, and what they may learn from."""

import json
import random
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import data
from data import InputError, Interaction, make_item
from eval import expected_metrics
from extras import baselines
from extras.baselines import SASRec, fit_baselines, fit_sasrec
from rewards import fit_lightgcn


def make_shop(split=data.split_leave_one_out):
    rng = random.Random(0)
    items = {f"i{n}": make_item(f"i{n}", "red " * (n % 3) + f"thing {n % 7} x{n}", {}) for n in range(40)}
    sequences = {}
    for u in range(60):
        ids = rng.sample(list(items), rng.randint(3, 9))
        start = 5 * (u % 9)  # users begin at different times, as a split by time needs it
        sequences[f"u{u}"] = [Interaction(i, float(start + t)) for t, i in enumerate(ids)]
    return data.Dataset("shop", items, sequences, *split(sequences))


@pytest.mark.parametrize("idf", [True, False])
def test_cosine_rankers_are_those_of_dense_algebra(idf):
    """Titles' words weigh log(I / number of titles), users 1; feature 0 is on all items, so its idf is 0."""
    rows = [[0, 1 + n % 7, 8 + n // 3] if n != 39 else [0] for n in range(40)]
    weight = torch.zeros(40, 22)
    for i, row in enumerate(rows):
        weight[i, row] = 1
    if idf:
        weight *= (40 / weight.sum(0).clamp(min=1)).log()
    cosine = torch.nn.functional.cosine_similarity(weight[:, None], weight[None], dim=-1)
    expected = [0.25 * cosine[3] + 0.5 * cosine[5] + cosine[3], 0 * cosine[0], cosine[39]]
    scores = baselines.cosine_ranker(baselines.feature_vectors(rows, idf), 0.5)("abc", [[3, 5, 3], [], [39]])
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=0)


def test_item_knn_is_the_cosine_of_co_occurrence():
    items = {f"i{n}": make_item(f"i{n}", "thing", {}) for n in range(6)}
    rows = {"a": "012", "b": "1312", "c": "05", "d": "23"}  # i1 twice counts once
    sequences = {u: [Interaction(f"i{n}") for n in row] for u, row in rows.items()}
    splits = {"train": [], "validation": [("a", 2)], "test": []}
    shop = data.Dataset("shop", items, sequences, splits, {u: len(row) for u, row in rows.items()})
    had = torch.tensor([[float(str(n) in row) for row in rows.values()] for n in range(6)])
    cosine = torch.nn.functional.cosine_similarity(had[:, None], had[None], dim=-1)
    scores = fit_baselines(shop, ["item-knn"])["item-knn"](["x"] * 6, [[n] for n in range(6)])
    torch.testing.assert_close(scores, cosine, atol=1e-6, rtol=0)


def test_full_ranking_counts_everything_but_the_past():
    shop = make_shop()
    fixed = torch.randn(40, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    targets = shop.splits["test"]
    rows = baselines.full_ranking(shop, lambda users, _: fixed.expand(len(users), -1), targets)
    for (user, p), row in zip(targets, rows, strict=True):
        past = {x.item_id for x in shop.sequences[user][:p]}
        scores = {i: x for i, x in zip(shop.items, fixed.tolist()) if i not in past}
        truth = scores[shop.sequences[user][p].item_id]
        above, tied = (sum(x > truth for x in scores.values()), sum(x == truth for x in scores.values()))
        assert row == pytest.approx(expected_metrics([(above, []), (tied, [1.0])]))


def test_scores_of_lists_are_those_of_the_catalogue(monkeypatch):
    shop, seen = make_shop(), []

    def ranker(users, histories):
        seen.extend(zip(users, histories))
        return torch.stack([torch.arange(40.0) + int(u[1:]) for u in users])

    monkeypatch.setattr(baselines, "fit_baselines", lambda *arguments: {"fake": ranker})
    monkeypatch.setattr(baselines.score_rows, "__defaults__", (3,))  # batches of three
    examples = shop.examples("test", 10, num_candidates=5, history_length=2)
    scores = baselines.list_scores(shop, examples)["fake"]
    for example, row, (user, history) in zip(examples, scores, seen, strict=True):
        assert user == example.user and [f"i{n}" for n in history] == [x.id for x in example.history]
        assert row.tolist() == [int(c.id[1:]) + int(user[1:]) for c in example.candidates]


@pytest.mark.parametrize("split", [data.split_leave_one_out, data.split_temporal])
def test_baselines_never_see_the_test_interactions(split):
    """Fitted on a shop and on its twin that differs in its test interactions, they score alike to the bit."""
    shop = make_shop(split)
    sequences = {u: list(s) for u, s in shop.sequences.items()}
    for u, p in shop.splits["test"]:
        others = [i for i in shop.items if i not in {x.item_id for x in shop.sequences[u]}]
        sequences[u][p] = sequences[u][p]._replace(item_id=others[p])
    one, two = fit_baselines(shop), fit_baselines(replace(shop, sequences=sequences))
    assert sequences != shop.sequences and tuple(one) == baselines.BASELINES
    users, histories = ["u0", "u1", "stranger", "u2"], [[1, 2, 3], [4], [5, 6], []]
    for name in one:
        scores = one[name](users, histories)
        assert scores.shape == (4, 40) and torch.equal(scores, two[name](users, histories)), name


def test_lightgcn_takes_strangers_for_the_mean_of_their_history():
    user_rows, item_rows = torch.randn(2, 3), torch.randn(5, 3)
    model = SimpleNamespace(propagate=lambda: (user_rows, item_rows))
    scores = baselines.lightgcn_ranker({"a": 0, "b": 1}, model)(["b", "x", "x"], [[0], [1, 4], []])
    expected = torch.stack([user_rows[1], (item_rows[1] + item_rows[4]) / 2, torch.zeros(3)]) @ item_rows.T
    torch.testing.assert_close(scores, expected)


def test_what_cannot_be_fitted_is_an_input_error():
    shop = make_shop()
    with pytest.raises(InputError, match="nix.*popularity"):
        fit_baselines(shop, ["popularity", "nix"])
    with pytest.raises(InputError, match="shop: no interactions"):
        fit_baselines(replace(shop, train_length=dict.fromkeys(shop.sequences, 0)))
    with pytest.raises(InputError, match="SASRec needs at least one"):
        fit_baselines(replace(shop, train_length=dict.fromkeys(shop.sequences, 1)), ["sasrec"])


def test_sasrec_is_causal_and_its_scores_do_not_depend_on_the_batch():
    model = SASRec(30, dim=16, max_len=8).eval()
    a = torch.randint(30, (4, 8))
    for t in range(1, 8):
        b = a.clone()
        b[:, t] = (a[:, t] + 1) % 30
        change = (model(a) - model(b)).abs().amax(-1)  # (4, 8)
        assert (change[:, :t] < 1e-5).all() and (change[:, t:] > 1e-4).all()
    histories = [[3, 1, 4], [], [1], list(range(20)), [5, 9, 2, 6, 5, 3]]
    together = model.scores(None, histories)
    alone = [model.scores(None, [history]) for history in histories]
    alone[3] = model.scores(None, [list(range(12, 20))])  # of a long history the end counts
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert torch.equal(together[1], torch.zeros(30))  # no history: all items tie
    expected = model(model.pad([[3, 1, 4]]))[0, -1] @ model.items.weight[:-1].T
    torch.testing.assert_close(together[0], expected, rtol=0, atol=1e-5)


def test_sasrec_learns_a_cycle_and_leaves_the_global_random_state_alone():
    ring = 7  # 0 -> 1 -> ... -> 6 -> 0; short sequences leave every user some of the ring as negatives
    sequences = [[(start + n) % ring for n in range(size)] for start in range(ring) for size in (1, 2, 3, 4)]
    state = torch.get_rng_state()
    options = {"epochs": 100, "lr": 1e-2, "dim": 16, "dropout": 0.1}
    a, b, c = (fit_sasrec(ring, sequences, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    histories = [s[:-1] for s in sequences if len(s) > 1]
    scores = a.scores(None, histories)
    assert torch.equal(scores, b.scores(None, histories))
    assert not torch.equal(scores, c.scores(None, histories))
    for row, history in zip(scores, histories):
        row[history] = -float("inf")  # as in a ranking: they are no negatives of one another
        assert row.argmax() == (history[-1] + 1) % ring


def test_sasrec_masks_what_a_user_has():
    """All negatives are items of the same user: nothing is left to learn, the loss is 0."""
    sequences = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]
    start, fitted = (fit_sasrec(5, sequences, epochs=e, dim=8) for e in (0, 3))
    assert all(torch.equal(x, fitted.state_dict()[name]) for name, x in start.state_dict().items())


@pytest.mark.parametrize("fit", [partial(fit_sasrec, 6, [[0, 1, 2], [3, 4, 5]]),
                                 partial(fit_lightgcn, 2, 6, torch.tensor([[0, 1], [1, 2], [1, 4]]))])
def test_validation_chooses_the_epoch_and_patience_ends_training(fit):
    values, states = iter([0.1, 0.5, 0.2, 0.3, 0.9]), []

    def validate(model):
        assert not model.training
        states.append(model)
        return next(values)

    chosen = baselines.fit_ranker(partial(fit, dim=4, epochs=50), lambda model: model, validate, 2, 2)
    assert len(states) == 4 and chosen is states[1]  # 0.5 is the best; two looks later, before 0.9, it ends
    undisturbed = fit(dim=4, epochs=8)  # looking does not change what is trained
    assert all(torch.equal(x, y) for x, y in zip(states[3].parameters(), undisturbed.parameters()))


def test_the_command_ranks_the_catalogue(tmp_path, monkeypatch, capsys, toy):
    monkeypatch.setattr(baselines, "load_data", lambda args: toy)
    flags = ["--full", "--baselines", "title-overlap", "--eval-lists", "50", "--out", f"{tmp_path}/full.json"]
    monkeypatch.setattr(sys, "argv", ["baselines.py", *flags])
    baselines.main()
    report = json.loads((tmp_path / "full.json").read_text())
    assert list(report["full"]) == ["random", "title-overlap"] and report["num_targets"] == 50
    means = {name: system["hr@10"]["mean"] for name, system in report["full"].items()}
    assert means["title-overlap"] > 0.1 > means["random"] == pytest.approx(10 / 395, rel=0.02)
    assert "50 test interactions, each ranked among 400 items" in capsys.readouterr().out
