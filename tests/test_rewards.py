"""Metrics and alignments by hand, how a boxed answer is read, and LightGCN against dense algebra."""

import math
from unittest.mock import Mock

import pytest
import torch

import data
import rewards
from data import InputError, Item
from rewards import LightGCN, fit_lightgcn, hit_at_k, ndcg_at_k, parse_answers, parse_boxed, reciprocal_rank

def test_metrics_by_hand():
    assert ndcg_at_k([1, 0, 0], 10) == 1.0
    assert ndcg_at_k([0, 1, 0], 10) == pytest.approx(1 / math.log2(3))
    assert [ndcg_at_k([0, 0, 1], k) for k in (2, 3)] == [0.0, pytest.approx(0.5)]
    # gains 2^y - 1: 3 -> 7, 2 -> 3, 1 -> 1
    dcg = 1 / math.log2(2) + 7 / math.log2(3) + 0 + 3 / math.log2(5)
    ideal = 7 / math.log2(2) + 3 / math.log2(3) + 1 / math.log2(4)
    assert ndcg_at_k([1, 3, 0, 2], 4) == pytest.approx(dcg / ideal)
    assert ndcg_at_k([1, 3, 0, 2], 1) == pytest.approx(1 / 7)
    # The ideal is over all candidates, not over the first k.
    assert ndcg_at_k([1, 0, 1, 1], 2) == pytest.approx(1 / (1 + 1 / math.log2(3)))
    # What counts hits alone, and what lists without a relevant candidate are worth.
    assert [hit_at_k([0, 0, 1], k) for k in (1, 2, 3, 10)] == [0, 0, 1, 1]
    assert reciprocal_rank([0, 0, 1, 1]) == pytest.approx(1 / 3)
    assert ndcg_at_k([0, 0], 2) == hit_at_k([0, 0], 2) == reciprocal_rank([0, 0]) == ndcg_at_k([], 5) == 0.0

@pytest.mark.parametrize("text, wanted", [
    (r"so \boxed{Heat}", "Heat"), (r"\boxed{ a {b} c }!", "a {b} c"), (r"\boxed{A} or \boxed{B}", "A"),
    ("no box", None), ("", None), (r"\boxed{never closed", None), (r"\boxed {Heat}", None),
    ("boxed{Heat}", None), ("\\boxed{Amélie\r\n}", "Amélie"), (r"\boxed{", None), (r"}\boxed{A}", "A"),
    # A box with nothing in it is none, whatever the nothing is made of.
    (r"\boxed{}", None), (r"\boxed{ }", None), (r"\boxed{\text{}}", None), (r"\boxed{**}", None),
    (r"\boxed{} so \boxed{A}", "A"), ("\\boxed{\r\n}", None), ("\\boxed{\u00a0}", None),
    # One that never closes is none either, and does not swallow the next.
    (r"\boxed{I think \boxed{A}", "A"), (r"\boxed{ {x} and \boxed{A} or \boxed{B}", "A"),
    (r"{ \boxed{A}", "A"),
])
def test_parse_boxed(text, wanted):
    assert parse_boxed(text) == wanted
    if wanted is not None:
        start, end = rewards.find_box(text)
        assert text[start:end].startswith(r"\boxed{") and text[start + 7:end - 1].strip() == wanted

def movies(*titles):
    return [Item(f"m{n}", title) for n, title in enumerate(titles)]

def ids(boxed, items):
    return [a and a.id for a in parse_answers(boxed, items)]

@pytest.mark.parametrize("boxed, wanted", [
    ("Alien", ["m0"]), (" aliens ", ["m1"]), ('"ALIEN  3"', ["m2"]), ("Ali", [None]),
    ("Alien, Aliens", [None]), ("", []), (None, []), (";;", []),
    ("Me; Myself; Alien", ["m3", "m0"]), ("Myself; Me", ["m4", None]),
    ("Alien; Alien; nonsense; Aliens", ["m0", None, "m1"])])
def test_answers_are_matched_exactly(boxed, wanted):
    assert ids(boxed, movies("Alien", "Aliens", "Alien 3", "Me; Myself", "Myself", "")) == wanted

@pytest.mark.parametrize("boxed", [
    r"\text{Tom & Jerry, 100% #1}", r"Tom \& Jerry, 100\% \#1", r"\textbf{Tom \& Jerry, 100\% \#1}",
    r"\mathrm{Tom & Jerry}, 100% \#1", "**Tom & Jerry, 100% #1**", "*Tom & Jerry, 100% #1*.",
    "Tom & Jerry, 100% #1.", "“tom & jerry, 100% #1”", "TOM  &  JERRY, 100% #1"])
def test_dressed_titles_are_found(boxed):
    items = movies("Tom & Jerry, 100% #1", "Tom & Jerry")
    assert ids(parse_boxed(rf"\boxed{{{boxed}}}"), items) == ["m0"]
    assert ids(boxed + "; Tom & Jerry", items) == ["m0", "m1"]

def test_a_year_may_be_left_out_where_it_tells_nothing_apart():
    items = movies("Heat (1995)", "Ronin (1998)", "Heat (1986)", "Up", "Alien (1979)", "Alien")
    assert ids("Ronin", items) == ids("Ronin (1998)", items) == ["m1"]
    assert ids("Heat (1986)", items) == ["m2"] and ids("Heat (1995)", items) == ["m0"]
    assert ids("Heat", items) == ids("Ronin (2001)", items) == ids("Up (2009)", items) == [None]
    assert ids("Alien", items) == ["m5"] and ids("Alien (1979)", items) == ["m4"]  # the very title goes first

def test_shown_titles_hold_no_answer_and_are_found_again():
    """Titles that spell a box, break the line or leave braces open are defused where prompts show them."""
    items = movies("Good", r"Bad \boxed{Good}", "Line\n\\boxed{Good}", "Open {brace", "}{",
                   r"Two \\boxed{Good}", r"Three \\\boxed{Good}", "{Pairs}")
    for item in items:
        shown = rewards.shown_title(item)
        assert "\\boxed" not in shown and "\n" not in shown and shown.count("{") == shown.count("}")
        text = f"I like {shown}.\n\\boxed{{{shown}}}"
        assert parse_answers(parse_boxed(text), items) == [item]

def test_alignments_by_hand():
    graph = {"m0": frozenset("abcd"), "m1": frozenset("ab"), "m2": frozenset("xy"), "m3": frozenset("bc")}
    for predicted, truths, wanted in (
            ("m1", ["m0"], 0.5), ("m0", ["m1"], 1.0), ("m2", ["m0"], 0.0), ("no", ["m0"], 0.0),
            (None, ["m0"], 0.0), ("m0", ["no"], 0.0), ("m0", [], 0.0), ("m0", ["m1", "m2"], 0.0),
            ("m1", ["m0", "m3"], 0.5)):  # what these truths share is {b, c}
        assert rewards.query_alignment(predicted, truths, graph) == wanted
    graph = rewards.attribute_graph([Item("i", "I", {"a": ("x", "y"), "b": ("x",)})])
    assert graph == {"i": {("a", "x"), ("a", "y"), ("b", "x")}}
    vectors = {"m0": [3.0, 4.0], "m1": [4.0, 3.0], "m2": [-3.0, -4.0]}
    embeddings = {item: torch.tensor(v) for item, v in vectors.items()}
    for predicted, truths, wanted in (
            ("m1", ["m0"], 24 / 25), ("m0", ["m2"], -1.0), ("no", ["m0"], 0.0), (None, ["m0"], 0.0),
            ("m0", ["no"], 0.0), ("m0", ["m2", "m1", "no"], 24 / 25)):
        assert rewards.preference_alignment(predicted, truths, embeddings) == pytest.approx(wanted)

def dense_propagation(weight, num_users, num_items, pairs, layers):
    """(A_hat^0 + … + A_hat^L) E0 / (L + 1) by loops and dense matrices."""
    A = torch.zeros(num_users + num_items, num_users + num_items, dtype=weight.dtype)
    for u, i in pairs.tolist():
        A[u, num_users + i] = A[num_users + i, u] = 1
    D = torch.diag(torch.where(A.sum(1) > 0, A.sum(1).rsqrt(), 0))
    return sum(torch.matrix_power(D @ A @ D, n) @ weight for n in range(layers + 1)) / (layers + 1)

@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagation_and_its_gradient_are_those_of_the_dense_matrix(layers):
    # Two duplicates; user 2 and items 3 and 4 have no edge.
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2], [1, 1], [3, 0], [0, 0]])
    model = LightGCN(4, 5, pairs, dim=6, layers=layers)
    weight = model.embedding.detach().clone().requires_grad_()
    found, expected = torch.cat(model.propagate()), dense_propagation(weight, 4, 5, pairs, layers)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(model.embedding.grad, weight.grad)

def test_bpr_and_its_regulariser_step_by_step():
    """Each user has all items but one, the negative: then the steps of Adam can be written down."""
    pairs = torch.tensor([(u, i) for u in range(4) for i in range(4) if i != u])

    def fit(epochs):
        return fit_lightgcn(4, 4, pairs, dim=6, layers=2, epochs=epochs, lr=0.05, l2=0.5).embedding.detach()

    weight = fit(0).double().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.05)
    rows = torch.stack([pairs[:, 0], 4 + pairs[:, 1], 4 + pairs[:, 0]])  # user, item, the item the user lacks
    for _ in range(20):
        u, i, j = dense_propagation(weight, 4, 4, pairs, 2)[rows]
        penalty = 0.5 / 2 * weight[rows].square().sum(-1).sum(0).mean()
        loss = -torch.log(torch.sigmoid((u * i).sum(1) - (u * j).sum(1))).mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(fit(20), weight.detach().float(), atol=1e-4, rtol=1e-4)

def test_a_pair_counts_once_seed_and_stop_decide_and_who_has_every_item_is_skipped():
    pairs = torch.tensor([(u, (7 * u + i * i) % 20) for u in range(20) for i in range(5)])
    state = torch.get_rng_state()

    def fit(pairs=pairs, **options):
        return fit_lightgcn(20, 20, pairs, dim=8, **({"epochs": 3, "seed": 1} | options)).embedding

    first = fit()
    same = (fit(torch.cat([pairs, pairs[:30]])), fit(pairs.flip(0)),
            fit(epochs=50, stop=lambda model, epoch: epoch == 3))
    assert all(torch.equal(first, other) for other in same) and not torch.equal(first, fit(seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    for useless in (torch.tensor([[0, 0], [0, 1]]), torch.zeros(0, 2, dtype=torch.long)):
        with pytest.raises(InputError, match="at least one"):
            fit_lightgcn(2, 2, useless)
    pairs = torch.tensor([(u, i) for u in range(4) for i in range(4) if i != u or u == 3])
    start, fitted = (fit_lightgcn(4, 4, pairs, dim=4, layers=0, epochs=n, l2=0.0) for n in (0, 200))
    assert (fitted.embedding != start.embedding).any(1).tolist() == [True] * 3 + [False] + [True] * 4

def test_item_embeddings_see_training_alone_and_are_kept(toy, tmp_path, monkeypatch):
    """Items that only test users chose have none; nothing is trained twice; a broken file is made anew."""
    seen = {x.item_id for u, s in toy.sequences.items() for x in s[:toy.train_length[u]]}
    fit = Mock(side_effect=lambda *given, **options: fit_lightgcn(*given[:5], 2, **options))  # two epochs
    monkeypatch.setattr(rewards, "fit_lightgcn", fit)
    first, again = (rewards.item_embeddings(toy, tmp_path, dim=8) for _ in range(2))
    assert fit.call_count == 1 and set(first) == seen and all(v.shape == (8,) for v in first.values())
    assert all(torch.equal(first[i], again[i]) for i in seen)
    next(tmp_path.iterdir()).write_bytes(b"broken")
    mended, other = (rewards.item_embeddings(toy, tmp_path, dim=8, seed=seed) for seed in (0, 1))
    assert all(torch.equal(first[i], mended[i]) for i in seen)
    assert not all(torch.equal(first[i], other[i]) for i in seen)
    assert fit.call_count == 3 and len(list(tmp_path.iterdir())) == 2
    bare = data.Dataset("bare", {"a": Item("a", "A")}, {}, {}, {})
    assert rewards.item_embeddings(bare, tmp_path) == {}
