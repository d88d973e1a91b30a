r"""ReRec: answer a request by reasoning about its candidates, with shaped rewards and GRPO (arXiv 2604.07851).

Read top to bottom: prompts and traces, reward, advantage, curriculum, rollout, update, evaluation. With G responses
i = 1..G to a query, p_i the item that response i boxes and t the right one (METHODS §2):

    score_response      r_i = NDCG@K(p_i) + 0.1 F_i + w1 QAS_i + w2 PAS_i;  without a box -0.5 for NDCG and F = -0.5, else F = 0.5
    query_alignment     QAS(p, t) = |N(p) & N(t)| / |N(t)| on the item-attribute graph                         (rewards.py)
    preference_alignment PAS(p, t) = cosine of LightGCN embeddings                                             (rewards.py)
    segment_rewards     r_{i,t} = r_i, or r_i - w_pen |r_i| on the paragraphs that name the wrong item boxed   (RAAE)
    group_advantages    A_{i,t} = (r_{i,t} - mean) / (std + 1e-6) over all valid tokens of the G responses
    backward            clipped token loss (rho, eps) + beta k3, divided by all tokens of the optimiser step   (policy.py)
    CurriculumQueue     d(q) = mean_i (1 - NDCG@1(p_i)); the next epoch drops d < tau and goes on in ascending d

Deviations and choices (the paper's text leaves them open unless said otherwise):
  1. Penalised tokens have r - w_pen |r|, which is the paper's (1 - w_pen) r where r > 0; for r < 0 that product would be a gift.
  2. Characters, not single decoded tokens, decide which paragraph a token lies in (`token_offsets`); every paragraph with a box is
     exempt; a title counts as named when it stands as whole words and not as a part of another candidate's longer title.
  3. A group in which all tokens have the same reward has zero advantage exactly, and no update is made for it (but its KL's).
  4. Difficulties belong to query ids (the released code attaches them by position); the last, incomplete batch of an epoch is kept,
     since it is the hardest.
  5. Several truths: PAS takes the largest; with K answers QAS and PAS are those of the first.
  6. Titles are matched exactly, up to case, quotes and white space; text in a title that spells a box is defused in the prompt.
  7. The built-in template teacher is deliberately hasty: it narrows the candidates down condition by condition, truly, but
     three times in five it answers with what came to its mind before it began. The cold start teaches format and evidence,
     reinforcement learning to answer by the evidence.
  8. The instruction stands in the system message, and the request before the candidates, which then can be read in its light.
  9. Where no response of a group is right, what is left are the small rewards (alignment 0.01, RAAE 0.3 of 0.05), and dividing by their standard
     deviation makes them as strong as right against wrong. `--min-std` bounds that; 0, the default, is the paper's formula.
"""

import random
import re
from dataclasses import dataclass, field, replace

import torch

import policy
from data import Query, describe, facts_of
from rewards import (find_box, ndcg_at_k, normalise, parse_answers, parse_boxed, preference_alignment, query_alignment,
                     shown_title)

SYSTEM = ("You are a recommendation assistant. Reason in short paragraphs, then answer with {} as \\boxed{{{}}}.")
DRILL = "Go through the candidates."


# --- prompts and traces ------------------------------------------------------------------------------------------------


def system_message(list_length=1):
    if list_length == 1:
        return SYSTEM.format("the title of the best candidate", "title")
    return SYSTEM.format(f"the titles of the {list_length} best candidates, best first,", "title; title")


def build_prompt(tokenizer, query, personalized=False, list_length=1):
    """policy.Prompt of one query. The G responses share all of it, so its one suffix is just the template's assistant header."""
    history = [f"- {describe(replace(item, title=shown_title(item)))}\n" for item in query.history] if personalized else []
    prefix = ("My history, oldest first:\n" + "".join(history) if history else "") + f"Request: {query.text}\nCandidates:\n"
    prefix += "".join(f"- {shown_title(c)}\n" for c in query.candidates)
    # Whatever an item's text or the request spells, quoting it must not make an answer (titles: `shown_title`).
    return policy.encode_prompt(tokenizer, system_message(list_length), re.sub(r"\\+boxed", "boxed", prefix), [""])


def template_trace(query, rng, list_length=1):
    """A response of the template teacher (choice 7): a claim about the candidate that comes to mind first, then for each condition
    a candidate that meets it and those before it. The answer is the first item named, three times in five, or the last.

    Each claim stands right beside its evidence, which costs a small model one look-up.
    """
    conditions = list(query.conditions)
    if not conditions:  # unknown, or none: what the right items have in common
        truths = [c for c in query.candidates if c.id in query.truths]
        conditions = [f for f in facts_of(truths[0]) if all(f in facts_of(t) for t in truths)]
        conditions = rng.sample(conditions, min(len(conditions), max(1, query.num_conditions)))
    first = rng.choice(query.candidates)
    lines, left, last = [_claim(f, first) for f in facts_of(first)[:1]], query.candidates, first
    for name, value in conditions:
        meeting = [c for c in query.candidates if value in c.attributes.get(name, ())]
        if not meeting:  # what no candidate shows (RecBench+: a film's actors), the teacher does not claim
            continue
        left = [c for c in left if c in meeting] or meeting
        last = rng.choice(left)
        lines.append(_claim((name, value), last))
    chosen = first if rng.random() < 0.6 else last
    answers = [chosen, *rng.sample([c for c in query.candidates if c != chosen], min(list_length, len(query.candidates)) - 1)]
    return "\n".join([*lines, f"\\boxed{{ {'; '.join(shown_title(a) for a in answers)}}}"])


def _claim(fact, item):
    return f"{fact[0].replace('_', ' ')} {fact[1]} {shown_title(item)}"


def template_drill(query, rng, num_claims=16):
    """A lesson for models from nothing: (query that only asks to go through the candidates, `num_claims` true claims about them)."""
    facts = {}
    for c in query.candidates:
        for fact in facts_of(c):
            facts.setdefault(fact, []).append(c)
    claims = [_claim(fact, rng.choice(facts[fact])) for fact in rng.choices(sorted(facts), k=num_claims if facts else 0)]
    return replace(query, text=DRILL), "\n".join(claims)


# --- reward ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What became of one response: its reward and the parts of it, and the item ids it answered (None: no candidate's title)."""

    reward: float
    ndcg: float  # NDCG@K of the answers, without the -0.5 that stands for a missing box
    correct: bool  # the first answer is right
    boxed: bool
    answers: tuple[str | None, ...]
    title: str  # the first answer's, "" when it is no candidate
    query_alignment: float
    preference_alignment: float


def answers_ndcg(answers, truths, k):
    """NDCG@k of the ids answered; a right item that was not answered ranks below k that were."""
    relevance = [float(a in truths) for a in answers]
    return ndcg_at_k(relevance + [0.0] * (k - len(relevance)) + [1.0] * (len(truths) - int(sum(relevance))), k)


def score_response(text, query, graph=None, embeddings=None, weights=(0.01, 0.01), list_length=1):
    """r = NDCG@K + 0.1 F + w1 QAS + w2 PAS of one response (METHODS §2); K = list_length, further answers do not count."""
    boxed = parse_boxed(text)
    answers = parse_answers(boxed, query.candidates)[:list_length]
    first, ids = answers[0] if answers else None, tuple(a.id if a else None for a in answers)
    ndcg = answers_ndcg(ids, query.truths, list_length)
    qas = query_alignment(first.id, query.truths, graph or {}) if first and weights[0] else 0.0
    pas = preference_alignment(first.id, query.truths, embeddings or {}) if first and weights[1] else 0.0
    shaped = weights[0] * qas + weights[1] * pas
    reward = (ndcg + 0.05 if boxed is not None else -0.5 - 0.05) + shaped
    return Judged(reward, ndcg, first is not None and first.id in query.truths, boxed is not None, ids, shown_title(first) if first else "", qas, pas)


# --- advantage -------------------------------------------------------------------------------------------------------------


def token_offsets(tokenizer, ids):
    """(text, [(start, end)] a token, in characters of the text). Special tokens are empty.

    Tokenising the text again need not give the sampled ids, and one token may hold a part of a character only. So tokens are
    decoded after those before them; while the text ends in an unfinished character they wait, and then share its span.
    """
    text, offsets, start, waiting = "", [], 0, 0  # ids[start:n] is the window that gives ids[n] its context
    shown = ""  # what the window has given so far
    for n in range(len(ids)):
        waiting += 1
        now = tokenizer.decode(ids[start:n + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if now.endswith("\ufffd") and waiting < 4 and n + 1 < len(ids):  # no character has more than four bytes
            continue
        piece = now[len(shown):]
        offsets += [(len(text), len(text) + len(piece))] * waiting
        text += piece
        if n + 1 - start > 16:  # keep the window short: linear time
            start = n + 1 - waiting
            now = tokenizer.decode(ids[start:n + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        shown, waiting = now, 0
    return text, offsets


def names_title(paragraph, title, others=()):
    """Whether a paragraph names a title as whole words, with or without its "(year)", and not inside one of the `others`, likewise.

    Without the year it is not named where another's whole title is just that.
    """
    def undated(words):
        return re.sub(r" ?\(\d{4}\)$", "", words)

    def stands(words):
        return rf"(?<!\w){re.escape(words)}(?!\w)"

    paragraph, title, others = normalise(paragraph), normalise(title), set(map(normalise, others))
    bare = undated(title)
    longer = {words for other in others for words in (other, undated(other)) if bare and bare in words} - {title, bare}
    for words in sorted(longer, key=lambda w: (-len(w), w)):
        paragraph = re.sub(stands(words), "\n", paragraph)
    return bool(title and re.search(stands(title), paragraph)
                or bare and bare not in others and re.search(stands(bare) + r"(?! ?\(\d{4}\))", paragraph))


def segment_rewards(text, offsets, reward, predicted_title, correct, penalty, other_titles=()):
    """Reward of every token (RAAE): `reward`, less penalty * |reward| in the paragraphs that name the wrong item boxed.

    offsets: (start, end) of each token in `text`; paragraphs end at newlines (\\n, \\r\\n or \\r); those with a box, or that
    the first box reaches into, are exempt. other_titles: the other candidates', some of which may contain the predicted one.
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
    """A = (r - mean) / (std + 1e-6), mean and std over all valid tokens of a query's G responses. (G, T), (G, T) bool -> (G, T).

    0 where the mask is not set, and everywhere when all valid tokens have the same reward. A smaller std counts as min_std (choice 9).
    """
    valid = token_rewards[mask].double()
    if not len(valid) or valid.max() - valid.min() < 1e-9:  # in float, equal rewards need not have a std of zero
        return torch.zeros_like(token_rewards)
    advantages = (token_rewards.double() - valid.mean()) / (valid.std(correction=0).clamp(min=min_std) + 1e-6)
    return torch.where(mask, advantages, 0.0).to(token_rewards.dtype)


# --- curriculum --------------------------------------------------------------------------------------------------------------


class CurriculumQueue:
    """Which queries come next. Epochs after the first drop what was easy (d < tau) and go on from easy to hard (METHODS §2).

    Drops accumulate; when fewer than one batch would remain, all return. The first epoch is in the order given. With
    enabled=False every epoch holds all queries, shuffled from the seed.
    """

    def __init__(self, ids, batch_size, tau=0.1, enabled=True, seed=0):
        if len(set(ids)) != len(ids):
            raise ValueError("query ids must be unique")
        self.ids, self.batch_size, self.tau, self.enabled, self.seed = list(ids), batch_size, tau, enabled, seed
        self.epoch, self.position, self.difficulty, self.dropped = 0, 0, {}, set()
        self.pool = self.ids if enabled else self._shuffled()

    def next_batch(self):
        """The next ids, at most batch_size; the last batch of an epoch may be smaller. Starts an epoch when one is through."""
        if self.position >= len(self.pool):
            self._next_epoch()
        batch = self.pool[self.position:self.position + self.batch_size]
        self.position += len(batch)
        return batch

    def record(self, query_id, ndcg_at_1):
        """Difficulty from the group's rewards: d = mean (1 - NDCG@1)."""
        self.difficulty[query_id] = sum(1.0 - x for x in ndcg_at_1) / len(ndcg_at_1)

    def _next_epoch(self):
        self.epoch, self.position = self.epoch + 1, 0
        if not self.enabled:
            self.pool = self._shuffled()
            return
        hardness = {i: self.difficulty.get(i, 1.0) for i in self.ids}  # never rolled out (a run cut short): hard
        self.dropped |= {i for i in self.pool if hardness[i] < self.tau}
        if len(self.ids) - len(self.dropped) < self.batch_size:
            self.dropped = set()
        self.pool = sorted((i for i in self.ids if i not in self.dropped), key=hardness.get)  # stable: ties keep their order

    def _shuffled(self):
        return random.Random(f"{self.seed}/{self.epoch}").sample(self.ids, len(self.ids))

    def statistics(self):
        known = [self.difficulty[i] for i in self.pool if i in self.difficulty]
        return {"epoch": self.epoch, "pool": len(self.pool), "dropped": len(self.dropped),
                "difficulty": sum(known) / len(known) if known else 1.0}

    def state_dict(self):
        """Plain values, fit for JSON."""
        return {"epoch": self.epoch, "position": self.position, "difficulty": dict(self.difficulty),
                "dropped": sorted(self.dropped), "pool": list(self.pool)}

    def load_state_dict(self, state):
        if unknown := set(state["pool"]) - set(self.ids):
            raise ValueError(f"the curriculum's state names {len(unknown)} queries that are not here, for instance {min(unknown)!r}")
        self.epoch, self.position = state["epoch"], state["position"]
        self.difficulty, self.dropped, self.pool = dict(state["difficulty"]), set(state["dropped"]), list(state["pool"])


# --- rollout -----------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """G responses to each of B queries; row b * G + g. logprobs, ref_logprobs, advantages, mask: (B G, T)."""

    queries: list[Query]
    group_size: int
    prefixes: list[list[int]]
    owner: list[int]
    suffixes: list[list[int]]
    responses: list[list[int]] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None


def generate(model, tokenizer, queries, group_size, sampling, personalized=False, list_length=1):
    """Sample G responses to each query. The prompt is prefilled once a query."""
    prompts = [build_prompt(tokenizer, q, personalized, list_length) for q in queries]
    rows = [n for n in range(len(queries)) for _ in range(group_size)]
    rollout = Rollout(queries, group_size, [p.prefix_ids for p in prompts], rows, [prompts[n].suffix_ids[0] for n in rows])
    rollout.responses, _ = policy.sample_rows(model, tokenizer, rollout.prefixes, rollout.owner, rollout.suffixes, sampling)
    return rollout


def judge(tokenizer, rollout, graph=None, embeddings=None, weights=(0.01, 0.01), penalty=0.3, list_length=1, min_std=0.0):
    """Fill in what became of each response and its tokens' advantages. penalty 0: no RAAE. Returns the rollout."""
    G, width = rollout.group_size, max(map(len, rollout.responses), default=0)
    token_rewards, mask = torch.zeros(len(rollout.owner), width), torch.zeros(len(rollout.owner), width, dtype=torch.bool)
    rollout.judged = []
    for row, (n, ids) in enumerate(zip(rollout.owner, rollout.responses)):
        query = rollout.queries[n]
        text, offsets = token_offsets(tokenizer, ids)
        judged = score_response(text, query, graph, embeddings, weights, list_length)
        titles = [shown_title(c) for c in query.candidates]
        token_rewards[row, :len(ids)] = torch.tensor(
            segment_rewards(text, offsets, judged.reward, judged.title, judged.correct, penalty, titles))
        mask[row, :len(ids)] = True
        rollout.judged.append(judged)
    rollout.advantages = torch.cat([group_advantages(r, m, min_std) for r, m in zip(token_rewards.split(G), mask.split(G))])
    return rollout


@torch.no_grad()
def score(model, rollout, temperature=1.0, micro_batch=32, share_prefix=True, reference=None):
    """Fill in log-probabilities, by the forward path of the update: of `model` (None: left to the update), and of `reference`."""
    rows = (rollout.prefixes, rollout.owner, rollout.suffixes, rollout.responses, temperature, micro_batch, share_prefix)
    if model is not None:
        rollout.logprobs, _, _ = policy.all_logprobs(model, *rows)
    if reference is not None:
        rollout.ref_logprobs, _, _ = policy.all_logprobs(reference, *rows)
    return rollout


# --- update ------------------------------------------------------------------------------------------------------------------


def updated_rows(rollout, kl_coef=0.0):
    """The rows that the update goes through: those of groups with an advantage; all, where every group pays its KL."""
    alive = {rollout.owner[n] for n in rollout.advantages.any(1).nonzero().flatten().tolist()}
    return [n for n, o in enumerate(rollout.owner) if o in alive or kl_coef]


def count_tokens(rollout, kl_coef=0.0):
    """What `backward` divides by: {"tokens": of all responses, "updated": of those that the update goes through}."""
    lengths = [len(r) for r in rollout.responses]
    return {"tokens": sum(lengths), "updated": sum(lengths[n] for n in updated_rows(rollout, kl_coef))}


def backward(model, rollout, clip=0.2, kl_coef=0.0, temperature=1.0, micro_batch=32, share_prefix=True, counts=None):
    """Add the gradient of clipped loss + kl_coef * k3 to the parameters. Returns metrics.

    Both are sums over tokens divided by the tokens of the whole rollout, so micro-batches, padding and skipped groups do not
    change them. Groups without advantage are skipped, unless they still pay their KL. Where the rollout was not scored, this is
    the first update on it: the old log-probabilities are those of now, and are left in it. counts: `count_tokens` of the whole
    step, where the rollout is one process's part of it (None: the rollout's own); gradients and metrics then are this part's
    share, to be summed.
    """
    rows, alive = updated_rows(rollout, kl_coef), {rollout.owner[n] for n in updated_rows(rollout)}
    counts, fresh = counts or count_tokens(rollout, kl_coef), rollout.logprobs is None
    tokens, updated = max(1, counts["tokens"]), max(1, counts["updated"])
    if fresh:
        rollout.logprobs = torch.zeros(len(rollout.owner), max(map(len, rollout.responses), default=0), device=model.device)
    totals = {"token_loss": 0.0, "kl": 0.0, "clipped": 0.0, "entropy": 0.0, "dead_groups": len(rollout.queries) - len(alive)}
    for prefix, owner, part in policy.micro_batches(model, rollout.prefixes, rollout.owner, rollout.suffixes, rollout.responses,
                                                    micro_batch, share_prefix, rows):
        logprobs, mask, _ = policy.row_logprobs(
            prefix, owner, [rollout.suffixes[n] for n in part], [rollout.responses[n] for n in part], temperature)
        width = mask.shape[1]
        if fresh:
            rollout.logprobs[part, :width] = logprobs.detach()
        totals["entropy"] -= logprobs.detach()[mask].sum().item() / updated
        old, advantage = rollout.logprobs[part, :width], rollout.advantages[part, :width].to(logprobs.device)
        loss = policy.clipped_loss(logprobs, old, advantage, clip)[mask].sum() / tokens
        totals["token_loss"] += loss.item()
        totals["clipped"] += ((((logprobs - old).exp() - 1).abs() > clip) & mask).sum().item() / tokens
        if kl_coef:
            kl = policy.k3_kl(logprobs, rollout.ref_logprobs[part, :width])[mask].sum() / tokens
            totals["kl"] += kl.item()
            loss = loss + kl_coef * kl
        loss.backward()
    return totals


# --- evaluation --------------------------------------------------------------------------------------------------------------


METRICS = ("accuracy", "ndcg@10", "format_rate", "length")


def query_metrics(answers, truths, boxed=True, length=0):
    """Metrics of one response, from the ids it answers: accuracy (top-1), NDCG@10 of its list, format, tokens."""
    return {"accuracy": float(bool(answers) and answers[0] in truths), "ndcg@10": answers_ndcg(answers, truths, 10), "format_rate": float(boxed),
            "length": float(length)}


def random_metrics(queries, list_length=1, seed=0):
    """The same of a guess: `list_length` candidates at random."""
    rng = random.Random(f"random/{seed}")
    return [query_metrics([c.id for c in rng.sample(q.candidates, min(list_length, len(q.candidates)))], q.truths) for q in queries]


def answer(model, tokenizer, queries, sampling, personalized=False, list_length=1):
    """One response to each query, greedy if `sampling` says so: [(text, metrics)]."""
    rollout = generate(model, tokenizer, queries, 1, sampling, personalized, list_length)
    results = []
    for query, ids in zip(queries, rollout.responses):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        judged = score_response(text, query, weights=(0.0, 0.0), list_length=list_length)
        results.append((text, query_metrics(judged.answers, query.truths, judged.boxed, len(ids))))
    return results


OPEN_ENDED = "You are a recommendation assistant. Answer with the titles that fit the request, best first, separated by [SEP], and nothing else."


def answer_open_ended(model, tokenizer, queries, sampling):
    """Responses to the requests alone, without candidates, for rewards.open_ended: texts."""
    prompts = [policy.encode_prompt(tokenizer, OPEN_ENDED, re.sub(r"\[+SEP\]+", "SEP", f"Request: {q.text}"), [""]) for q in queries]
    rows, _ = policy.sample_rows(model, tokenizer, [p.prefix_ids for p in prompts], list(range(len(prompts))), [p.suffix_ids[0] for p in prompts], sampling)
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
