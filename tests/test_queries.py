"""Requests built from a catalogue: what is right, named and hidden in them, and what they follow from."""

import hashlib
import json

import pytest

import data
from data import InputError, Item
from extras.queries import QueryBuilder, query_source
from test_data import load, shop  # noqa: F401

@pytest.fixture(scope="module")
def builder(toy):
    return query_source(toy)

def catalogue(items, sequence=()):
    """A data set of one user, whose last interaction is the training target."""
    sequence = [data.Interaction(i) for i in sequence]
    splits = {"train": [("u", len(sequence) - 1)] if sequence else []}
    return data.Dataset("x", {x.id: x for x in items}, {"u": sequence}, splits, {})

def test_exactly_the_truths_meet_all_conditions(builder):
    for split in ("train", "test"):
        for q in builder.draw(split, 120):
            right = [c.id for c in q.candidates if all(v in c.attributes[n] for n, v in q.conditions)]
            assert right == list(q.truths)
            assert len(q.candidates) == 20 == len({c.title for c in q.candidates})
            assert q.num_conditions == len(q.conditions) and 1 <= q.num_conditions <= 3

def test_requests_name_their_conditions(builder):
    """Explicit: every value in words. Implicit: no value, but an item that has it. Misinformed: a wrong value
    of the named item. Interest: two items of the history whose common values are the conditions."""
    by_title = {x.title: x for x in builder.dataset.items.values()}
    for q in builder.draw("test", 200):
        named = [item for title, item in by_title.items() if title in q.text]
        if q.kind == "explicit":
            assert not named and all(v in q.text for _, v in q.conditions)
        elif q.kind == "implicit":
            assert named and all(any(v in x.attributes[n] for x in named) for n, v in q.conditions)
        elif q.kind == "misinformed":
            (name, value), (item,) = q.conditions[0], named
            wrong = q.text.split(f"({name} ")[1].split(",")[0]
            assert item.attributes[name] == (value,) != (wrong,)
            assert (name, wrong) in builder.with_pair
        else:
            a, b = named
            assert {a.id, b.id} <= {h.id for h in q.history}
            assert set(q.conditions) == {(n, v[0]) for n, v in a.attributes.items() if b.attributes[n] == v}
        assert not {x.id for x in named} & set(q.truths)

def test_nothing_held_out_stands_in_a_training_request(shop):
    """A user's held-out items are neither candidates nor named nor history in their training requests."""
    dataset = load(shop)
    for q in QueryBuilder(dataset).draw("train", 150):
        held_out = {x.item_id for x in dataset.sequences[q.user][-2:]}
        assert not held_out & {x.id for x in [*q.candidates, *q.history]}
        assert not any(dataset.items[i].title in q.text for i in held_out)

def test_near_misses_stand_among_the_candidates(toy):
    """Of two conditions more negatives meet just one than random items do, and none meets both."""
    shares = []
    for q in QueryBuilder(toy, ["explicit"], max_conditions=2).draw("train", 150):
        for items in [q.candidates, toy.items.values()] * (q.num_conditions == 2):
            met = [sum(v in x.attributes[n] for n, v in q.conditions) for x in items]
            assert items is not q.candidates or met.count(2) == 1
            shares.append(met.count(1) / len(met))
    assert sum(shares[::2]) > sum(shares[1::2]) + 0.12 * len(shares) / 2

def test_a_request_never_names_its_answer():
    """Catalogues have items of one title: such a one is no clue to another, nor a candidate beside it."""
    polishes = ["Nail Polish", "nail  polish", "NAIL POLISH", "Nail polish"]
    items = [Item(f"p{n}", title, {"brand": ("OPI",)}) for n, title in enumerate(polishes)]
    items += [Item(f"q{n}", f"Top coat {n}", {"brand": ("OPI",)}) for n in range(2)]
    items += [Item(f"r{n}", f"Brush {n}", {"brand": ("Sigma",)}) for n in range(30)]
    builder = QueryBuilder(catalogue(items, ["r0", "p0"]), ["implicit"], num_candidates=5)
    for q in builder.draw("train", 40):
        assert "polish" not in q.text.lower() and "Top coat" in q.text
        assert sum("polish" in c.title.lower() for c in q.candidates) == 1

def test_two_items_stand_for_the_one_value_they_share():
    """Of items with several values, an implicit request names two whose only common value it is."""
    attributes = {"a": ("x", "p"), "b": ("x", "q"), "c": ("x", "p"), "z": ("x",)}
    items = [Item(i, f"Named {i}", {"tag": values}) for i, values in attributes.items()]
    items += [Item(f"n{n}", f"Other {n}", {"tag": ("y",)}) for n in range(10)]
    builder = QueryBuilder(catalogue(items, ["z"]), ["implicit"], num_candidates=3)
    for q in builder.draw("train", 20):
        named = {i for i in attributes if f"Named {i}" in q.text}
        assert named in ({"a", "b"}, {"b", "c"})  # a and c share p as well

@pytest.mark.parametrize("kinds", [None, ["implicit"], ["demographics"], ["nosuch"]])
def test_what_cannot_be_served_is_refused_with_the_reason(toy, kinds):
    dataset = catalogue([Item("a", "A")]) if kinds in (None, ["implicit"]) else toy
    with pytest.raises(InputError, match="kinds are explicit.*items need attributes that several share"):
        QueryBuilder(dataset, kinds)
    items = [Item(f"{n}", f"Item {n}", {"colour": ("red" if n < 4 else "blue",)}) for n in range(12)]
    with pytest.raises(InputError, match="leave that kind out, or lower --num-candidates"):
        QueryBuilder(catalogue(items, ["5", "0"]), ["explicit"], num_candidates=20).draw("train", 1)

def test_requests_follow_from_the_seed(toy, builder):
    """They are the old ones: runs can only be compared on the same requests."""
    requests = [[q.id, q.text, [c.id for c in q.candidates], q.truths] for q in builder.draw("test", 60)]
    digest = hashlib.sha256(json.dumps(requests).encode()).hexdigest()
    assert digest[:16] == "99ec09e1204b738e"
    again = QueryBuilder(toy).draw("train", 40)
    assert again == builder.draw("train", 40) and len({q.id for q in again}) == 40
    assert QueryBuilder(toy, seed=1).draw("train", 40) != again
    assert not {q.id for q in builder.draw("train", 40, start=7)} & {q.id for q in again}
