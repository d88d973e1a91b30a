"""The cold start: template teachers, lessons from them and from files, and how tiny models start."""

import itertools
import json
import random
import re

import pytest
import torch

import data
import policy
import r2r
import rerec
from data import InputError, Item, attribute_pairs
from extras import tasks
from extras.queries import QueryBuilder
from extras.toy import (ATTRIBUTES, add_words, answer_trace, features, judge_trace, look_up_exercise,
                        relevant_lookups, telling_words)
from steps import settings
from test_data import INTER, load, write

def test_a_trace_about_a_candidate_by_hand():
    past = [Item(b + k, "", {"brand": (b,), "kind": ("All", k)}) for b, k in ("Ax", "Ay", "Bx")]
    liked, other = (Item("c", "", {"brand": (b,), "kind": path})
                    for b, path in (("A", ("All", "y")), ("C", ("None", "z"))))
    traces = {judge_trace(past, liked, random.Random(n)) for n in range(40)}
    claims = [claim for k in ("kind All 3", "kind y 1") for claim in itertools.permutations(("brand A 2", k))]
    assert traces == {(f"In the history: {a}, {b}.\n<answer>yes</answer>", True) for a, b in claims}
    assert not judge_trace(past, other, random.Random(0))[1]
    assert judge_trace(past, other, random.Random(0), reasoning=False) == ("<answer>no</answer>", False)

def test_features_are_attributes_as_shown_and_words_that_tell_items_apart(toy):
    items = {n: Item(n, title, {"kind": ("All", "Nails", "Polish")}) for n, title in (
        ("a", "OPI red lacquer 5 oz"), ("b", "Red lipstick"), *((f"c{n}", f"thing {n}") for n in range(40)))}
    words = telling_words(data.Dataset("shop", items))
    assert words == {"red"}  # `thing` is everywhere, `lacquer` is met once
    assert features(items["a"], words) == [("kind", "Nails"), ("kind", "Polish"), ("word", "red")]
    assert not telling_words(toy)

def test_the_teacher_looks_up_at_random_and_truly(toy):
    """Two of four attributes, each as often; the share of those that matter is what RL shall raise."""
    rng, texts = random.Random(0), []
    for e in toy.examples("train", 30):
        for c in e.candidates:
            texts.append(judge_trace(e.history, c, rng)[0])
            looked_up_truly(texts[-1], e.history, c)
    counts = [sum(f"{name} " in text for text in texts) for name in ATTRIBUTES]
    assert sum(counts) == 1200 and min(counts) > 250 and 0.47 < relevant_lookups(texts) < 0.53
    assert relevant_lookups(["kind soap 1, brand Fjord 0", "scent mint"]) == 2 / 3

def looked_up_truly(text, history, candidate):
    for name, value, n in re.findall(r"(\w+) (\w+) (\d+)", text):
        assert candidate.attributes[name][-1] == value
        assert sum(value in h.attributes[name] for h in history) == int(n)

def claims(lines, candidates):
    """[pairs], [items] of lines such as `brand Avelle TITLE`, all of them true."""
    items = [next(c for c in candidates if line.endswith(f" {c.title}")) for line in lines]
    pairs = [tuple(line.removesuffix(f" {x.title}").split()) for line, x in zip(lines, items)]
    assert all(pair in attribute_pairs(item) for pair, item in zip(pairs, items))
    return pairs, items

def test_traces_about_a_request_are_true_and_in_format(toy):
    """First of any candidate, then for each condition of one that meets it and those before."""
    rng, right, first_named = random.Random(0), 0, 0
    for q in QueryBuilder(toy, max_conditions=3).draw("train", 200):
        *lines, box = answer_trace(q, rng).split("\n")
        pairs, items = claims(lines, q.candidates)
        assert pairs[1:] == list(q.conditions)
        for n in range(1, len(pairs)):
            meeting = [c for c in q.candidates if {*pairs[1:n + 1]} <= {*attribute_pairs(c)}]
            assert items[n] in meeting or not meeting
        judged = rerec.score_response(box, q)
        assert judged.boxed and judged.title in (items[0].title, items[-1].title)
        right, first_named = right + judged.correct, first_named + (judged.title == items[0].title)
        assert len(claims(look_up_exercise(q, rng).split("\n"), q.candidates)[0]) == 16
    assert 25 < right < 100 < first_named < 150  # three times in five the first: it is seldom right

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A RecBole folder with times and ratings: 12 users, 8 of 40 items each."""
    rng, item = random.Random(0), "item_id:token\ttitle:token_seq\tcolour:token\n"
    item += "".join(f"{i}\tthing {i}\tc{i % 4}\n" for i in range(40))
    rows = [f"u{u}\t{i}\t{i % 5}\t{10**9 + 10**6 * t + u}\n"
            for u in range(12) for t, i in enumerate(rng.sample(range(40), 8))]
    return load(write(tmp_path_factory.mktemp("shop"), item, inter=INTER + "".join(rows)))

def test_lessons_are_one_yes_to_two_no_and_never_of_a_held_out_pair(tokenizer, shop, monkeypatch):
    """The prompts are RL's, of the list's history with times and ratings."""
    lists, original = [], data.Dataset.example
    monkeypatch.setattr(data.Dataset, "example", lambda *a: lists.append(original(*a)) or lists[-1])
    lessons = tasks.template_lessons(shop, tokenizer, settings(num_candidates=9, history_length=3))
    assert lessons(1) == lessons(1) != lessons(2)  # a step has its lessons, whatever came before
    for prompt, texts in lessons(3):
        answers = [r2r.parse_answer(text) for text in texts]
        assert answers.count(False) == 2 * answers.count(True) in (2, 4, 6)
        every = [(e, r2r.build_prompt(tokenizer, e.history, e.candidates)) for e in lists]
        e, whole = next(pair for pair in every if pair[1].prefix_ids == prompt.prefix_ids)
        for suffix, text in zip(prompt.suffix_ids, texts, strict=True):
            looked_up_truly(text, e.history, e.candidates[whole.suffix_ids.index(suffix)])
    for e in lists:
        held_out = {x.item_id for x in shop.sequences[e.user][-2:]}
        assert not held_out & {x.id for x in e.history + e.candidates} and all(x.ago for x in e.history)

def test_lessons_of_a_file_have_the_prompts_of_rl(tokenizer, shop, tmp_path):
    """A byte-order mark, what only looks like a line's end, blank lines, labels as text, ids as numbers."""
    path, args, wanted, lines = tmp_path / "traces.jsonl", settings(history_length=3), {}, []
    for target in [t for t in shop.targets("train") if t[1] > 2][:2]:
        e = shop.example(target, 3, 3)
        for item, label, word in zip(e.candidates, ("1", 0, "0"), ("yes", "no", "no")):
            trace = f"A\u2028line\u0085of {e.user} on {item.id}: <answer>{word}</answer>"
            wanted[trace] = r2r.build_prompt(tokenizer, e.history, [item])
            lines.append({"user": e.user, "history": [int(x.id) for x in e.history],
                          "candidate": int(item.id), "label": label, "trace": trace})
    text = "\r\n".join(json.dumps(x, ensure_ascii=False) for x in lines)
    path.write_bytes(f"\ufeff{text}\n\n  \n".encode())
    found = tasks.recorded_lessons(shop, tokenizer, path, args)(1)
    assert {text: prompt for prompt, (text,) in found} == wanted and len(found) == 6
    for name, value in (("label", 2), ("candidate", "x"), ("trace", 5), ("user", "x"), ("history", ["x"])):
        path.write_text("\n".join(map(json.dumps, [lines[0], lines[0] | {name: value}])))
        with pytest.raises(InputError, match="traces.jsonl line 2"):
            tasks.recorded_lessons(shop, tokenizer, path, args)
    path.write_text(json.dumps(lines[1] | {"trace": "<answer>yes</answer>"}))  # wrong: it teaches nothing
    with pytest.raises(InputError, match="1 yes to 2 no"):
        tasks.recorded_lessons(shop, tokenizer, path, args)

def test_lessons_on_requests_are_on_others_than_those_of_rl(tokenizer, toy):
    builder = QueryBuilder(toy, max_conditions=2)
    trained = [rerec.build_prompt(tokenizer, q).prefix_ids for q in builder.draw("train", 400)]
    lessons = tasks.query_lessons(builder, tokenizer, settings("rerec"))
    assert not any(prompt.prefix_ids in trained for step in (1, 2) for prompt, _ in lessons(step))

def test_added_words_are_one_token_each_and_alike_to_their_pieces(toy):
    """n nearly orthogonal pieces / sqrt(n), half a random vector: a cosine of 1 / sqrt(1.25 n) with each."""
    (model, tokenizer), (_, plain) = (policy.load("tiny", texts=toy.texts()) for _ in range(2))
    titles = [f" {x.title}" for x in toy.items.values()]
    add_words(model, tokenizer, titles)
    ids = tokenizer.convert_tokens_to_ids(titles)
    assert ids[7] in tokenizer(f"-{titles[7]}!").input_ids
    weight = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    gaps = torch.stack([weight[i] @ weight[piece] - (1.25 * len(pieces)) ** -0.5
                        for i, pieces in zip(ids, plain(titles).input_ids) for piece in pieces])
    assert gaps.mean().abs() < 0.02 and gaps.abs().max() < 0.3
