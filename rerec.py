r"""ReRec: answer a request by reasoning about its candidates; shaped rewards and GRPO (arXiv 2604.07851).

Read top to bottom: prompt, reward, advantage, curriculum, training step, answering. With G responses i = 1..G
to a query, p_i the item that response i boxes, and t the right one:

    score_response       r_i = NDCG@K(p_i) + 0.1 F_i + w1 QAS_i + w2 PAS_i;  F = 0.5 with a box; without one
                         F = -0.5, and -0.5 stands for NDCG
    query_alignment      QAS(p, t) = |N(p) & N(t)| / |N(t)| on the item-attribute graph          (rewards.py)
    preference_alignment PAS(p, t) = cosine of LightGCN embeddings                               (rewards.py)
    segment_rewards      r_{i,t} = r_i, or r_i - w_pen |r_i| in paragraphs that name the wrong item (RAAE)
    group_advantages     A_{i,t} = (r_{i,t} - mean) / (std + 1e-6) over all valid tokens of the G responses
    train_step           clipped token loss + beta k3, divided by all tokens of the step         (policy.py)
    CurriculumQueue      d(q) = mean_i (1 - NDCG@1(p_i)); later epochs drop d < tau, go from easy to hard

Deviations and choices (the paper leaves them open unless said otherwise):
  1. Penalised tokens have r - w_pen |r|: the paper's (1 - w_pen) r where r > 0; below 0 that would be a gift.
  2. Characters, not single decoded tokens, decide in which paragraph a token lies (`token_offsets`); a
     paragraph with a box is exempt; a title is named where it stands as whole words, not inside another
     candidate's.
  3. A group whose tokens all have one reward has zero advantage exactly, and gets no update (but its KL's).
  4. Difficulties belong to query ids (the released code attaches them by position), and an epoch's last,
     incomplete batch is kept, since it is the hardest.
  5. Several truths: PAS takes the largest; with K answers QAS and PAS are those of the first.
  6. Titles match up to case, quotes, white space, LaTeX, and a year that only one candidate can have. Text
     of an item that spells a box is defused in the prompt.
  7. Where no response of a group is right only small rewards are left (alignment 0.01, RAAE 0.3 of 0.05), and
     their deviation makes them as strong as right against wrong. `--min-std` bounds it; 0 is the paper.
"""

import random
import re
import time
from dataclasses import dataclass, field, replace

import torch

import policy
from data import describe
from rewards import (find_box, ndcg_at_k, normalise, parse_answers, parse_boxed, preference_alignment,
                     query_alignment, shown_title, unwrap)

SYSTEM = ("You are a recommendation assistant. Reason in short paragraphs, then answer with the title of the "
          "best candidate as \\boxed{title}.")
# The weights of a reward's terms. A further term is a line here and a line in `reward_terms`.
WEIGHTS = {"ndcg": 1.0, "format": 0.1, "query_alignment": 0.01, "preference_alignment": 0.01}


# --- prompt ---------------------------------------------------------------------------------------------

def build_prompt(tokenizer, query, personalized=False):
    """policy.Prompt of a query. Its responses share all of it: the only suffix is the assistant's header."""
    prefix = ""
    if personalized and query.history:
        history = [describe(replace(item, title=shown_title(item))) for item in query.history]
        prefix = "My history, oldest first:\n" + "".join(f"- {line}\n" for line in history)
    prefix += f"Request: {query.text}\nCandidates:\n"
    prefix += "".join(f"- {shown_title(c)}\n" for c in query.candidates)
    # Whatever an item's text or the request spells, quoting it must not make an answer.
    prefix = re.sub(r"\\+boxed", "boxed", prefix)
    return policy.encode_prompt(tokenizer, SYSTEM, prefix, [""])


# --- reward ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Judged:
    """What became of one response: its reward and the terms of it, and the item ids that it answered."""

    reward: float
    terms: dict[str, float]
    ndcg: float                      # NDCG@K of the answers, also without a box
    correct: bool                    # the first answer is right
    boxed: bool
    answers: tuple[str | None, ...]  # None: no candidate has that title
    title: str                       # the first answer's, as boxed where it is no candidate's

def answers_ndcg(answers, truths, k):
    """NDCG@k of the ids answered; a right item that was not answered ranks below k others."""
    relevance = [float(a in truths) for a in answers]
    missed = len(truths) - int(sum(relevance))
    return ndcg_at_k(relevance + [0.0] * (k - len(relevance)) + [1.0] * missed, k)

def reward_terms(first, ndcg, boxed, query, graph, embeddings):
    """The named terms of a response's reward. first: the Item answered first, or None."""
    predicted = first.id if first else None
    return {"ndcg": ndcg if boxed else -0.5,
            "format": 0.5 if boxed else -0.5,
            "query_alignment": query_alignment(predicted, query.truths, graph),
            "preference_alignment": preference_alignment(predicted, query.truths, embeddings)}

def score_response(text, query, graph=None, embeddings=None, weights=None, list_length=1):
    """Judge one response: r = sum over terms of weight * term. Only the first K = list_length answers count.

    weights: {term: weight} beside WEIGHTS, or the pair (w1, w2) of QAS and PAS.
    """
    if isinstance(weights, (tuple, list)):
        weights = dict(zip(("query_alignment", "preference_alignment"), weights))
    content = parse_boxed(text)
    answers = parse_answers(content, query.candidates)[:list_length]
    first, ids = answers[0] if answers else None, tuple(a.id if a else None for a in answers)
    ndcg = answers_ndcg(ids, query.truths, list_length)
    terms = reward_terms(first, ndcg, content is not None, query, graph or {}, embeddings or {})
    reward = sum(weight * terms[name] for name, weight in (WEIGHTS | (weights or {})).items())
    title = shown_title(first) if first else unwrap((content or "").split(";")[0])
    correct = first is not None and first.id in query.truths
    return Judged(reward, terms, ndcg, correct, content is not None, ids, title)


# --- advantage ------------------------------------------------------------------------------------------

def token_offsets(tokenizer, ids):
    """(text, [(start, end)] of each token, in characters of the text). Special tokens are empty.

    Tokenising the text again need not give the sampled ids, and a token may hold a part of a character
    only. So tokens are decoded after those before them; while the text ends in an unfinished character they
    wait, and then share its span.
    """
    def decode(start, end):
        return tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    text, offsets, shown = "", [], ""  # shown: what the window of tokens has given so far
    start, waiting = 0, 0              # ids[start:n] is the window that gives ids[n] its context
    for n in range(1, len(ids) + 1):
        waiting += 1
        now = decode(start, n)
        if now.endswith("\ufffd") and waiting < 4 and n < len(ids):  # no character has more than four bytes
            continue
        piece = now[len(shown):]
        offsets += [(len(text), len(text) + len(piece))] * waiting
        text += piece
        if n - start > 16:  # a short window keeps the time linear
            start = n - waiting
            now = decode(start, n)
        shown, waiting = now, 0
    return text, offsets

def names_title(paragraph, title, others=()):
    """Whether a paragraph names a title as whole words, with or without its "(year)", not inside another's.

    Without the year it is not named where another's whole title is just that.
    """
    def undated(words):
        return re.sub(r" ?\(\d{4}\)$", "", words)

    def stands(words):
        return rf"(?<!\w){re.escape(words)}(?!\w)"

    paragraph, title, others = normalise(paragraph), normalise(title), set(map(normalise, others))
    bare = undated(title)
    longer = {words for other in others for words in (other, undated(other)) if bare and bare in words}
    for words in sorted(longer - {title, bare}, key=lambda w: (-len(w), w)):
        paragraph = re.sub(stands(words), "\n", paragraph)
    if title and re.search(stands(title), paragraph):
        return True
    # A bare name with another year behind it is another title.
    return bool(bare) and bare not in others and bool(re.search(stands(bare) + r"(?! ?\(\d{4}\))", paragraph))

def segment_rewards(text, offsets, reward, predicted_title, correct, penalty, other_titles=()):
    """The reward of every token (RAAE): `reward`, less penalty * |reward| in paragraphs that name the wrong
    item.

    offsets: (start, end) of each token in `text`. Paragraphs end at newlines (\\n, \\r\\n or \\r); those
    with a box, or that the box reaches into, are exempt. other_titles: some may contain the predicted one.
    """
    rewards = [float(reward)] * len(offsets)
    if correct or not predicted_title or not penalty:
        return rewards
    box = find_box(text) or (0, 0)
    for paragraph in re.finditer(r"[^\r\n]+", text):
        start, end = paragraph.span()
        if "\\boxed" in paragraph.group() or start < box[1] and box[0] < end:
            continue
        if names_title(paragraph.group(), predicted_title, other_titles):
            for n, (a, b) in enumerate(offsets):
                if a < end and start < b:
                    rewards[n] = reward - penalty * abs(reward)
    return rewards

def group_advantages(token_rewards, mask, min_std=0.0):
    """A = (r - mean) / (std + 1e-6) over a query's valid tokens. (G, T), (G, T) bool -> (G, T).

    0 where the mask is not set, and everywhere when all have the same reward. A smaller std counts as
    min_std.
    """
    valid = token_rewards[mask].double()
    if not len(valid) or valid.max() - valid.min() < 1e-9:  # equal rewards need not have a std of exactly 0
        return torch.zeros_like(token_rewards)
    std = valid.std(correction=0).clamp(min=min_std)
    advantages = (token_rewards.double() - valid.mean()) / (std + 1e-6)
    return torch.where(mask, advantages, 0.0).to(token_rewards.dtype)


# --- curriculum -----------------------------------------------------------------------------------------

class CurriculumQueue:
    """Which queries come next. Later epochs drop what was easy (d < tau) and go on from easy to hard.

    Drops accumulate; when fewer than one batch would remain, all return. The first epoch is in the order
    given. enabled=False: every epoch holds all queries, shuffled from the seed.
    """

    STATE = ("epoch", "position", "difficulty", "dropped", "pool")

    def __init__(self, ids, batch_size, tau=0.1, enabled=True, seed=0):
        if len(set(ids)) != len(ids):
            raise ValueError("query ids must be unique")
        self.ids, self.batch_size, self.tau = list(ids), batch_size, tau
        self.enabled, self.seed = enabled, seed
        self.epoch, self.position, self.difficulty, self.dropped = 0, 0, {}, []
        self.pool = self.ids if enabled else self._shuffled()

    def next_batch(self):
        """The next ids, at most batch_size; the last batch of an epoch may be smaller."""
        if self.position >= len(self.pool):
            self._next_epoch()
        batch = self.pool[self.position:self.position + self.batch_size]
        self.position += len(batch)
        return batch

    def record(self, query_id, ndcg_at_1):
        """The difficulty that a group of responses shows: d = mean (1 - NDCG@1)."""
        self.difficulty[query_id] = sum(1.0 - x for x in ndcg_at_1) / len(ndcg_at_1)

    def _next_epoch(self):
        self.epoch, self.position = self.epoch + 1, 0
        if not self.enabled:
            self.pool = self._shuffled()
            return
        difficulty = {i: self.difficulty.get(i, 1.0) for i in self.ids}  # never answered so far: hard
        dropped = {*self.dropped, *(i for i in self.pool if difficulty[i] < self.tau)}
        if len(self.ids) - len(dropped) < self.batch_size:
            dropped = set()
        self.dropped = sorted(dropped)
        left = [i for i in self.ids if i not in dropped]
        self.pool = sorted(left, key=difficulty.get)  # ties stay in order

    def _shuffled(self):
        return random.Random(f"{self.seed}/{self.epoch}").sample(self.ids, len(self.ids))

    def statistics(self):
        known = [self.difficulty[i] for i in self.pool if i in self.difficulty]
        return {"epoch": self.epoch, "pool": len(self.pool), "dropped": len(self.dropped),
                "difficulty": sum(known) / len(known) if known else 1.0}

    def state_dict(self):
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])


# --- training step --------------------------------------------------------------------------------------

@dataclass
class Task:
    """What ReRec trains with beside the model: the queue of queries, and what rewards look things up in."""

    queue: CurriculumQueue
    graph: dict = field(default_factory=dict)       # rewards.attribute_graph
    embeddings: dict = field(default_factory=dict)  # rewards.item_embeddings

def respond(model, tokenizer, queries, args, num_samples, greedy=False):
    """`num_samples` responses to each query: a policy.Rollout; row b * G + g."""
    prompts = [build_prompt(tokenizer, q, args.personalized) for q in queries]
    sampling = policy.Sampling(args.max_new_tokens, args.temperature, greedy)
    return policy.sample_rows(model, tokenizer, prompts, num_samples, sampling)

def judge(tokenizer, rollout, queries, task, args):
    """What became of each response, and its tokens' advantages: [Judged] of N rows, (N, T)."""
    G, width = rollout.num_samples, max(map(len, rollout.responses), default=0)
    judged, token_rewards = [], torch.zeros(len(rollout.responses), width)
    mask = torch.zeros_like(token_rewards, dtype=torch.bool)
    for row, (n, ids) in enumerate(zip(rollout.owner, rollout.responses)):
        text, offsets = token_offsets(tokenizer, ids)
        j = score_response(text, queries[n], task.graph, task.embeddings, args.reward_weights)
        rewards = segment_rewards(text, offsets, j.reward, j.title, j.correct, args.raae_penalty,
                                  map(shown_title, queries[n].candidates))
        token_rewards[row, :len(ids)] = torch.tensor(rewards)
        mask[row, :len(ids)] = True
        judged.append(j)
    groups = [group_advantages(r, m, args.min_std) for r, m in zip(token_rewards.split(G), mask.split(G))]
    return judged, torch.cat(groups) if judged else token_rewards

def backward(model, rollout, advantages, tokens, args, old_logprobs=None, ref_logprobs=None):
    """Add the gradient of clipped loss + kl_coef * k3 to the parameters. Returns metrics.

    Both are sums over tokens divided by `tokens`, those of the whole step: micro-batches, padding and skipped
    groups do not change them. Groups without advantage are skipped, unless they pay their KL. old_logprobs
    None: this is the first update on the rollout, and the old log-probabilities are those of now.
    """
    alive = {rollout.owner[n] for n in advantages.any(1).nonzero().flatten().tolist()}
    sums = dict.fromkeys(("token_loss", "kl", "clipped", "entropy", "updated"), 0.0)
    sums["dead_groups"] = len(rollout.prompts) - len(alive)
    rows = [n for n, owner in enumerate(rollout.owner) if owner in alive or args.kl_coef]
    for rows, logprobs, mask, _ in policy.micro_batches(
            model, rollout, args.micro_batch, args.temperature, rows):
        width = mask.shape[1]
        old, ref = (x if x is None else x[rows, :width] for x in (old_logprobs, ref_logprobs))
        advantage = advantages[rows, :width].to(logprobs.device)
        loss, found = policy.token_loss(logprobs, mask, advantage, tokens, old, ref, args.kl_coef)
        sums |= {name: sums[name] + found[name] for name in found}
        loss.backward()
    return sums

def train_step(model, tokenizer, task, queries, optimizer, args, reference=None):
    """One step of GRPO on this process's share of the step's queries. Returns metrics of all processes.

    optimizer: parallel.Optimizer, which adds up over processes; reference: the model before RL, for the KL.
    """
    started = time.perf_counter()
    # 1. G responses to each query, their rewards, and every token's advantage in its group.
    rollout = respond(model, tokenizer, queries, args, args.group_size)
    judged, advantages = judge(tokenizer, rollout, queries, task, args)
    sampled = time.perf_counter()
    # 2. The queue learns how hard the queries were.
    G = args.group_size
    solved = [(q.id, [float(j.correct) for j in judged[n * G:(n + 1) * G]]) for n, q in enumerate(queries)]
    for query_id, ndcg_at_1 in optimizer.gather(solved):
        task.queue.record(query_id, ndcg_at_1)
    count = optimizer.sum({"responses": len(judged), "tokens": sum(map(len, rollout.responses))})
    old, ref = None, None
    if args.ppo_epochs > 1:
        old, _ = policy.all_logprobs(model, rollout, args.micro_batch, args.temperature)
    if args.kl_coef:
        ref, _ = policy.all_logprobs(reference, rollout, args.micro_batch, args.temperature)
    # 3. The update, a micro-batch at a time.
    for _ in range(args.ppo_epochs):
        sums = backward(model, rollout, advantages, max(1, count["tokens"]), args, old, ref)
        norm = optimizer.step()

    means = {
        "reward": [j.reward for j in judged], "accuracy": [j.correct for j in judged],
        "ndcg": [j.ndcg for j in judged], "format_rate": [j.boxed for j in judged],
        "query_alignment": [j.terms["query_alignment"] for j in judged],
        "preference_alignment": [j.terms["preference_alignment"] for j in judged],
        "truncated": [len(r) >= args.max_new_tokens for r in rollout.responses]}
    sums = optimizer.sum(sums | {name: sum(v) / count["responses"] for name, v in means.items()})
    sums["entropy"] /= max(1, sums.pop("updated"))
    return sums | task.queue.statistics() | {
        "grad_norm": norm, "tokens": count["tokens"], "length": count["tokens"] / count["responses"],
        "seconds_sample": sampled - started, "seconds": time.perf_counter() - started}


# --- answering ------------------------------------------------------------------------------------------

def answer(model, tokenizer, queries, args):
    """One greedy response to each query: [(text, Judged, number of tokens)]."""
    rollout = respond(model, tokenizer, queries, args, 1, greedy=True)
    texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    return [(text, score_response(text, query), len(ids))
            for text, query, ids in zip(texts, queries, rollout.responses)]
