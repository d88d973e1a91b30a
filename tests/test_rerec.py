"""ReRec: prompts, rewards, advantages and curriculum, by hand and by brute force."""

import json
import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rerec
from data import Item, Query

def request(*titles, **changes):
    """The first of the titles is right."""
    movies = [Item(f"m{n}", title) for n, title in enumerate(titles)]
    return Query("q", "Something good, please.", "explicit", 1, movies, ("m0",), **changes)

@pytest.mark.parametrize("personalized", [True, False])
def test_a_prompt_shows_request_candidates_and_where_asked_history(tokenizer, personalized):
    """Its responses share all of it but the template's end. Nothing in it but the instruction spells a box,
    since quoting that would be an answer; titles come as the answer's reader takes them."""
    box = r"\\boxed{Up}"
    past = [Item("h", "Heat {x}", ago="3 days ago", rating=4.0), Item("g", box, {"brand": (box,)})]
    query = replace(request("Up", f"A {box}", history=past), text=f"Is {box} right?")
    prompt = rerec.build_prompt(tokenizer, query, personalized)
    (suffix,), text = prompt.suffix_ids, tokenizer.decode(prompt.prefix_ids)
    assert tokenizer.decode(suffix) == "<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith("Request: Is boxed{Up} right?\nCandidates:\n- Up\n- A boxed(Up)\n")
    assert text.count("- 3 days ago: Heat (x) (rated 4)") == personalized and text.count("\\boxed") == 1

@pytest.mark.parametrize("text, wanted", [
    (r"\boxed{Heat}", 1 + 0.05 + 0.01 + 0.02), (r"\boxed{Ronin}", 0.05 + 0.01 * 0.5 + 0.02 / 2**0.5),
    (r"\boxed{Nothing known}", 0.05), (r"\boxed{Up; Heat}", 0.05 + 0.02 / 5**0.5),  # the first answer alone
    ("Heat", -0.55), ("", -0.55), (r"\boxed{}", -0.55), (r"\boxed{Heat", -0.55)])  # no box
def test_reward_by_hand(text, wanted):
    query = request("Heat", "Ronin", "Up")
    graph = {"m0": frozenset("abcd"), "m1": frozenset("ab"), "m2": frozenset("xy")}
    embeddings = {f"m{n}": torch.tensor([1.0, float(n)]) for n in range(3)}
    for weights in ((0.01, 0.02), {"query_alignment": 0.01, "preference_alignment": 0.02}):
        judged = rerec.score_response(text, query, graph, embeddings, weights)
        assert judged.reward == pytest.approx(wanted)
    assert judged.boxed == (judged.terms["format"] > 0) == (wanted > 0)

@pytest.mark.parametrize("answers, truths, wanted", [
    (["a"], ("a",), 1.0), ([], ("a",), 0.0), (["x", "a"], ("a",), 1 / math.log2(3)), ([None], ("a",), 0.0),
    (["a"], ("a", "b"), 1 / (1 + 1 / math.log2(3)))])
def test_answers_ndcg_by_hand(answers, truths, wanted):
    assert rerec.answers_ndcg(answers, truths, 10) == pytest.approx(wanted)

def penalised(text, title, reward=1.0, correct=False, penalty=0.3, others=()):
    """The characters whose reward is lower, as text."""
    characters = [(n, n + 1) for n in range(len(text))]
    values = rerec.segment_rewards(text, characters, reward, title, correct, penalty, others)
    lower = reward - penalty * abs(reward)
    assert all(v == pytest.approx(reward) or v == pytest.approx(lower) for v in values)
    return "".join(c for c, v in zip(text, values) if v < reward)

@pytest.mark.parametrize("text, title, wanted", [
    ("A good one.\nHeat fits.\n\\boxed{Heat}", "Heat", "Heat fits."),
    ("Heat fits.\n\nso \\boxed{Heat}, for Heat", "Heat", "Heat fits."),  # the box's own line is exempt
    ("Heat it is.\r\nUp is not.\r\n\\boxed{Heat}", "Heat", "Heat it is."),
    ("Fjord Amélie 画 fits.\nelse\n\\boxed{Amélie 画}", "Amélie 画", "Fjord Amélie 画 fits."),
    ("heat (1995) fits\n\\boxed{Heat}", "Heat", "heat (1995) fits"),
    ("Heat fits\nHeat (1995) fits\n\\boxed{Heat (1995)}", "Heat (1995)", "Heat fitsHeat (1995) fits"),
    ("Heat (1986) fits\n\\boxed{Heat (1995)}", "Heat (1995)", ""),
    ("Heated, Wheat\nbut Heat.\n\\boxed{Heat}", "Heat", "but Heat."),
    ("Heat\n\\boxed{Heat}\nHeat again\n\\boxed{Up} Heat", "Heat", "HeatHeat again"),  # two boxes: both exempt
    ("Alien & Co fits\n\\boxed{\\text{Alien \\& Co}}", "Alien & Co", "Alien & Co fits"),
    ("Heat fits, no box", "", ""), ("", "Heat", ""), ("\n\n", "Heat", ""),
    ("Heat\n\\boxed{\nHeat}", "Heat", "Heat")])  # a box over two lines
def test_segment_rewards_by_hand(text, title, wanted):
    assert penalised(text, title) == wanted
    assert penalised(text, title, correct=True) == penalised(text, title, penalty=0.0) == ""

@pytest.mark.parametrize("text, title, wanted", [
    ("Alien 3 fits.\nAliens too.\nAlien fits.", "Alien", "Alien fits."),
    ("Alien 3 fits.\nAliens too.\nAlien fits.", "Alien 3", "Alien 3 fits."),
    ("Alien 3 and Alien", "Alien", "Alien 3 and Alien"),
    # Those with a year are named without it, too.
    ("Up 3 fits.\nUp 3 (1992) too.\nUp fits.\nUp (2003), no.", "Up (1979)", "Up fits."),
    ("Up 3 fits.\nUp 3 (1992) too.\nUp fits.\nUp (2003), no.", "Up 3 (1992)", "Up 3 fits.Up 3 (1992) too."),
    ("Heat fits", "Heat (1995)", ""), ("Heat (1995) fits", "Heat", "")])
def test_titles_that_contain_one_another(text, title, wanted):
    titles = ["Alien", "Alien 3", "Aliens", "Up (1979)", "Up 3 (1992)", "Up (2003)", "Heat", "Heat (1995)"]
    assert penalised(f"{text}\n\\boxed{{{title}}}", title, others=titles) == wanted

def test_a_token_across_a_line_end_belongs_to_the_paragraph_it_touches():
    text, offsets = "Heat.\nUp\n\\boxed{Heat}", [(0, 4), (4, 6), (6, 8), (8, 15), (15, 21), (21, 21)]
    for reward, lower in ((1.0, 0.7), (-0.5, -0.65)):  # never a gift
        values = rerec.segment_rewards(text, offsets, reward, "Heat", False, 0.3)
        assert values == pytest.approx([lower] * 2 + [reward] * 4)

@pytest.mark.parametrize("text", [
    "plain words\nand lines\r\n\\boxed{x}", "Amélie 映画 🎬🎬 naïve\nЖук", "  spaces  \t\n\n", "",
    "Avelle almond cream \u200d👩‍👩‍👧 e\u0301"])
def test_token_offsets_cover_the_text(tokenizer, text):
    """Also with a byte a token, the spans lie in order, cover the text, and hold what their tokens say."""
    whole = tokenizer(text, add_special_tokens=False).input_ids
    single = [i for c in text for i in tokenizer(c, add_special_tokens=False).input_ids]
    for ids in (whole, single):
        found, offsets = rerec.token_offsets(tokenizer, ids + [tokenizer.eos_token_id])
        assert found == text and len(offsets) == len(ids) + 1 and offsets[-1] == (len(text), len(text))
        for i, (a, b), before in zip(ids, offsets, [(0, 0), *offsets]):
            assert a == before[1] or (a, b) == before  # the next span, or the character of the token before
            piece = tokenizer.decode([i])
            assert "\ufffd" in piece or piece == text[a:b]

def test_token_offsets_where_a_first_space_is_dropped():
    """As decoders of the SentencePiece kind do: a token's text depends on whether others stand before it."""
    words = [f" w{n}" for n in range(60)]
    decoder = SimpleNamespace(decode=lambda ids, **options: "".join(words[i] for i in ids).lstrip())
    text, offsets = rerec.token_offsets(decoder, list(range(60)))
    assert text == "".join(words).lstrip() and [text[a:b] for a, b in offsets] == ["w0", *words[1:]]

def test_group_advantages_by_brute_force():
    r = torch.randn(5, 9)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 0, 7])[:, None]
    values = [r[i, t].item() for i in range(5) for t in range(9) if mask[i, t]]
    mean, std = statistics.mean(values), statistics.pstdev(values)
    wanted = torch.where(mask, (r - mean) / (std + 1e-6), 0.0)
    found = rerec.group_advantages(r, mask)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    floor = rerec.group_advantages(r, mask, 2 * std)
    torch.testing.assert_close(floor, wanted * (std + 1e-6) / (2 * std + 1e-6), atol=1e-6, rtol=0)
    assert torch.equal(rerec.group_advantages(r, mask, std / 2), found)
    for alike in (torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)):
        assert not rerec.group_advantages(torch.full((4, 3), 1.07), alike).any()

def play(queue, difficulty):
    """One epoch: its batches in order, every query recorded with the difficulty given."""
    batches = []
    while not batches or queue.position < len(queue.pool):
        batches.append(queue.next_batch())
        for i in batches[-1]:
            queue.record(i, [1 - difficulty[i]])
    return batches

def test_curriculum_by_hand():
    queue = rerec.CurriculumQueue(list("abcdefg"), 3, tau=0.1)
    first = dict(zip("abcdefg", (0.9, 0.0, 0.5, 0.05, 1.0, 0.2, 0.5)))
    assert play(queue, first) == [list("abc"), list("def"), ["g"]]  # as given; the last batch is kept
    # b and d are dropped; the rest comes by difficulty, ties as given
    assert play(queue, first | {"f": 0.09}) == [list("fcg"), list("ae")]
    assert queue.statistics() == {"epoch": 1, "pool": 5, "dropped": 2,
                                  "difficulty": pytest.approx((0.9 + 0.5 + 1 + 0.09 + 0.5) / 5)}
    assert play(queue, dict.fromkeys("abcdefg", 0.0)) == [list("cga"), ["e"]]  # f too: drops add up
    assert play(queue, first) == [list("abc"), list("egd"), ["f"]]  # none would be left: all return
    assert not queue.dropped
    queue = rerec.CurriculumQueue(list("abc"), 2, tau=0.5)
    play(queue, {"a": 0.0, "b": 0.6, "c": 0.0})  # one would be left, less than a batch: all return
    assert queue.next_batch() == ["a", "c"] and not queue.dropped

@pytest.mark.parametrize("enabled", [True, False])
def test_curriculum_goes_on_where_it_was_saved(enabled):
    """Switched off, every epoch holds all requests, in another order."""
    def batches(save_at=None):
        queue = rerec.CurriculumQueue(list("abcdefghijk"), 4, enabled=enabled)
        rng, found = random.Random(0), []
        for step in range(12):
            if step == save_at:
                state = json.loads(json.dumps(queue.state_dict()))
                queue = rerec.CurriculumQueue(list("abcdefghijk"), 4, enabled=enabled)
                queue.load_state_dict(state)
            found.append(queue.next_batch())
            for i in found[-1]:
                queue.record(i, [float(rng.random() < 0.7) for _ in range(3)])
        return found

    assert all(batches(save_at) == batches() for save_at in range(12))
    first, second = sum(batches()[:3], []), sum(batches()[3:6], [])
    assert enabled or sorted(first) == sorted(second) == list("abcdefghijk") and first != second
