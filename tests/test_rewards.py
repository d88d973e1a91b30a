"""Metrics and alignments by hand and against brute force; how a boxed answer is read."""

import itertools
import math

import pytest
import torch

import data
import rewards
from data import Item
from rewards import hit_at_k, ndcg_at_k, parse_answers, parse_boxed, reciprocal_rank

def test_ndcg_by_hand():
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

def test_ndcg_is_one_only_for_ideal_orders():
    for order in itertools.permutations([0, 0, 1, 2]):
        assert (ndcg_at_k(order, 3) == pytest.approx(1.0)) == (list(order[:2]) == [2, 1])

def test_hit_and_reciprocal_rank_and_nothing_relevant():
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

GRAPH = {"m0": frozenset("abcd"), "m1": frozenset("ab"), "m2": frozenset("xy"), "m3": frozenset("bc")}

def test_query_alignment_by_hand():
    for predicted, truths, wanted in (
            ("m1", ["m0"], 0.5), ("m0", ["m1"], 1.0), ("m2", ["m0"], 0.0), ("no", ["m0"], 0.0),
            (None, ["m0"], 0.0), ("m0", ["no"], 0.0), ("m0", [], 0.0), ("m0", ["m1", "m2"], 0.0),
            ("m1", ["m0", "m3"], 0.5)):  # what these truths share is {b, c}
        assert rewards.query_alignment(predicted, truths, GRAPH) == wanted
    graph = rewards.attribute_graph([Item("i", "I", {"a": ("x", "y"), "b": ("x",)})])
    assert graph == {"i": {("a", "x"), ("a", "y"), ("b", "x")}}

def test_preference_alignment_by_hand():
    vectors = {"m0": [3.0, 4.0], "m1": [4.0, 3.0], "m2": [-3.0, -4.0]}
    embeddings = {item: torch.tensor(v) for item, v in vectors.items()}
    for predicted, truths, wanted in (
            ("m1", ["m0"], 24 / 25), ("m0", ["m2"], -1.0), ("no", ["m0"], 0.0), (None, ["m0"], 0.0),
            ("m0", ["no"], 0.0), ("m0", ["m2", "m1", "no"], 24 / 25)):
        assert rewards.preference_alignment(predicted, truths, embeddings) == pytest.approx(wanted)

def test_item_embeddings_see_training_alone_and_are_kept(toy, tmp_path, monkeypatch):
    """Items that only test users chose have none; nothing is trained twice; a broken file is made anew."""
    seen = {x.item_id for u, s in toy.sequences.items() for x in s[:toy.train_length[u]]}
    fits, original = [], rewards.fit_lightgcn

    def fit(*arguments, **options):
        fits.append(options)
        return original(*arguments[:5], 2, **options)  # two epochs

    monkeypatch.setattr(rewards, "fit_lightgcn", fit)
    first, again = (rewards.item_embeddings(toy, tmp_path, dim=8) for _ in range(2))
    assert len(fits) == 1 and set(first) == seen and all(v.shape == (8,) for v in first.values())
    assert all(torch.equal(first[i], again[i]) for i in seen)
    next(tmp_path.iterdir()).write_bytes(b"broken")
    mended, other = (rewards.item_embeddings(toy, tmp_path, dim=8, seed=seed) for seed in (0, 1))
    assert all(torch.equal(first[i], mended[i]) for i in seen)
    assert not all(torch.equal(first[i], other[i]) for i in seen)
    assert len(fits) == 3 and len(list(tmp_path.iterdir())) == 2
    bare = data.Dataset("bare", {"a": Item("a", "A")}, {}, {}, {})
    assert rewards.item_embeddings(bare, tmp_path) == {}
