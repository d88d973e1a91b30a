"""A training step of either method: against the written objective, and what must not change it.

And what R2Rank reads from rationales, against the plain forward pass."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import policy
import r2r
import rerec
import rewards
import train
from extras.queries import QueryBuilder
from steps import Recorder, close, pad_logprobs, plain_row, replay, settings, token_terms
from test_plackett_luce import enumerate_value

RELEVANCE = [[0.0, 1.0, 0.0, 0.0], [2.0, 0.0, 1.0]]

@pytest.fixture(scope="module")
def lists(toy):
    """Two lists, of 4 and 3 candidates, with histories of unequal length."""
    return [replace(e, history=e.history[n:], candidates=e.candidates[:len(y)], relevance=y)
            for n, (e, y) in enumerate(zip(toy.examples("test", 2), RELEVANCE))]

@pytest.fixture(scope="module")
def rationales(model_and_tokenizer, lists):
    """Three sampled rationales a candidate, of unequal lengths."""
    model, tokenizer = model_and_tokenizer
    torch.manual_seed(0)
    found = r2r.reason(model, tokenizer, [(e.history, e.candidates) for e in lists], settings(), 3)
    found.responses[2], found.responses[5] = found.responses[2][:4], found.responses[5][:1]
    found.hidden = policy.all_logprobs(model, found)[1]
    return found

@pytest.fixture(scope="module")
def queries(toy):
    return QueryBuilder(toy, max_conditions=3).draw("train", 3)

@pytest.fixture(scope="module")
def answers(model_and_tokenizer, queries):
    """Four responses a request, of unequal lengths; to the first two: right, wrong, and two at random."""
    model, tokenizer = model_and_tokenizer
    torch.manual_seed(0)
    found = rerec.respond(model, tokenizer, queries, settings("rerec"), 4)
    for n, q in enumerate(queries[:2]):
        right = next(c for c in q.candidates if c.id in q.truths)
        wrong = next(c for c in q.candidates if c.id not in q.truths)
        texts = [f"Sure.\n\\boxed{{{right.title}}}<|im_end|>",
                 f"{wrong.title} fits.\n\\boxed{{{wrong.title}}}"]
        found.responses[4 * n:4 * n + 2] = tokenizer(texts).input_ids
    return found

@pytest.fixture(params=["r2rank", "rerec"])
def method(request):
    return request.param

@pytest.fixture
def case(method, model, tokenizer, score_head, lists, rationales, toy, queries, answers):
    """A method, what a step of it is given (`items`), and the `rollout` that answers them."""
    made = SimpleNamespace(method=method, model=model, tokenizer=tokenizer, head=score_head, task=None,
                           train_step=r2r.train_step, items=lists, rollout=rationales)
    if method == "rerec":
        queue = rerec.CurriculumQueue([q.id for q in queries], 3)
        made.task = rerec.Task(queue, rewards.attribute_graph(toy.items.values()))
        made.head, made.train_step, made.items, made.rollout = None, rerec.train_step, queries, answers
    return made

def flags(case, **changes):
    return settings(case.method, group_size=case.rollout.num_samples, **changes)

def take_step(case, args, items=None, reference=None, **recorder):
    """(gradients of each update, metrics) of the method's train_step on copies of model and head."""
    model, head = copy.deepcopy((case.model, case.head))
    kept = Recorder(*filter(None, (model, head)), **recorder)
    items = case.items if items is None else items
    metrics = case.train_step(
        model.train(), case.tokenizer, head or case.task, items, kept, args, reference)
    return kept.gradients, metrics

def objective(case, model, head, args, old, reference):
    """Score loss + token loss + KL as written, in one graph: (loss, metrics, log-probabilities by row)."""
    rollout, rows, value, more = case.rollout, range(len(case.rollout.owner)), 0.0, {}
    now, hidden, _ = zip(*(plain_row(model, rollout, n, args.temperature) for n in rows))
    if head:
        hidden = torch.stack(hidden)
        scores = head(hidden.detach() if args.score_gradient == "head" else hidden)
        columns = [(s, torch.tensor(y)) for s, y in zip(rollout.by_list(scores), RELEVANCE)]
        values = [torch.stack([enumerate_value(c, y.tolist(), 10) for c in s.T]).mean() for s, y in columns]
        advantages = [r2r.advantages(s.detach(), y, credit=args.credit).flatten() for s, y in columns]
        value, advantages = sum(values) / len(values), torch.cat(advantages)
        more = {"utility": value.item()}
    else:
        _, advantages = rerec.judge(case.tokenizer, rollout, case.items, case.task, args)
        advantages = [a[:len(row)] for a, row in zip(advantages, now)]
    with torch.no_grad():
        refs = [plain_row(reference, rollout, n, args.temperature)[0] for n in rows] if args.kl_coef else now
    old = old or [row.detach() for row in now]
    loss, metrics = token_terms(now, old, refs, advantages, args.kl_coef)
    return (args.token_weight or 1.0) * loss - value, metrics | more, now

CHANGES = {"r2rank": [{}, {"credit": "list"}, {"credit": "none"}, {"score_gradient": "head"},
                      {"kl_coef": 0.3, "temperature": 0.7}, {"kl_coef": 0.3, "ppo_epochs": 2},
                      {"no_reasoning": True}],
           "rerec": [{}, {"kl_coef": 0.3, "temperature": 0.7}, {"kl_coef": 0.3, "ppo_epochs": 2},
                     {"raae_penalty": 0.0, "min_std": 2.0, "reward_weights": {"query_alignment": 1.0}}]}

@pytest.mark.parametrize("method, changes", [(m, c) for m, several in CHANGES.items() for c in several],
                         ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
def test_a_step_follows_the_written_objective(case, changes, monkeypatch):
    """Also of a second update, when weights and scores have moved so far that the clip acts."""
    args = flags(case, **changes)
    if args.no_reasoning:
        pairs = [(e.history, e.candidates) for e in case.items]
        case.rollout = r2r.reason(case.model, case.tokenizer, pairs, args, 1)
    if case.head and args.temperature != 1:  # a list that teaches nothing pays its KL all the same
        monkeypatch.setitem(globals(), "RELEVANCE", [[0.0] * 4, RELEVANCE[1]])
        case.items = [replace(case.items[0], relevance=RELEVANCE[0]), case.items[1]]
    replay(monkeypatch, case.rollout)
    moved = copy.deepcopy(case.model)
    for p in moved.parameters():
        p.data += 0.01 * torch.randn_like(p)
    found, metrics = take_step(case, args, None, moved, rate=0.3)
    model, head = copy.deepcopy((case.model, case.head))
    kept, old, logged = Recorder(*filter(None, (model, head)), rate=0.3), None, []
    for _ in range(args.ppo_epochs):
        loss, wanted, now = objective(case, model, head, args, old, moved)
        logged.append(wanted)
        old = old or [row.detach() for row in now]
        loss.backward()
        kept.step()
    assert len(found) == args.ppo_epochs and all(map(close, found, kept.gradients))
    if case.head:
        wanted["utility"] = logged[0]["utility"]  # of the rollout, before any update
    else:
        judged, _ = rerec.judge(case.tokenizer, case.rollout, case.items, case.task, args)
        assert [j.correct for j in judged] == [True, False, False, False] * 2 + [False] * 4
        assert [case.task.queue.difficulty[q.id] for q in case.items] == [0.75, 0.75, 1.0]
        updated = torch.cat(now if args.kl_coef else now[:8])  # the last group is skipped
        wanted |= {"reward": sum(j.reward for j in judged) / 12, "accuracy": 2 / 12, "format_rate": 4 / 12,
                   "dead_groups": 1, "entropy": -updated.mean().item()}
    wanted["grad_norm"] = found[-1].norm().item()
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    # On policy nothing is clipped; off policy the test would show nothing if nothing were.
    assert 0 < metrics["clipped"] < 1 if args.ppo_epochs == 2 else metrics["clipped"] == 0

def test_what_must_not_change_a_step(case, monkeypatch):
    """Micro-batches, the shared prefix, the order of lists, what is computed beyond a response's end."""
    replay(monkeypatch, case.rollout)
    args = flags(case, kl_coef=0.3, ppo_epochs=2)
    wanted, metrics = take_step(case, args, None, case.model, rate=0.3)
    pad_logprobs(monkeypatch)
    for args.micro_batch, share, order in ((1, True, 1), (4, False, -1), (100, True, -1)):
        monkeypatch.setattr(policy, "SHARE_PREFIX", share)
        found, again = take_step(case, args, case.items[::order], case.model, rate=0.3)
        assert all(map(close, found, wanted))
        for name in metrics.keys() - {"seconds", "seconds_sample"}:
            assert again[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-4), name

@pytest.mark.parametrize("method", ["rerec"])
def test_judging_a_rollout(case):
    """A query's responses are compared among themselves; a paragraph naming the wrong item has less."""
    _, advantages = rerec.judge(case.tokenizer, case.rollout, case.items, rerec.Task(None), flags(case))
    assert not advantages[8:].any()  # these are all alike
    for n in (0, 4):
        right, wrong, unboxed, _ = (
            a[:len(r)] for a, r in zip(advantages[n:n + 4], case.rollout.responses[n:]))
        assert right[0] > wrong[-1] > wrong[0] > unboxed[0]

def test_lists_ranked_right_with_certainty_or_without_a_relevant_candidate_teach_nothing(rationales):
    """One of equal scores for all rationales does."""
    for first, relevance in (([-200.0, 200, -200, -200], RELEVANCE[0]), ([0.5, 2.0, 0, 1], [0.0] * 4)):
        scores = torch.tensor([*first, 1.0, 0, 0.5]).repeat_interleave(3)
        pair = torch.tensor(relevance), torch.tensor(RELEVANCE[1])
        _, advantages, _, alive = r2r.learning_signal(rationales, scores, pair, 2)
        assert alive == [1] and not advantages[:12].any()

@pytest.mark.parametrize("method", ["r2rank"])
def test_the_order_of_candidates_changes_nothing(case):
    """Sampling included: the same seed gives a candidate the same rationales, wherever it stands."""
    turned = [replace(e, candidates=e.candidates[::-1], relevance=e.relevance[::-1]) for e in case.items]
    (first,), _ = take_step(case, flags(case))
    torch.manual_seed(0)  # as this test began
    (second,), _ = take_step(case, flags(case), turned)
    assert close(second, first) and first.any()
    for head in (case.head, None):
        ranked, again = (r2r.rank(case.model, case.tokenizer, head, e.history, e.candidates, max_new_tokens=6)
                         for e in (case.items[0], turned[0]))
        assert again == ranked  # to the last bit
        assert [x.score for x in ranked] == sorted((x.score for x in ranked), reverse=True)
    with pytest.raises(TypeError, match="data.Item"):
        r2r.rank(case.model, case.tokenizer, case.head, case.items[0].history, ["a title", "another"])

@pytest.mark.parametrize("method", ["r2rank"])
@pytest.mark.parametrize("pl, bad", [("exact", math.nan), ("exact", math.inf), ("sample", -math.inf)])
def test_a_score_that_is_no_number_is_seen_in_the_norm(case, score_head, pl, bad, monkeypatch):
    """Sorting such scores gives a ranking, and so a finite gradient, unless somebody looks."""
    replay(monkeypatch, case.rollout)
    forward = score_head.forward
    monkeypatch.setattr(score_head, "forward", lambda h: forward(h).where(torch.arange(len(h)) > 0, bad))
    assert math.isnan(take_step(case, flags(case, pl=pl))[1]["grad_norm"])
    score_head.zero_grad()

@pytest.mark.parametrize("swap", [False, True])
def test_scores_are_means_over_rationales(model, tokenizer, score_head, lists, rationales, swap, monkeypatch):
    """--swap-rationales: each candidate is scored by its own prompt and its neighbour's rationales."""
    replay(monkeypatch, rationales)
    said = rationales.responses
    if swap:
        said = [*said[9:12], *said[:9], *said[18:], *said[12:18]]
    pairs = [(e.history, e.candidates) for e in lists]
    found = r2r.score_lists(model, tokenizer, score_head, pairs, settings(swap_rationales=swap), 3)
    read = policy.Rollout(rationales.prompts, 3, said)
    rows = torch.stack([score_head(plain_row(model, read, n)[1]) for n in range(21)])
    for (scores, _), wanted in zip(found, read.by_list(rows), strict=True):
        torch.testing.assert_close(scores, wanted.mean(1), atol=1e-5, rtol=0)
    texts = [text for _, rows in found for row in rows for text in row]
    assert texts == tokenizer.batch_decode(said, skip_special_tokens=True)

def test_zero_shot_score_is_the_log_odds_at_the_answer(toy, lists):
    """What it answered does not count; one that never came to its answer is asked for it."""
    model, tokenizer = policy.load("tiny", texts=toy.texts())
    yes, no = tokenizer(["yes", "no"]).input_ids
    assert len(yes) != len(no)  # to this tokenizer
    prompt = r2r.build_prompt(tokenizer, lists[1].history, lists[1].candidates)
    answers = "Rose.\n<answer>yes</answer>", "Rose.\n<answer>no", "I"
    responses = [tokenizer(f"{text}<|im_end|>").input_ids for text in answers]
    found = r2r.answer_log_odds(model, tokenizer, policy.Rollout([prompt], 1, responses))
    for n, thought in enumerate(("Rose.\n", "Rose.\n", "I\n")):
        rows = [tokenizer(f"{thought}<answer>{word}").input_ids for word in ("yes", "no")]
        yes, no = (plain_row(model, policy.Rollout([prompt], 1, [r] * 3), n)[0].sum() for r in rows)
        assert found[n].item() == pytest.approx((yes - no).item(), abs=1e-4)

@pytest.mark.parametrize("text, answer", [
    ("so <answer>yes</answer>", True), ("<answer> No </answer>", False),
    ("<answer>yes</answer> wait <answer>no</answer>", False),  # the last one counts
    *((text, None) for text in ("", "yes", "<answer>maybe</answer>", "<answer>yes", "<answer></answer>"))])
def test_parse_answer(text, answer):
    assert r2r.parse_answer(text) is answer

def test_warm_up_fits_the_head_and_learns_no_noise_by_heart():
    """Features that show the positive are found; from noise it learns no certainty about other lists."""
    relevance, fresh = [torch.eye(6)[n % 6] for n in range(12)], torch.randn(120, 192)
    noise = [torch.randn(6, 2, 192) for _ in range(12)]
    telling = [h + 2.0 * y[:, None, None] for h, y in zip(noise, relevance)]
    heads = [r2r.ScoreHead(192) for _ in range(3)]
    optimizers = [torch.optim.AdamW(head.parameters(), lr=1e-3) for head in heads]
    assert train.fit_score_head(heads[0], telling, relevance, optimizers[0], epochs=5) > 0.95
    train.fit_score_head(heads[1], noise, relevance, optimizers[1])
    for h, y in 10 * list(zip(noise, relevance)):  # by heart
        optimizers[2].zero_grad()
        r2r.score_loss(heads[2](h), y)[0].mean().backward()
        optimizers[2].step()
    assert heads[1](fresh).std() < 0.5 * heads[2](fresh).std()
