"""Baselines: against dense algebra and brute force; causality, padding, and what they may learn from."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from data import InputError
from eval import expected_metrics
from extras import baselines
from extras.baselines import SASRec, fit_baselines, fit_sasrec
from rewards import fit_lightgcn
from test_data import load, shop  # noqa: F401

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

def test_full_ranking_counts_everything_but_the_past(shop):
    shop = load(shop)
    fixed = torch.randn(60, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    targets = shop.splits["test"]
    rows = baselines.full_ranking(shop, lambda users, _: fixed.expand(len(users), -1), targets)
    for (user, p), row in zip(targets, rows, strict=True):
        past = {x.item_id for x in shop.sequences[user][:p]}
        scores = {i: x for i, x in zip(shop.items, fixed.tolist()) if i not in past}
        truth = scores[shop.sequences[user][p].item_id]
        above, tied = (sum(x > truth for x in scores.values()), sum(x == truth for x in scores.values()))
        assert row == pytest.approx(expected_metrics([(above, []), (tied, [1.0])]))

def test_scores_of_lists_are_those_of_the_catalogue(shop, monkeypatch):
    def ranker(users, histories):
        rows = [torch.arange(60.0) + int(u[1:]) + sum(h) / 100 for u, h in zip(users, histories)]
        return torch.stack(rows)

    monkeypatch.setattr(baselines, "fit_baselines", lambda *arguments: {"fake": ranker})
    monkeypatch.setattr(baselines.score_rows, "__defaults__", (3,))  # batches of three
    shop = load(shop)
    examples = shop.examples("test", 10, num_candidates=5, history_length=2)
    for e, row in zip(examples, baselines.list_scores(shop, examples)["fake"], strict=True):
        known = int(e.user[1:]) + sum(int(h.id[1:]) for h in e.history) / 100
        assert row.tolist() == pytest.approx([int(c.id[1:]) + known for c in e.candidates])

@pytest.mark.parametrize("split", ["leave-one-out", "temporal"])
def test_baselines_never_see_the_test_interactions(shop, split):
    """Fitted on a shop and on its twin that differs in its test interactions, they score alike to the bit."""
    shop = load(shop, split=split)
    sequences = {u: list(s) for u, s in shop.sequences.items()}
    for u, p in shop.splits["test"]:
        others = [i for i in shop.items if i not in {x.item_id for x in shop.sequences[u]}]
        sequences[u][p] = sequences[u][p]._replace(item_id=others[p])
    one, two = fit_baselines(shop), fit_baselines(replace(shop, sequences=sequences))
    assert sequences != shop.sequences and tuple(one) == baselines.BASELINES
    users, histories = ["u0", "u1", "stranger", "u2"], [[1, 2, 3], [4], [5, 6], []]
    for name in one:
        scores = one[name](users, histories)
        assert scores.shape == (4, 60) and torch.equal(scores, two[name](users, histories)), name

def test_what_cannot_be_fitted_is_an_input_error(shop):
    shop = load(shop)
    for length, name, message in ((2, "none", "none.*popularity"), (0, "sasrec", "shop: no interactions"),
                                  (1, "sasrec", "SASRec needs at least one")):
        with pytest.raises(InputError, match=message):
            fit_baselines(replace(shop, train_length=dict.fromkeys(shop.sequences, length)), [name])

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
    histories[3] = histories[3][12:]  # of a long history the end counts
    for row, history in zip(together, histories):
        expected = torch.zeros(30)  # no history: all items tie
        if history:
            expected = model(model.pad([history]))[0, -1] @ model.items.weight[:-1].T
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)

def test_sasrec_learns_a_cycle_and_leaves_the_global_random_state_alone():
    ring = 7  # 0 -> 1 -> ... -> 6 -> 0; short sequences leave every user some of the ring as negatives
    sequences = [[(start + n) % ring for n in range(size)] for start in range(ring) for size in (1, 2, 3, 4)]
    state = torch.get_rng_state()
    options = {"epochs": 100, "lr": 1e-2, "dim": 16, "dropout": 0.1}
    histories = [s[:-1] for s in sequences if len(s) > 1]
    scores, again, other = (fit_sasrec(ring, sequences, seed=seed, **options).scores(None, histories)
                            for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(scores, again) and not torch.equal(scores, other)
    for row, history in zip(scores, histories):
        row[history] = -float("inf")  # as in a ranking: they are no negatives of one another
        assert row.argmax() == (history[-1] + 1) % ring

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

def test_the_command_ranks_the_catalogue(tmp_path, monkeypatch, toy):
    monkeypatch.setattr(baselines, "load_data", lambda args: toy)
    flags = ["--full", "--baselines", "title-overlap", "--eval-lists", "50", "--out", f"{tmp_path}/full.json"]
    monkeypatch.setattr(sys, "argv", ["baselines.py", *flags])
    baselines.main()
    report = json.loads((tmp_path / "full.json").read_text())
    assert report["num_targets"] == 50
    means = {name: system["hr@10"]["mean"] for name, system in report["full"].items()}
    assert means["title-overlap"] > 0.1 > means["random"] == pytest.approx(10 / 395, rel=0.02)
