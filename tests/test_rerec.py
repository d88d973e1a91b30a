"""ReRec: requests, rewards, advantages, curriculum and update, each by hand, by brute force, or by what must not change it."""

import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import policy
import rerec
import rewards
import train
from data import InputError, Item, Query

ROOT = Path(__file__).parent.parent


def movies(*titles):
    return [Item(f"m{n}", title) for n, title in enumerate(titles)]


def request(candidates, truths=("m0",), **settings):
    return Query("q", "Something good, please.", "explicit", 1, candidates, truths, **settings)


@pytest.fixture(scope="module")
def builder(toy):
    return data.QueryBuilder(toy, max_conditions=3)


# --- requests ---


def test_exactly_the_truths_meet_all_conditions(builder):
    for split in ("train", "test"):
        for q in builder.draw(split, 120):
            meets = [c.id for c in q.candidates if all(v in c.attributes[n] for n, v in q.conditions)]
            assert meets == list(q.truths) and len(q.candidates) == 20 == len({c.title for c in q.candidates})
            assert q.num_conditions == len(q.conditions) and 1 <= q.num_conditions <= 3


def test_requests_say_their_conditions(builder):
    """Explicit: every value in words. Implicit: no value, but an item that has it. Misinformed: a wrong value of the named item.
    Interest: two items whose common values are the conditions."""
    by_title = {x.title: x for x in builder.dataset.items.values()}
    for q in builder.draw("test", 200):
        named = [item for title, item in by_title.items() if title in q.text]
        if q.kind == "explicit":
            assert not named and all(v in q.text for _, v in q.conditions)
        elif q.kind == "implicit":
            assert len(named) >= 1 and all(any(v in x.attributes[n] for x in named) for n, v in q.conditions)
        elif q.kind == "misinformed":
            (name, value), (item,) = q.conditions[0], named
            stated = q.text.split(f"({name} ")[1].split(",")[0]
            assert item.attributes[name] == (value,) and stated != value and stated in builder.values[name]
        else:
            a, b = named
            assert {x.id for x in named} <= {h.id for h in q.history}
            assert set(q.conditions) == {(n, v[0]) for n, v in a.attributes.items() if b.attributes[n] == v}
        assert not any(x.id in {c.id for c in q.candidates} & set(q.truths) for x in named)


def test_nothing_held_out_stands_in_a_training_request(tmp_path):
    """Leave-one-out: a user's last two items are no candidates, not named and no history of that user's training requests."""
    rng = random.Random(0)
    lines = ["item_id:token\ttitle:token\tcolour:token\tshape:token"]
    lines += [f"{i}\titem number {i:03d}\tc{i % 5}\ts{i % 7}" for i in range(140)]
    (tmp_path / "x.item").write_text("\n".join(lines))
    rows = [f"u{u}\t{i}\t{t}" for u in range(20) for t, i in enumerate(rng.sample(range(140), 9))]
    (tmp_path / "x.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float"] + rows))
    dataset = data.load(str(tmp_path))
    for q in data.QueryBuilder(dataset).draw("train", 150):
        held_out = {x.item_id for x in dataset.sequences[q.user][-2:]}
        assert not held_out & ({c.id for c in q.candidates} | {h.id for h in q.history})
        assert not any(dataset.items[i].title in q.text for i in held_out)
    with pytest.raises(InputError, match="users with fields"):
        data.QueryBuilder(dataset, ["demographics"])
    (tmp_path / "x.user").write_text("user_id:token\tage:token\n" + "\n".join(f"u{u}\t{20 + u % 9}" for u in range(20)))
    demographics = data.QueryBuilder(data.load(str(tmp_path)), ["demographics"]).draw("test", 10)
    assert all(f"age {20 + int(q.user[1:]) % 9}" in q.text for q in demographics)


def test_near_misses_and_wrong_values_stand_among_the_candidates(toy):
    """Of two conditions a quarter of the negatives are drawn to meet just one; a misinformed request has an item with the value that it states."""
    shares = []
    for near in (0.0, 0.25):
        queries = [q for q in data.QueryBuilder(toy, ["explicit"], max_conditions=2, near_misses=near).draw("train", 150) if q.num_conditions == 2]
        met = [[sum(v in c.attributes[n] for n, v in q.conditions) for c in q.candidates] for q in queries]
        assert all(counts.count(2) == 1 for counts in met)
        shares.append(sum(counts.count(1) for counts in met) / (19 * len(met)))
    assert shares[0] < 0.6 * shares[1] and shares[1] - shares[0] > 0.12
    queries, there = data.QueryBuilder(toy, ["misinformed"], max_conditions=1, num_candidates=3).draw("train", 100), 0
    for q in queries:
        name = q.conditions[0][0]
        stated = q.text.split(f"({name} ")[1].split(",")[0]
        there += any(stated in c.attributes[name] for c in q.candidates)
    assert there > 80  # not, where the user had it; by chance a fifth


def test_conditions_are_neither_rare_nor_everywhere():
    items = [Item(str(n), f"Item {n}", {"colour": ("red",) if n < 3 else ("blue",) if n < 5 else ("green",) if n < 15 else ("grey",), "size": ("all",)})
             for n in range(30)]
    builder = data.QueryBuilder(data.Dataset("x", {x.id: x for x in items}, {}, {}, {}))
    assert {fact: len(ids) for fact, ids in builder.with_fact.items()} == {("colour", "red"): 3, ("colour", "green"): 10, ("colour", "grey"): 15}


def test_a_request_never_names_its_answer():
    """Real catalogues have items of one title: such a one is no clue to the other, nor a candidate beside it."""
    items = [Item(f"p{n}", "Nail Polish" if n % 2 else "nail  polish", {"brand": ("OPI",)}) for n in range(4)]
    items += [Item(f"q{n}", f"Top coat {n}", {"brand": ("OPI",)}) for n in range(2)] + [Item(f"r{n}", f"Brush {n}", {"brand": ("Sigma",)}) for n in range(30)]
    dataset = data.Dataset("x", {x.id: x for x in items}, {"u": [data.Interaction("r0"), data.Interaction("p0")]}, {"train": [("u", 1)]}, {})
    builder = data.QueryBuilder(dataset, ["implicit"], num_candidates=5)
    for q in builder.draw("train", 40):
        assert "olish" not in q.text and "Top coat" in q.text and sum("olish" in c.title for c in q.candidates) == 1


def test_templates_of_train_and_test_differ():
    for kind in data.KINDS:
        train_, test = data.TEMPLATES[kind], data.TEMPLATES[f"{kind} test"]
        assert len(set(train_) | set(test)) == len(train_) + len(test) >= 12 and len(train_) >= 8
        assert all(t.count("{}") == 1 for t in train_ + test)


def test_requests_follow_from_the_seed(toy, builder):
    again = data.QueryBuilder(toy, max_conditions=3).draw("train", 40)
    assert again == builder.draw("train", 40) and len({q.id for q in again}) == 40
    assert data.QueryBuilder(toy, seed=1).draw("train", 40) != again
    assert not {q.id for q in builder.draw("train", 40, start=7)} & {q.id for q in again}


def test_catalogues_that_cannot_serve_are_told_why():
    bare = data.Dataset("bare", {"a": Item("a", "A")}, {}, {}, {})
    with pytest.raises(InputError, match="neither"):
        data.QueryBuilder(bare)
    with pytest.raises(InputError, match="attributes"):
        data.QueryBuilder(bare, ["implicit"])
    with pytest.raises(InputError, match="choose from explicit"):
        data.QueryBuilder(bare, ["nosuch"])


# --- the answer ---


@pytest.mark.parametrize("text, want", [
    (r"so \boxed{Heat}", "Heat"), (r"\boxed{ a {b} c }!", "a {b} c"), (r"\boxed{A} or \boxed{B}", "A"), (r"\boxed{}", ""),
    ("no box", None), ("", None), (r"\boxed{never closed", None), (r"\boxed {Heat}", None), ("boxed{Heat}", None),
    ("\\boxed{Amélie\r\n}", "Amélie"),
])
def test_parse_boxed(text, want):
    assert rewards.parse_boxed(text) == want


def test_parsing_time_is_bounded():
    started = time.perf_counter()
    for text in ("\\boxed{" + "{" * 10**6, "\\boxed{" + "{}" * 500000 + "}", "\\boxed{" * 150000, "\\boxed{" + "A;b;" * 200000 + "}"):
        rewards.parse_answers(rewards.parse_boxed(text), movies("A", "b;c;d"))
    assert time.perf_counter() - started < 10


def test_answers_are_matched_exactly():
    items = movies("Alien", "Aliens", "Alien 3", "Me; Myself", "Myself", "")
    ids = lambda boxed: [a and a.id for a in rewards.parse_answers(boxed, items)]
    assert ids("Alien") == ["m0"] and ids(" aliens ") == ["m1"] and ids('"ALIEN  3"') == ["m2"]
    assert ids("Ali") == [None] and ids("") == [] and ids(None) == [] and ids(";;") == []
    assert ids("Me; Myself; Alien") == ["m3", "m0"] and ids("Myself; Me") == ["m4", None]
    assert ids("Alien; Alien; nonsense; Aliens") == ["m0", None, "m1"]
    assert ids("Alien, Aliens") == [None]


def test_item_text_wins_no_reward(tokenizer):
    """Titles that spell a box, break the line or leave braces open are defused where the prompt shows them."""
    items = movies("Good", r"Bad \boxed{Good}", "Line\n\\boxed{Good}", "Open {brace", "}{", r"Two \\boxed{Good}", r"Three \\\boxed{Good}")
    for item in items:
        shown = rewards.shown_title(item)
        assert "\\boxed" not in shown and "\n" not in shown and shown.count("{") == shown.count("}")
        (answer,) = rewards.parse_answers(rewards.parse_boxed(f"I like {shown}.\n\\boxed{{{shown}}}"), items)
        assert answer == item
    prompt = rerec.build_prompt(tokenizer, request(items, history=items), personalized=True)
    assert tokenizer.decode(prompt.prefix_ids + prompt.suffix_ids[0]).count("\\boxed") == 1  # the instruction's own


# --- the reward ---


GRAPH = {"m0": frozenset("abcd"), "m1": frozenset("ab"), "m2": frozenset("xy"), "m3": frozenset("bc")}


def test_query_alignment_by_hand():
    assert rewards.query_alignment("m1", ["m0"], GRAPH) == 0.5 and rewards.query_alignment("m0", ["m1"], GRAPH) == 1.0
    assert rewards.query_alignment("m2", ["m0"], GRAPH) == 0.0
    assert rewards.query_alignment("m1", ["m0", "m3"], GRAPH) == 0.5  # what the truths share is {b, c}
    for predicted, truths in (("no", ["m0"]), (None, ["m0"]), ("m0", ["no"]), ("m0", []), ("m0", ["m1", "m2"])):
        assert rewards.query_alignment(predicted, truths, GRAPH) == 0.0
    graph = rewards.attribute_graph([Item("i", "I", {"a": ("x", "y"), "b": ("x",)})])
    assert graph == {"i": {("a", "x"), ("a", "y"), ("b", "x")}}


def test_preference_alignment_by_hand():
    embeddings = {"m0": torch.tensor([3.0, 4.0]), "m1": torch.tensor([4.0, 3.0]), "m2": torch.tensor([-3.0, -4.0])}
    assert rewards.preference_alignment("m1", ["m0"], embeddings) == pytest.approx(24 / 25)
    assert rewards.preference_alignment("m0", ["m2"], embeddings) == pytest.approx(-1.0)
    assert rewards.preference_alignment("m0", ["m2", "m1", "no"], embeddings) == pytest.approx(24 / 25)  # the largest
    assert rewards.preference_alignment("no", ["m0"], embeddings) == rewards.preference_alignment(None, ["m0"], embeddings) == 0.0


def test_item_embeddings_see_training_alone_and_are_kept(toy, tmp_path, monkeypatch):
    """Items only test users chose have none; the second call trains nothing; another training set has another file."""
    seen = {x.item_id for u, s in toy.sequences.items() for x in s[:toy.train_length[u]]}
    first = rewards.item_embeddings(toy, tmp_path, dim=8)
    assert set(first) == seen and all(v.shape == (8,) for v in first.values())
    before = next(tmp_path.iterdir())
    with monkeypatch.context() as m:
        m.setattr(rewards, "fit_lightgcn", None)
        again = rewards.item_embeddings(toy, tmp_path, dim=8)
    assert all(torch.equal(first[i], again[i]) for i in seen)
    before.write_bytes(b"broken")
    rewards.item_embeddings(toy, tmp_path, dim=8)
    rewards.item_embeddings(toy, tmp_path, dim=8, seed=1)
    assert len(list(tmp_path.iterdir())) == 2
    assert rewards.item_embeddings(data.Dataset("bare", {"a": Item("a", "A")}, {}, {}, {}), tmp_path) == {}


def test_reward_by_hand():
    query = request(movies("Heat", "Ronin", "Up"), ("m0",))
    embeddings = {f"m{n}": torch.tensor([1.0, float(n)]) for n in range(3)}
    reward = lambda text, **s: rerec.score_response(text, query, GRAPH, embeddings, (0.01, 0.02), **s).reward
    assert reward(r"\boxed{Heat}") == pytest.approx(1 + 0.05 + 0.01 + 0.02)
    assert reward(r"\boxed{Ronin}") == pytest.approx(0.05 + 0.01 * 0.5 + 0.02 / 2**0.5)
    assert reward(r"\boxed{Nothing known}") == pytest.approx(0.05) and reward(r"\boxed{}") == pytest.approx(0.05)
    assert reward("Heat") == reward("") == pytest.approx(-0.55)
    # three answers: the truth second, discount 1/log2(3); and two truths of which one is found first
    assert reward(r"\boxed{Up; Heat; Ronin}", list_length=3) == pytest.approx(1 / math.log2(3) + 0.05 + 0.02 / 5**0.5)
    two = replace(query, truths=("m0", "m1"))
    judged = rerec.score_response(r"\boxed{Heat; Up}", two, weights=(0, 0), list_length=2)
    assert judged.ndcg == pytest.approx(1 / (1 + 1 / math.log2(3))) and judged.correct and judged.answers == ("m0", "m2")
    assert rerec.score_response(r"\boxed{Up; Heat}", query, weights=(0, 0)).reward == pytest.approx(0.05)  # K = 1: the first alone


# --- reasoning-aware advantages ---


def characters(text):
    return [(n, n + 1) for n in range(len(text))]


def penalised(text, title, reward=1.0, correct=False, penalty=0.3, others=()):
    """The characters whose reward is lower, as text."""
    values = rerec.segment_rewards(text, characters(text), reward, title, correct, penalty, others)
    lower = reward - penalty * abs(reward)
    assert all(v == pytest.approx(reward) or v == pytest.approx(lower) for v in values)
    return "".join(c for c, v in zip(text, values) if v < reward)


@pytest.mark.parametrize("text, title, want", [
    ("A good one.\nHeat fits.\n\\boxed{Heat}", "Heat", "Heat fits."),
    ("Heat fits.\n\nso \\boxed{Heat}, for Heat", "Heat", "Heat fits."),  # the box's own line is exempt
    ("Heat it is.\r\nUp is not.\r\n\\boxed{Heat}", "Heat", "Heat it is."),
    ("Fjord Amélie 映画 fits.\nelse\n\\boxed{Amélie 映画}", "Amélie 映画", "Fjord Amélie 映画 fits."),
    ("heat (1995) fits\n\\boxed{Heat}", "Heat", "heat (1995) fits"),
    ("Heat fits\nHeat (1995) fits\n\\boxed{Heat (1995)}", "Heat (1995)", "Heat fitsHeat (1995) fits"),
    ("Heat (1986) fits\n\\boxed{Heat (1995)}", "Heat (1995)", ""),
    ("Heated, Wheat\nbut Heat.\n\\boxed{Heat}", "Heat", "but Heat."),
    ("Heat\n\\boxed{Heat}\nHeat again\n\\boxed{Up} Heat", "Heat", "HeatHeat again"),  # several boxes: both lines exempt
    ("Heat fits, no box", "", ""), ("", "Heat", ""), ("\n\n", "Heat", ""), ("Heat\n\\boxed{\nHeat}", "Heat", "Heat"),
])
def test_segment_rewards_by_hand(text, title, want):
    assert penalised(text, title) == want
    assert penalised(text, title, correct=True) == penalised(text, title, penalty=0.0) == ""


def test_titles_that_contain_one_another():
    titles = ["Alien", "Alien 3", "Aliens"]
    text = "Alien 3 fits.\nAliens too.\nAlien fits.\n\\boxed{Alien}"
    assert penalised(text, "Alien", others=titles) == "Alien fits."
    assert penalised(text, "Alien 3", others=titles) == "Alien 3 fits."
    assert penalised("Alien 3 and Alien\n\\boxed{Alien}", "Alien", others=titles) == "Alien 3 and Alien"
    dated = ["Alien (1979)", "Alien 3 (1992)", "Aliens (1986)", "Alien (2003)"]  # which are named without their year, too
    text = "Alien 3 fits.\nAlien 3 (1992) too.\nAlien fits.\nAlien (2003), no.\n\\boxed{Alien (1979)}"
    assert penalised(text, "Alien (1979)", others=dated) == "Alien fits."
    assert penalised(text, "Alien 3 (1992)", others=dated) == "Alien 3 fits.Alien 3 (1992) too."
    for text, title, want in (("Heat (1995) fits", "Heat (1995)", "Heat (1995) fits"), ("Heat fits", "Heat (1995)", ""), ("Heat fits", "Heat", "Heat fits"),
                              ("Heat (1995) fits", "Heat", "")):
        assert penalised(text, title, others=["Heat", "Heat (1995)"]) == want


def test_a_penalty_is_never_a_gift():
    values = rerec.segment_rewards("Heat\nno", characters("Heat\nno"), -0.5, "Heat", False, 0.3)
    assert values[:4] == [pytest.approx(-0.65)] * 4 and values[5:] == [-0.5] * 2


def test_a_token_across_a_line_end_belongs_to_the_paragraph_it_touches():
    text, offsets = "Heat.\nUp\n\\boxed{Heat}", [(0, 4), (4, 6), (6, 8), (8, 15), (15, 21), (21, 21)]
    values = rerec.segment_rewards(text, offsets, 1.0, "Heat", False, 0.3)
    assert values == [pytest.approx(v) for v in (0.7, 0.7, 1.0, 1.0, 1.0, 1.0)]


TEXTS = ["plain words\nand lines\r\n\\boxed{x}", "Amélie 映画 🎬🎬 naïve\nЖук", "  spaces  \t\n\n", "", "Avelle almond cream \u200d👩‍👩‍👧 e\u0301"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_offsets_cover_the_text(tokenizer, text):
    """Whatever the tokenisation (here also a byte a token), the spans lie in order, cover the text, and hold what was said."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    single = [i for c in text for i in tokenizer(c, add_special_tokens=False).input_ids]
    for ids in (ids, single):
        got, offsets = rerec.token_offsets(tokenizer, ids + [tokenizer.eos_token_id])
        assert got == tokenizer.decode(ids) == text and len(offsets) == len(ids) + 1 and offsets[-1] == (len(text), len(text))
        end = 0
        for i, (a, b) in zip(ids, offsets):
            assert a == end or (a, b) == previous  # the next span, or the same character as the token before
            end, previous = b, (a, b)
            piece = tokenizer.decode([i])
            assert "\ufffd" in piece or piece == text[a:b]
        assert end == len(text)


def test_token_offsets_of_broken_bytes_and_long_texts(tokenizer):
    torch.manual_seed(0)
    for n in (1, 3, 50, 400):
        ids = torch.randint(3, len(tokenizer), (n,)).tolist()  # most byte sequences are no text
        text, offsets = rerec.token_offsets(tokenizer, ids)
        assert len(offsets) == n and offsets[-1][1] == len(text) and all(a <= b for a, b in offsets)
        assert all(y[0] in x for x, y in zip(offsets, offsets[1:]))  # each begins where the last began or ended


def test_without_a_right_answer_small_rewards_stay_small():
    """Responses that differ in 0.002 of alignment: as strong as right against wrong as published, a hundredth of it with a floor."""
    mask, r = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[0.05] * 3, [0.052] * 3])
    assert rerec.group_advantages(r, mask).abs().max() > 0.99 and rerec.group_advantages(r, mask, 0.2).abs().max() == pytest.approx(0.005, rel=1e-3)
    right = torch.tensor([[0.05] * 3, [1.05] * 3])
    assert torch.equal(rerec.group_advantages(right, mask, 0.2), rerec.group_advantages(right, mask))


def test_group_advantages_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(5, 9, generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 0, 7])[:, None]
    values = [r[i, t].item() for i in range(5) for t in range(9) if mask[i, t]]
    mean = sum(values) / len(values)
    std = (sum((v - mean)**2 for v in values) / len(values))**0.5
    want = torch.tensor([[(r[i, t].item() - mean) / (std + 1e-6) if mask[i, t] else 0.0 for t in range(9)] for i in range(5)])
    got = rerec.group_advantages(r, mask)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(rerec.group_advantages(torch.nn.functional.pad(r, (0, 3), value=9.0), torch.nn.functional.pad(mask, (0, 3))),
                               torch.nn.functional.pad(got, (0, 3)))  # padding changes nothing
    torch.testing.assert_close(rerec.group_advantages(r, mask, 2 * std), want * (std + 1e-6) / (2 * std + 1e-6), atol=1e-6, rtol=0)
    assert torch.equal(rerec.group_advantages(r, mask, std / 2), got)
    assert not rerec.group_advantages(torch.full((4, 3), 1.07), torch.ones(4, 3, dtype=torch.bool)).any()
    assert not rerec.group_advantages(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).any()


# --- the curriculum ---


def play(queue, difficulty):
    """One epoch: its batches in order, every query recorded with the difficulty given."""
    epoch, batches = queue.epoch, []
    while True:
        batches.append(queue.next_batch())
        for i in batches[-1]:
            queue.record(i, [1 - difficulty[i]])
        if queue.position == len(queue.pool):
            return batches


def test_curriculum_by_hand():
    queue = rerec.CurriculumQueue(list("abcdefg"), 3, tau=0.1)
    first = dict(zip("abcdefg", (0.9, 0.0, 0.5, 0.05, 1.0, 0.2, 0.5)))
    assert play(queue, first) == [list("abc"), list("def"), ["g"]]  # file order; the last batch is kept
    assert play(queue, first | {"f": 0.09}) == [list("fcg"), list("ae")]  # b, d dropped; the rest by difficulty, ties as given
    assert queue.statistics() == {"epoch": 1, "pool": 5, "dropped": 2, "difficulty": pytest.approx((0.9 + 0.5 + 1 + 0.09 + 0.5) / 5)}
    assert play(queue, dict.fromkeys("abcdefg", 0.0)) == [list("cga"), ["e"]]  # f gone too: drops accumulate
    assert play(queue, first) == [list("abc"), list("egd"), ["f"]] and queue.dropped == set()  # none would be left: all return
    queue = rerec.CurriculumQueue(list("abc"), 2, tau=0.5)
    queue.next_batch(), queue.next_batch()
    queue.record("a", [1.0, 1.0]), queue.record("b", [1.0, 0.5, 0.0]), queue.record("c", [1.0])
    assert queue.difficulty["b"] == pytest.approx(0.5)
    assert queue.next_batch() == ["a", "c"] and queue.dropped == set()  # one would be left, less than a batch: all return
    with pytest.raises(ValueError, match="unique"):
        rerec.CurriculumQueue(["a", "a"], 1)


def test_curriculum_goes_on_where_it_was_saved():
    def run(steps, save_at=None):
        queue, rng, batches = rerec.CurriculumQueue([str(n) for n in range(11)], 4), random.Random(0), []
        for step in range(steps):
            if step == save_at:
                state = json.loads(json.dumps(queue.state_dict()))
                queue = rerec.CurriculumQueue([str(n) for n in range(11)], 4)
                queue.load_state_dict(state)
            batches.append(queue.next_batch())
            for i in batches[-1]:
                queue.record(i, [float(rng.random() < 0.7) for _ in range(3)])
        return batches
    for save_at in range(12):
        assert run(12, save_at) == run(12)
    with pytest.raises(ValueError, match="not here"):
        rerec.CurriculumQueue(["a"], 1).load_state_dict(rerec.CurriculumQueue(["b"], 1).state_dict())


def test_without_curriculum_every_epoch_holds_all_in_another_order():
    queue = rerec.CurriculumQueue(list(range(50)), 8, enabled=False, seed=3)
    epochs = [sum(play(queue, dict.fromkeys(range(50), 0.0)), []) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50)) and epochs[0] != epochs[1] != list(range(50))


# --- rollout and update ---


@pytest.fixture(scope="module")
def rollout(model_and_tokenizer, builder):
    """Three requests, four responses each, of unequal lengths, judged as if some had answered."""
    model, tokenizer = model_and_tokenizer
    queries = builder.draw("train", 3)
    torch.manual_seed(0)
    rollout = rerec.generate(model, tokenizer, queries, 4, policy.Sampling(7))
    for n, q in enumerate(queries):
        right = next(c for c in q.candidates if c.id in q.truths)
        wrong = next(c for c in q.candidates if c.id not in q.truths)
        rollout.responses[4 * n] = tokenizer(f"Sure.\n\\boxed{{{right.title}}}").input_ids + [tokenizer.eos_token_id]
        rollout.responses[4 * n + 1] = tokenizer(f"{wrong.title} fits.\n\\boxed{{{wrong.title}}}").input_ids
    rerec.judge(tokenizer, rollout, rewards.attribute_graph(builder.dataset.items.values()), {}, (0.01, 0.01), 0.3)
    return rerec.score(model, rollout)


def copy_of(rollout, **changes):
    return replace(rollout, **changes)


def gradient(model, rollout, **settings):
    model.zero_grad()
    metrics = rerec.backward(model, rollout, **settings)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), metrics


def test_judging_a_rollout(rollout):
    assert [j.correct for j in rollout.judged[::4]] == [True] * 3 and not rollout.judged[1].correct and rollout.judged[1].boxed
    masks = torch.arange(rollout.advantages.shape[1]) < torch.tensor([len(r) for r in rollout.responses])[:, None]
    for group, mask in zip(rollout.advantages.split(4), masks.split(4)):
        assert group[mask].mean().abs() < 1e-5 and group[mask].std(correction=0) == pytest.approx(1.0, abs=1e-4)
        assert not group[~mask].any()
    wrong = rollout.advantages[1]
    assert wrong[0] < wrong[masks[1]][-1]  # its first paragraph names the wrong item, its box is exempt


@pytest.mark.parametrize("kl_coef, temperature", [(0.0, 1.0), (0.3, 1.0), (0.3, 0.7)])
def test_update_is_the_gradient_of_the_written_objective(model, rollout, kl_coef, temperature):
    """Off policy, against one row at a time in one graph; micro-batches and prefix sharing change nothing."""
    generator = torch.Generator().manual_seed(1)
    base = policy.all_logprobs(model, rollout.prefixes, rollout.owner, rollout.suffixes, rollout.responses, temperature)[0]
    moved = copy_of(rollout, logprobs=base + 0.3 * torch.randn(base.shape, generator=generator),
                    ref_logprobs=base + 0.3 * torch.randn(base.shape, generator=generator))
    loss, tokens, clipped = 0.0, sum(map(len, rollout.responses)), 0
    for n, response in enumerate(rollout.responses):
        start = rollout.prefixes[rollout.owner[n]] + rollout.suffixes[n]
        logits = model(torch.tensor([start + response])).logits[0, len(start) - 1:-1] / temperature
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        T, A = len(response), rollout.advantages[n, :len(response)]
        ratio = (logprobs - moved.logprobs[n, :T]).exp()
        clipped += ((ratio < 0.8) | (ratio > 1.2)).sum().item()
        loss = loss - torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).sum() / tokens
        gap = moved.ref_logprobs[n, :T] - logprobs
        loss = loss + kl_coef * (gap.exp() - gap - 1).sum() / tokens
    model.zero_grad()
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    for micro_batch in (1, 5, 100):
        for share in (True, False):
            got, metrics = gradient(model, moved, kl_coef=kl_coef, temperature=temperature, micro_batch=micro_batch, share_prefix=share)
            assert (got - want).norm() / want.norm() < 1e-5
            assert metrics["token_loss"] + kl_coef * metrics["kl"] == pytest.approx(loss.item(), abs=1e-5)
            assert metrics["clipped"] == pytest.approx(clipped / tokens) and clipped


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_a_first_update_needs_no_scoring(model, rollout, kl_coef):
    """An unscored rollout takes its old log-probabilities from the update's own pass: same gradient, metrics and log-probabilities."""
    scored = copy_of(rollout, ref_logprobs=rollout.logprobs + 0.1)
    fresh = copy_of(scored, logprobs=None)
    want, metrics = gradient(model, scored, kl_coef=kl_coef)
    for micro_batch in (1, 5, 100):
        fresh.logprobs = None
        got, found = gradient(model, fresh, kl_coef=kl_coef, micro_batch=micro_batch)
        assert (got - want).norm() / want.norm() < 1e-5 and found == pytest.approx(metrics, abs=1e-5)
        alive = [n for n, o in enumerate(fresh.owner) if kl_coef or fresh.advantages[o * 4:o * 4 + 4].any()]
        torch.testing.assert_close(fresh.logprobs[alive], rollout.logprobs[alive], atol=1e-5, rtol=1e-5)
    assert found["entropy"] == pytest.approx(-sum(rollout.logprobs[n].sum().item() for n in alive) / sum(len(fresh.responses[n]) for n in alive), abs=1e-4)


def test_dead_groups_are_skipped_and_padding_does_not_count(model, rollout):
    dead = rollout.advantages.clone()
    dead[4:8] = 0.0
    some = copy_of(rollout, advantages=dead)
    got, metrics = gradient(model, some)
    assert metrics["dead_groups"] == 1
    pad = lambda x: torch.nn.functional.pad(x, (0, 5))
    wide = copy_of(some, advantages=pad(dead), logprobs=pad(rollout.logprobs))
    torch.testing.assert_close(gradient(model, wide)[0], got, atol=1e-7, rtol=1e-5)
    assert gradient(model, rollout)[1]["clipped"] == 0.0  # on policy


def test_the_group_shares_its_whole_prompt(model, tokenizer, builder):
    """Greedy responses are the same with and without sharing; the suffix is the template's tail alone."""
    queries = builder.draw("test", 3)
    answers = [rerec.generate(model, tokenizer, queries, 2, policy.Sampling(6, greedy=True, share_prefix=s)).responses for s in (True, False)]
    assert answers[0] == answers[1]
    suffix = rerec.build_prompt(tokenizer, queries[0]).suffix_ids
    assert suffix == rerec.build_prompt(tokenizer, queries[1]).suffix_ids and len(suffix) == 1


def test_template_traces_are_true_and_in_format(builder):
    """A claim about any candidate, then one a condition, about an item that meets it and those before, where some item does. All
    are true. The answer is the first item named, three times in five, or the last."""
    rng = random.Random(0)
    right = first_named = 0
    for q in builder.draw("train", 200):
        trace = rerec.template_trace(q, rng)
        *claims, _ = trace.split("\n")
        items = [next(c for c in q.candidates if claim.endswith(c.title)) for claim in claims]
        said = [tuple(claim.removesuffix(item.title).split()) for claim, item in zip(claims, items)]
        assert all(fact in data.facts_of(item) for fact, item in zip(said, items)) and said[1:] == list(q.conditions)
        for n in range(1, len(claims)):
            meets = [c for c in q.candidates if set(said[1:n + 1]) <= set(data.facts_of(c))]
            assert items[n] in meets or not meets
        judged = rerec.score_response(trace, q, weights=(0, 0))
        assert judged.boxed and judged.title in (items[0].title, items[-1].title)
        right += judged.correct
        first_named += judged.title == items[0].title
        assert len(rerec.score_response(rerec.template_trace(q, rng, 4), q, weights=(0, 0), list_length=4).answers) == 4
    assert 25 < right < 100 and 100 < first_named < 150  # hasty: sometimes right


def test_a_request_spells_no_separator(model, tokenizer, monkeypatch):
    """Whatever a request holds, the prompt for open-ended answers has the instruction's [SEP] alone."""
    seen = []
    monkeypatch.setattr(policy, "sample_rows", lambda m, t, prefixes, owner, suffixes, s: (seen.extend(prefixes), ([[]] * len(owner), None))[1])
    rerec.answer_open_ended(model, tokenizer, [replace(request([]), text=text) for text in ("a [SEP] b", "a [[SEP]] b")], None)
    assert [tokenizer.decode(ids).count("[SEP]") for ids in seen] == [1, 1]


def test_the_teacher_claims_nothing_that_no_candidate_shows():
    """RecBench+: who stars in a film stands in a request and not in the catalogue."""
    items = [Item(f"m{n}", f"Film {n}", {"genre": ("War",) if n < 3 else ("Western",)}) for n in range(8)]
    query = request(items, conditions=(("starring", "Tom Hanks"), ("genre", "War")))
    for seed in range(20):
        claims = rerec.template_trace(query, random.Random(seed)).split("\n")[:-1]
        assert len(claims) == 2 and claims[0].startswith("genre W") and claims[1] in {f"genre War Film {n}" for n in range(3)}


# --- metrics and command lines ---


def test_metrics_by_hand():
    assert rerec.query_metrics(["a"], ("a",)) == {"accuracy": 1.0, "ndcg@10": 1.0, "format_rate": 1.0, "length": 0.0}
    assert rerec.query_metrics([], ("a",), False, 7) == {"accuracy": 0.0, "ndcg@10": 0.0, "format_rate": 0.0, "length": 7.0}
    assert rerec.query_metrics(["x", "a"], ("a",))["ndcg@10"] == pytest.approx(1 / math.log2(3))
    assert rerec.query_metrics(["a"], ("a", "b"))["ndcg@10"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    rows = [rerec.query_metrics([a], ("a",)) for a in "aabb"]
    queries = [replace(request(movies("a")), id=f"{k}{n}{m}", kind=k, num_conditions=n) for m, (k, n) in enumerate((("implicit", 1), ("explicit", 2), ("explicit", 1), ("explicit", 1)))]
    report = evaluation.summarise_queries(queries, rows)
    assert report["accuracy"]["mean"] == 0.5 and report["by_kind"]["explicit"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    ours = evaluation.summarise_queries([replace(q, user="u") for q in queries], rows)["accuracy"]  # one user's are drawn together
    assert ours["low"] == ours["high"] == 0.5 and report["accuracy"]["low"] < 0.5
    assert report["by_conditions"]["2"]["accuracy"]["mean"] == 1.0 and report["by_kind"]["implicit"]["num_queries"] == 1


def test_random_guesses_find_one_in_twenty(builder):
    rows = rerec.random_metrics(builder.draw("test", 100) * 10)
    assert 0.03 < sum(r["accuracy"] for r in rows) / len(rows) < 0.07


def run(script, *flags, code=0):
    out = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True, timeout=300,
                         env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert out.returncode == code, out.stdout + out.stderr
    return out


SMALL = ["--method", "rerec", "--sft-steps", "2", "--steps", "3", "--batch-lists", "4", "--group-size", "2", "--num-queries", "6",
         "--eval-lists", "8", "--max-new-tokens", "10"]


def test_a_run_and_its_evaluation(tmp_path):
    folder, cache = tmp_path / "r", tmp_path / "cache"
    printed = run("train.py", *SMALL, "--out", folder, "--cache-dir", cache).stdout
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in rows] == ["sft"] * 2 + ["rl"] * 3
    assert [(r["queries"], r["epoch"]) for r in rows[2:]] == [(4, 0), (2, 0), (4, 1)] and all(0 <= r["difficulty"] <= 1 for r in rows[2:])
    report = json.loads((folder / "eval.json").read_text())
    assert list(report["systems"]) == ["random", "sft", "rl"]
    for system in report["systems"].values():
        for part in (system, *system["by_kind"].values(), *system["by_conditions"].values()):
            assert all(part[m]["low"] <= part[m]["mean"] <= part[m]["high"] for m in ("accuracy", "ndcg@10", "format_rate"))
        assert set(system["by_kind"]) == {"explicit", "implicit", "misinformed", "interest"}
    assert "misinformed" in printed and "rl - sft" in printed
    assert len(list(cache.glob("lightgcn-*.safetensors"))) == 1
    state = json.loads((folder / "checkpoint" / "curriculum.json").read_text())
    assert state["epoch"] == 1 and len(state["difficulty"]) == 6
    out = run("eval.py", "--run", folder, "--explain", 2).stdout
    assert json.loads((folder / "eval.json").read_text()) == report and out.count("=== request") == 2
    assert "--baselines, --slices: about lists" in run("eval.py", "--run", folder, "--baselines", "--slices", code=2).stderr


def test_plain_grpo_and_lists_of_answers(tmp_path):
    flags = ["--no-raae", "--no-curriculum", "--reward-weights", "0,0", "--kl-coef", "0", "--list-length", "3", "--personalized",
             "--query-kinds", "explicit,interest", "--no-share-prefix"]
    run("train.py", *SMALL, "--out", tmp_path / "r", *flags)
    report = json.loads((tmp_path / "r" / "eval.json").read_text())
    assert set(report["systems"]["rl"]["by_kind"]) == {"explicit", "interest"}
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["dropped"] == 0 and r["query_alignment"] == r["preference_alignment"] == r["kl"] == 0.0 for r in rows if r["stage"] == "rl")


@pytest.mark.parametrize("flags, words", [
    (["--tau", "0.2"], "--method rerec"),
    (["--method", "rerec", "--credit", "list"], "--method r2rank"),
    (["--method", "rerec", "--no-reasoning"], "--method r2rank"),
    (["--method", "rerec", "--no-raae", "--raae-penalty", "0.1"], "drop one"),
    (["--method", "rerec", "--no-curriculum", "--tau", "0.1"], "drop one"),
    (["--method", "rerec", "--reward-weights", "1"], "two numbers"),
    (["--method", "rerec", "--reward-weights", "nan,1"], "two numbers"),
    (["--method", "rerec", "--reward-weights=-1,1"], "two numbers"),
    (["--method", "rerec", "--reward-weights", "x"], "two numbers"),
    (["--method", "rerec", "--group-size", "1"], "at least 2"),
    (["--method", "rerec", "--list-length", "21"], "only 20 candidates"),
    (["--method", "rerec", "--query-kinds", "demographics"], "users with fields"),
    (["--method", "rerec", "--query-kinds", "other"], "choose from"),
    (["--method", "rerec", "--teacher", "Qwen2.5-7B"], "template"),
])
def test_contradictions_are_refused(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "r"), *flags])
    with pytest.raises(SystemExit) as stopped:
        evaluation.run_main(train.main)
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "r").exists()
