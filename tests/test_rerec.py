"""ReRec: prompts, rewards, advantages, curriculum and step, by hand, by brute force, by invariances."""

import copy
import json
import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import policy
import rerec
import rewards
from data import Item, Query
from extras.queries import QueryBuilder
from steps import Recorder, close, pad_logprobs, plain_row, replay, settings, token_terms

def request(*titles, **changes):
    """The first of the titles is right."""
    movies = [Item(f"m{n}", title) for n, title in enumerate(titles)]
    return Query("q", "Something good, please.", "explicit", 1, movies, ("m0",), **changes)

@pytest.fixture(scope="module")
def builder(toy):
    return QueryBuilder(toy, max_conditions=3)

def test_a_prompt_shows_request_and_candidates_and_history_where_asked(model, tokenizer, builder):
    """Its responses share all of it but the template's end. Titles come as the answer's reader takes them."""
    past = [Item("h", "Heat {x}", ago="3 days ago", rating=4.0)]
    query = request("Up", r"A \boxed{Up}", history=past)
    for personalized, times in ((True, 1), (False, 0)):
        prompt = rerec.build_prompt(tokenizer, query, personalized)
        (suffix,), text = prompt.suffix_ids, tokenizer.decode(prompt.prefix_ids)
        assert tokenizer.decode(suffix) == "<|im_end|>\n<|im_start|>assistant\n"
        assert text.endswith("Request: Something good, please.\nCandidates:\n- Up\n- A boxed(Up)\n")
        assert text.count("- 3 days ago: Heat (x) (rated 4)") == times

def test_nothing_in_a_prompt_spells_an_answer(tokenizer):
    """Quoting it would be one: only the instruction holds a box."""
    box = r"\\boxed{Good}"
    item = Item("m0", box, {"brand": (box,)})
    query = replace(request(box, "Good", history=[item]), text=f"Is {box} right?")
    prompt = rerec.build_prompt(tokenizer, query, personalized=True)
    assert tokenizer.decode(prompt.prefix_ids + prompt.suffix_ids[0]).count("\\boxed") == 1

GRAPH = {"m0": frozenset("abcd"), "m1": frozenset("ab"), "m2": frozenset("xy")}

@pytest.mark.parametrize("text, wanted", [
    (r"\boxed{Heat}", 1 + 0.05 + 0.01 + 0.02), (r"\boxed{Ronin}", 0.05 + 0.01 * 0.5 + 0.02 / 2**0.5),
    (r"\boxed{Nothing known}", 0.05), (r"\boxed{Up; Heat}", 0.05 + 0.02 / 5**0.5),  # the first answer alone
    ("Heat", -0.55), ("", -0.55), (r"\boxed{}", -0.55), (r"\boxed{Heat", -0.55)])  # no box
def test_reward_by_hand(text, wanted):
    query = request("Heat", "Ronin", "Up")
    embeddings = {f"m{n}": torch.tensor([1.0, float(n)]) for n in range(3)}
    for weights in ((0.01, 0.02), {"query_alignment": 0.01, "preference_alignment": 0.02}):
        judged = rerec.score_response(text, query, GRAPH, embeddings, weights)
        assert judged.reward == pytest.approx(wanted)
    assert judged.boxed == (judged.terms["format"] > 0) == (wanted > 0)

@pytest.mark.parametrize("answers, truths, wanted", [
    (["a"], ("a",), 1.0), ([], ("a",), 0.0), (["x", "a"], ("a",), 1 / math.log2(3)), ([None], ("a",), 0.0),
    (["a"], ("a", "b"), 1 / (1 + 1 / math.log2(3)))])
def test_answers_ndcg_by_hand(answers, truths, wanted):
    assert rerec.answers_ndcg(answers, truths, 10) == pytest.approx(wanted)

# --- reasoning-aware advantages ---

def characters(text):
    return [(n, n + 1) for n in range(len(text))]

def penalised(text, title, reward=1.0, correct=False, penalty=0.3, others=()):
    """The characters whose reward is lower, as text."""
    values = rerec.segment_rewards(text, characters(text), reward, title, correct, penalty, others)
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

# --- the step ---

@pytest.fixture(scope="module")
def queries(builder):
    return builder.draw("train", 3)

@pytest.fixture(scope="module")
def rollout(model_and_tokenizer, queries):
    """Four responses a request, of unequal lengths; to the first two: right, wrong, and two at random."""
    model, tokenizer = model_and_tokenizer
    torch.manual_seed(0)
    found = rerec.respond(model, tokenizer, queries, settings("rerec"), 4)
    for n, q in enumerate(queries[:2]):
        right = next(c for c in q.candidates if c.id in q.truths)
        wrong = next(c for c in q.candidates if c.id not in q.truths)
        answers = [f"Sure.\n\\boxed{{{right.title}}}<|im_end|>",
                   f"{wrong.title} fits.\n\\boxed{{{wrong.title}}}"]
        found.responses[4 * n:4 * n + 2] = tokenizer(answers).input_ids
    return found

def take_step(model, tokenizer, builder, queries, args, reference=None, **recorder):
    """(gradients of each update, metrics, the queue) of rerec.train_step on a copy of the model."""
    model, queue = copy.deepcopy(model), rerec.CurriculumQueue([q.id for q in queries], 3)
    task = rerec.Task(queue, rewards.attribute_graph(builder.graph_items()))
    kept = Recorder(model, **recorder)
    metrics = rerec.train_step(model.train(), tokenizer, task, queries, kept, args, reference)
    return kept.gradients, metrics, queue

def test_judging_a_rollout(tokenizer, rollout, queries):
    """A query's tokens have mean 0 and deviation 1; a paragraph that names the wrong item has less."""
    _, advantages = rerec.judge(tokenizer, rollout, queries, rerec.Task(None), settings("rerec"))
    assert not advantages[8:].any()  # these are all alike
    for n in (0, 4):
        rows = [a[:len(r)] for a, r in zip(advantages[n:n + 4], rollout.responses[n:])]
        assert torch.cat(rows).mean().item() == pytest.approx(0, abs=1e-5)
        assert torch.cat(rows).std(correction=0).item() == pytest.approx(1, abs=1e-4)
        right, wrong, unboxed, _ = rows
        assert right[0] > wrong[-1] > wrong[0] > unboxed[0]

@pytest.mark.parametrize("changes", [
    {}, {"kl_coef": 0.3, "temperature": 0.7}, {"kl_coef": 0.3, "ppo_epochs": 2},
    {"raae_penalty": 0.0, "min_std": 2.0, "reward_weights": {"query_alignment": 1.0}}],
    ids=lambda changes: "-".join(changes) or "default")
def test_a_step_follows_the_written_objective(
        model, tokenizer, builder, queries, rollout, changes, monkeypatch):
    """Also of a second update, when weights have moved so far that the clip acts."""
    replay(monkeypatch, rollout)
    args, rows = settings("rerec", group_size=4, **changes), range(len(rollout.owner))
    moved = copy.deepcopy(model)
    for p in moved.parameters():
        p.data += 0.01 * torch.randn_like(p)
    found, metrics, queue = take_step(model, tokenizer, builder, queries, args, moved, rate=0.3)
    task = rerec.Task(None, rewards.attribute_graph(builder.graph_items()))
    judged, advantages = rerec.judge(tokenizer, rollout, queries, task, args)
    assert [j.correct for j in judged] == [True, False, False, False] * 2 + [False] * 4
    model, old = copy.deepcopy(model), None
    kept = Recorder(model, rate=0.3)
    with torch.no_grad():
        refs = [plain_row(moved, rollout, n, args.temperature)[0] for n in rows]
    for _ in range(args.ppo_epochs):
        now = [plain_row(model, rollout, n, args.temperature)[0] for n in rows]
        old = old or [row.detach() for row in now]
        by_row = [a[:len(row)] for a, row in zip(advantages, now)]
        loss, wanted = token_terms(now, old, refs, by_row, args.kl_coef)
        loss.backward()
        kept.step()
    assert len(found) == args.ppo_epochs and all(map(close, found, kept.gradients))
    del wanted["entropy"]  # below, of the rows that are not skipped
    wanted |= {"reward": sum(j.reward for j in judged) / 12, "accuracy": 2 / 12, "format_rate": 4 / 12}
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    updated = torch.cat(now if args.kl_coef else now[:8])
    assert metrics["entropy"] == pytest.approx(-updated.mean().item(), abs=1e-4)
    assert [queue.difficulty[q.id] for q in queries] == [0.75, 0.75, 1.0] and metrics["dead_groups"] == 1
    assert 0 < metrics["clipped"] < 1 if args.ppo_epochs == 2 else metrics["clipped"] == 0

def test_what_must_not_change_a_step(model, tokenizer, builder, queries, rollout, monkeypatch):
    """Micro-batches, the shared prefix, the order of queries, what is computed beyond a response's end."""
    replay(monkeypatch, rollout)
    args = settings("rerec", group_size=4, kl_coef=0.3, ppo_epochs=2)
    wanted, metrics, _ = take_step(model, tokenizer, builder, queries, args, model, rate=0.3)
    pad_logprobs(monkeypatch)
    for micro_batch, share, order in ((1, True, 1), (4, False, -1), (100, True, -1)):
        monkeypatch.setattr(policy, "SHARE_PREFIX", share)
        args.micro_batch = micro_batch
        found, again, _ = take_step(model, tokenizer, builder, queries[::order], args, model, rate=0.3)
        assert all(map(close, found, wanted))
        for name in ("token_loss", "kl", "clipped", "entropy", "reward", "difficulty"):
            assert again[name] == pytest.approx(metrics[name], abs=1e-4), name

def test_shares_of_a_step_add_up_to_the_whole(model, tokenizer, builder, queries, rollout, monkeypatch):
    """As several processes share it, one of them without any query."""
    replay(monkeypatch, rollout)
    args = settings("rerec", group_size=4)
    totals = {"responses": 12, "tokens": sum(map(len, rollout.responses))}
    (whole,), metrics, _ = take_step(model, tokenizer, builder, queries, args)
    shares = [take_step(model, tokenizer, builder, share, args, totals=totals)
              for share in (queries[:1], queries[1:], [])]
    assert close(sum(gradient for (gradient,), _, _ in shares), whole) and not shares[2][0][0].any()
    for name in ("reward", "accuracy", "token_loss", "dead_groups"):
        assert sum(found[name] for _, found, _ in shares) == pytest.approx(metrics[name], abs=1e-5)

def test_groups_without_advantage_are_skipped_unless_they_pay_their_kl(
        model, tokenizer, builder, queries, rollout, monkeypatch):
    replay(monkeypatch, rollout)
    seen, original = [], policy.row_logprobs
    monkeypatch.setattr(policy, "row_logprobs", lambda *rest: (seen.extend(rest[2]), original(*rest))[1])
    for kl_coef, rows in ((0.0, 8), (0.1, 12 + 12)):  # once more for the reference
        seen.clear()
        take_step(model, tokenizer, builder, queries, settings("rerec", group_size=4, kl_coef=kl_coef), model)
        assert len(seen) - 12 == rows  # 12 in sampling, as `replay` does it
