"""R2Rank: reason about each (user, candidate) pair, score the rationale, rank the scores ("Reasoning to Rank", arXiv 2602.12530).

Read top to bottom: prompts, score head, Plackett-Luce, credit, rollout, update, ranking. With scores s_{i,g} of candidate
i = 1..K under its g-th rationale, g = 1..G (METHODS §1):

    pl_log_prob     log P(sigma|s) = sum_{k<=k'} [s_{sigma_k} - log sum_{j not in sigma_1..sigma_{k-1}} exp(s_j)]
    pl_sample       sigma ~ PL(s): sort s + Gumbel noise
    expected_ndcg   V(s) = E_{sigma~PL(s)} NDCG@k(sigma), exactly and differentiably
    score_loss      -V(s) (`exact`), or -mean_m (R_m - b_m) log P(sigma_m|s) with b_m = mean of the other R (`sample`, REINFORCE)
    item_credit     Q_{i,g} = mean_{g'} V(s_{1,g'},..,s_{i,g},..,s_{K,g'});  returns Q_{i,g} - mean_g Q_{i,g}
    advantages      item: item_credit / (std Q + delta);  list: (R_g - mean R) / (std R + delta), the same for all K rationales
    update          sum of the score loss (mean over lists and columns) and the clipped token loss (mean over the step's tokens)

Deviations and choices (the papers' text leaves them open unless said otherwise):
  1. s = f(h) reads the hidden state h at the *rationale's* last token, so that the score can depend on what was reasoned.
  2. V is computed exactly: with T_j ~ Exp(e^{s_j}) racing, P(rank_i = r) = E[PoiBin_{r-1}({P(T_j < T_i)}_j)], a dynamic programme
     over j. METHODS integrates over u in (0, 1) by Gauss-Legendre; we integrate over y = s_i + log T_i by the trapezoid rule,
     whose error does not grow with the gaps between scores (below 1e-7 with 43 nodes).
  3. `item` credit is ours: the marginal worth of one rationale with the others resampled; no further generation.
  4. Nothing in a prompt depends on the other candidates, and rows are processed in an order of their own: scores do not
     depend on the order of the candidates, to the last bit when rationales are greedy.
  5. The built-in template teacher is deliberately hasty (it counts all the evidence and judges by the first attribute), and its
     traces are kept when wrong: the cold start teaches format and evidence, reinforcement learning the judgement. With --facts there
     is a careful one (`--teacher tally`, which adds up weights of evidence), whose traces are kept, too. Those of a real teacher are
     kept only when their answer equals the label.
  6. The instruction stands in the system message, so before the history: the suffix is the candidate alone, a third as long as
     with the instruction behind it.
  7. A warm-up fits the head alone, on stored rationales, before the backbone learns from its credit (`fit_score_head`).
  8. Scores are read from the hidden states that sampling computes anyway, and an only update takes the old log-probabilities from its
     own pass, so that no pass is needed between the two. In bfloat16 these states differ from the update's by rounding: the credit
     is given for a score a little beside the one that moves.
"""

import copy
import functools
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import policy
from data import InputError, Item, describe, facts_text
from rewards import discounted_gains

CREDIT_ELEMENTS = 2**24  # what re-scored lists take at once: some 64 MB, several times
DELTA = 1e-4  # added to standard deviations: groups that agree to within rounding get no advantage

SYSTEM = "You are a recommender. Judge whether the user will choose the candidate next."
QUESTION = "Reason step by step, then end with <answer>yes</answer> or <answer>no</answer>."
QUESTION_WITHOUT_REASONING = "Answer with <answer>yes</answer> or <answer>no</answer>."
QUESTION_TO_TEACHER = """Answer in three labelled parts:
#Initial reasoning: what in the history speaks for and against the candidate.
#Self-check: what the first part may have overlooked.
#Final conclusion: one sentence.
Then end with <answer>yes</answer> or <answer>no</answer>."""
ANSWER = re.compile(r"<answer>\s*(yes|no)\s*</answer>", re.IGNORECASE)


# --- prompts and traces ------------------------------------------------------------------------------------------------


def build_prompt(tokenizer, history, candidates, reasoning=True, question=None):
    """policy.Prompt of one list: everything up to the candidate is the prefix, the rest is one suffix a candidate.

    Where the candidates come with facts in the place of text, neither the history nor a title is shown.
    """
    question = question or (QUESTION if reasoning else QUESTION_WITHOUT_REASONING)
    prefix = "The user's history, oldest first:\n" + "".join(f"- {describe(item)}\n" for item in history)
    if only_facts := all(c.only_facts for c in candidates):
        prefix = ""
    return policy.encode_prompt(tokenizer, f"{SYSTEM} {question}", prefix,
                                [f"\nCandidate:{facts_text(c)}" if only_facts else f"\nCandidate: {describe(c)}" for c in candidates])


def parse_answer(text):
    """True for a final <answer>yes</answer>, False for no, None where there is neither."""
    found = ANSWER.findall(text)
    return found[-1].lower() == "yes" if found else None


def template_trace(history, candidate, reasoning=True):
    """The template teacher: (response text, its answer). Each claim repeats the attribute beside its evidence: one look-up."""
    counts = candidate.facts or {f"{name} {values[-1]}": sum(values[-1] in item.attributes.get(name, ()) for item in history)
                                 for name, values in candidate.attributes.items()}
    yes = bool(counts) and next(iter(counts.values())) >= (5 if candidate.facts else max(1, round(0.2 * len(history))))
    evidence = facts_text(candidate).strip() or ", ".join(f"{claim} {n}" for claim, n in counts.items()) or "nothing known"
    answer = f"<answer>{'yes' if yes else 'no'}</answer>"
    return (f"In the history: {evidence}.\n{answer}" if reasoning else answer), yes


def tally_trace(candidate, scorecard, reasoning=True):
    """The tally teacher: (response text, its answer). Each fact that has points is repeated beside them, and they are added to the sum so
    far: a step needs one look-up and one small sum, and the last sum, which the score head reads from nearby, has gathered all the facts."""
    total, steps = 0, []
    for name, level in candidate.facts.items():
        if points := scorecard.points[name][level]:
            steps.append(f" [{name} {level}] {total}+{points}={total + points}")
            total += points
    yes = total >= scorecard.threshold
    answer = f"<answer>{'yes' if yes else 'no'}</answer>"
    return (f"Tally:{''.join(steps) or ' nothing'}\n{answer}" if reasoning else answer), yes


# --- the score head ------------------------------------------------------------------------------------------------------


class ScoreHead(nn.Module):
    """f(h) = Linear(D -> 1024) . GELU . Linear(1024 -> 1), in float32. hidden (…, D) -> scores (…).

    `reasoning` tells what the head was trained to read: a rationale's last token, or (False) the bare prompt's.
    """

    def __init__(self, hidden_size, width=1024, reasoning=True):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, 1))
        self.reasoning = reasoning
        nn.init.normal_(self.layers[2].weight, std=0.01 / math.sqrt(width))  # starts near "all candidates alike"
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, hidden):
        return self.layers(hidden.float()).squeeze(-1)

    def save(self, path):
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path, metadata={"reasoning": str(self.reasoning)})

    @classmethod
    def load(cls, path):
        try:
            with safe_open(path, framework="pt") as f:
                state, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
            width, hidden_size = state["layers.0.weight"].shape
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path}: not a readable score head ({error})") from None
        head = cls(hidden_size, width, metadata.get("reasoning") != "False")
        head.load_state_dict(state)
        return head


# --- Plackett-Luce -------------------------------------------------------------------------------------------------------


def pl_log_prob(scores, permutation, top_k=None):
    """log P(permutation | scores), truncated after the first top_k places. (…, K), (…, K) broadcast -> (…)."""
    scores, permutation = torch.broadcast_tensors(scores, permutation)
    ranked = scores.gather(-1, permutation)
    remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)  # log sum of exp over this place and all after it
    return (ranked - remaining)[..., :top_k].sum(-1)


def gumbel(shape, generator=None, device=None):
    return -torch.empty(shape, device=device).exponential_(generator=generator).log()


def pl_sample(scores, num_samples, generator=None):
    """Permutations drawn from PL(scores), best first: scores (K,) -> (num_samples, K)."""
    noise = gumbel((num_samples, *scores.shape), generator, scores.device)
    return (scores.detach() + noise).argsort(-1, descending=True)


def expected_ndcg(scores, relevance, k=10):
    """V(s) = E_{sigma ~ PL(s)} NDCG@k(sigma), exact (deviation 2) and differentiable. (…, K), (K,) -> (…)."""
    relevance = torch.as_tensor(relevance, dtype=scores.dtype, device=scores.device)
    k = min(k, scores.shape[-1])
    gains, discounts, ideal = discounted_gains(relevance, k)
    if ideal == 0:
        return scores.sum(-1) * 0.0
    worthy = gains.nonzero().squeeze(-1)  # only items with a gain need their rank's distribution
    y = torch.arange(-17.0, 4.5, 0.5, dtype=scores.dtype, device=scores.device)
    weights = (y - y.exp()).exp()  # density of y = s_i + log T_i
    weights = weights / weights.sum()
    gaps = scores[..., None, :] - scores[..., worthy, None]  # (…, P, K): s_j - s_i
    # P(T_j < T_i | y) = 1 - exp(-e^{s_j - s_i + y}); beyond e^30 it is 1, and inf * 0 would spoil the gradient
    ahead = -torch.expm1(-(gaps[..., None, :] + y[:, None]).clamp(max=30.0).exp())  # (…, P, U, K)
    itself = torch.zeros_like(gaps, dtype=torch.bool)
    itself[..., torch.arange(len(worthy)), worthy] = True
    ahead = ahead.masked_fill(itself[..., None, :], 0.0)
    counts = nn.functional.pad(torch.ones_like(ahead[..., :1]), (0, k - 1))  # (…, P, U, k): P(r others ahead), so far r = 0
    for q in ahead.unbind(-1):
        q = q[..., None]
        counts = counts * (1 - q) + nn.functional.pad(counts, (1, -1)) * q
    at_rank = torch.einsum("...puk,u->...pk", counts, weights)  # P(rank_i = r + 1)
    return torch.einsum("...pk,p,k->...", at_rank, gains[worthy], discounts) / ideal


def permutation_ndcg(permutation, relevance, k=10):
    """NDCG@k of each permutation: (…, K), (K,) -> (…)."""
    gains, discounts, ideal = discounted_gains(relevance, min(k, permutation.shape[-1]))
    if ideal == 0:
        return gains.new_zeros(permutation.shape[:-1])
    return (gains[permutation][..., :k] * discounts).sum(-1) / ideal


def sampled_ndcg(scores, relevance, k, noise):
    """Monte Carlo V(s) with given Gumbel noise (M, K), the same for every list (common random numbers). (…, K) -> (…)."""
    permutations = (scores.detach()[..., None, :] + noise).argsort(-1, descending=True)  # (…, M, K)
    return permutation_ndcg(permutations, relevance, k).mean(-1)


def score_loss(scores, relevance, k=10, noise=None):
    """Loss whose gradient is -dV/ds, a column each: scores (K, G) -> (loss (G,), utility (G,) without gradient).

    noise None: exact. noise (M, K): REINFORCE over M permutations a column, baseline = mean utility of the M - 1 others.
    """
    columns = scores.T  # (G, K)
    if noise is None:
        value = expected_ndcg(columns, relevance, k)
        return -value, value.detach()
    permutations = (columns.detach()[:, None] + noise).argsort(-1, descending=True)  # (G, M, K)
    utility = permutation_ndcg(permutations, relevance, k)  # (G, M)
    m = utility.shape[1]
    baseline = (utility.sum(1, keepdim=True) - utility) / (m - 1) if m > 1 else 0.0
    return -((utility - baseline) * pl_log_prob(columns[:, None], permutations, k)).mean(1), utility.mean(1)


# --- credit ----------------------------------------------------------------------------------------------------------------


def item_values(scores, relevance, k=10, noise=None):
    """Q_{i,g} = mean_{g'} V(column g' with its i-th score replaced by s_{i,g}). (K, G) -> (K, G), no gradient."""
    K = scores.shape[0]
    scores = scores.detach()
    replaced = torch.eye(K, dtype=torch.bool, device=scores.device)[:, None, None, :]  # (K, 1, 1, K)
    lists = torch.where(replaced, scores[:, :, None, None], scores.T[None, None])  # (K, G, G', K)
    value = expected_ndcg if noise is None else functools.partial(sampled_ndcg, noise=noise)
    size = max(1, CREDIT_ELEMENTS // (K * (64 if noise is None else len(noise))))  # lists at once: bounded memory, however many they are
    return torch.cat([value(part, relevance, k) for part in lists.flatten(0, 2).split(size)]).view(lists.shape[:3]).mean(-1)


def item_credit(scores, relevance, k=10, noise=None):
    """Q_{i,g} - mean_g Q_{i,g}: what this rationale adds to the list, before any scaling. (K, G), (K,) -> (K, G)."""
    values = item_values(scores, relevance, k, noise)
    return values - values.mean(1, keepdim=True)


def advantages(scores, relevance, k=10, credit="item", noise=None):
    """Advantage of every rationale, (K, G) -> (K, G). A group whose rationales are worth the same gets zero, to within
    rounding, which `signal` does not count as alive."""
    if scores.shape[1] < 2:
        return torch.zeros_like(scores)
    if credit == "item":
        values = item_values(scores, relevance, k, noise)
        return (values - values.mean(1, keepdim=True)) / (values.std() + DELTA)
    returns = score_loss(scores.detach(), relevance, k, noise)[1]
    return ((returns - returns.mean()) / (returns.std() + DELTA)).expand_as(scores).clone()


# --- rollout -----------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Lists with their rationales. Rows run over lists, candidates, samples: row (l, i, g) is number (l * K + i) * G + g.

    Lists may differ in K. responses: ids, one list a row; logprobs and ref_logprobs (N, T), 0 beyond a response's end;
    hidden (N, D), scores (N,).
    """

    prompts: list[policy.Prompt]
    relevance: list[torch.Tensor]
    group_size: int
    responses: list[list[int]]
    logprobs: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None

    def __post_init__(self):
        self.prefixes = [p.prefix_ids for p in self.prompts]
        self.owner = [n for n, p in enumerate(self.prompts) for _ in p.suffix_ids for _ in range(self.group_size)]
        self.suffixes = [s for p in self.prompts for s in p.suffix_ids for _ in range(self.group_size)]

    def lists(self, values):
        """Cut a tensor of rows (N, …) into one (K, G, …) tensor a list."""
        sizes = [len(p.suffix_ids) * self.group_size for p in self.prompts]
        return [part.view(-1, self.group_size, *values.shape[1:]) for part in values.split(sizes)]


def generate(model, tokenizer, prompts, relevance, group_size, sampling, reasoning=True):
    """Sample `group_size` rationales a candidate (none without reasoning: one empty response, the head reads the prompt)."""
    rollout = Rollout(prompts, relevance, group_size if reasoning else 1, [])
    if reasoning:
        rollout.responses, rollout.hidden = policy.sample_rows(model, tokenizer, rollout.prefixes, rollout.owner, rollout.suffixes, sampling)
    else:
        rollout.responses = [[] for _ in rollout.owner]
    return rollout


@torch.no_grad()
def score(model, score_head, rollout, temperature=1.0, micro_batch=32, share_prefix=True, reference=None):
    """Fill in the scores, and log-probabilities and hidden states by the very forward path of the update. Returns the rollout.

    model None: the hidden states are those of sampling, and the log-probabilities are left to the update (choice 8).
    """
    rows = (rollout.prefixes, rollout.owner, rollout.suffixes, rollout.responses, temperature, micro_batch, share_prefix)
    if model is not None:
        rollout.logprobs, _, rollout.hidden = policy.all_logprobs(model, *rows)
    rollout.scores = score_head(rollout.hidden) if score_head else None
    if reference is not None:
        rollout.ref_logprobs, _, _ = policy.all_logprobs(reference, *rows)
    return rollout


@dataclass
class Signal:
    """What a rollout teaches: gradient (N,) of the score loss with respect to each score, and advantage (N,) of each rationale.

    utility: mean over lists and columns of V (or its estimate), or a process's share of it; alive: the lists that carry any signal.
    """

    score_gradient: torch.Tensor
    advantages: torch.Tensor
    utility: float
    alive: list[int]


def signal(rollout, k=10, credit="item", permutations=0, generator=None, num_lists=None):
    """Score gradients and advantages of a scored rollout. permutations = 0: exact V; else Monte Carlo over so many.

    num_lists: of the whole step, where the rollout is one process's part of it (None: the rollout's own).
    """
    if not rollout.prompts:  # a process that has no list in this step
        return Signal(rollout.scores, rollout.scores, 0.0, [])
    num_lists = num_lists or len(rollout.prompts)
    gradients, credits, utilities, alive = [], [], [], []
    for n, (scores, relevance) in enumerate(zip(rollout.lists(rollout.scores), rollout.relevance)):
        relevance = relevance.to(scores.device)
        noise = gumbel((permutations, len(scores)), generator).to(scores.device) if permutations else None
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            loss, utility = score_loss(leaf, relevance, k, noise)
            (gradient,) = torch.autograd.grad(loss.mean(), leaf)
        advantage = advantages(scores, relevance, k, credit, noise)
        if gradient.abs().max() > 1e-7 or advantage.abs().max() > 1e-3:
            alive.append(n)
        gradients.append(gradient.flatten() / num_lists)
        credits.append(advantage.flatten())
        utilities.append(utility.mean())
    return Signal(torch.cat(gradients), torch.cat(credits), (torch.stack(utilities).sum() / num_lists).item(), alive)


# --- update ------------------------------------------------------------------------------------------------------------------


def backward(model, score_head, rollout, signal, clip=0.2, kl_coef=0.0, temperature=1.0, micro_batch=32, share_prefix=True, tokens=None):
    """Add the gradient of score loss + token loss to the parameters; lists without signal are skipped. Returns metrics.

    The token loss is divided by the rationale tokens of the whole rollout, so that micro-batches, padding and skipped lists
    do not change it. With `kl_coef` the skipped lists still pay their KL. Where the rollout has no log-probabilities, this is the
    first update on it: the old ones are those of now, and are left in it. tokens: of the whole step, where the rollout is one
    process's part of it (None: the rollout's own); gradients and metrics then are this part's share, to be summed. "entropy" is a
    sum over the "updated" tokens.
    """
    rows = [n for n, o in enumerate(rollout.owner) if o in set(signal.alive) or kl_coef]
    lengths = [len(r) for r in rollout.responses]
    tokens, fresh = max(1, sum(lengths) if tokens is None else tokens), rollout.logprobs is None
    if fresh:
        rollout.logprobs = torch.zeros(len(rollout.owner), max(lengths, default=0), device=model.device)
    totals = {**dict.fromkeys(("token_loss", "kl", "clipped", "entropy"), 0.0), "updated": sum(lengths[n] for n in rows)}
    for prefix, owner, part in policy.micro_batches(model, rollout.prefixes, rollout.owner, rollout.suffixes, rollout.responses,
                                                    micro_batch, share_prefix, rows):
        logprobs, mask, hidden = policy.row_logprobs(
            prefix, owner, [rollout.suffixes[n] for n in part], [rollout.responses[n] for n in part], temperature)
        loss = (signal.score_gradient[part] * score_head(hidden)).sum()  # its gradient is the score loss's
        if mask.any():
            width = mask.shape[1]
            if fresh:
                rollout.logprobs[part, :width] = logprobs.detach()
            totals["entropy"] -= logprobs.detach()[mask].sum().item()
            old, advantage = rollout.logprobs[part, :width], signal.advantages[part, None]
            token_loss = policy.clipped_loss(logprobs, old, advantage, clip)[mask].sum() / tokens
            totals["token_loss"] += token_loss.item()
            outside = ((logprobs - old).exp() - 1).abs() > clip
            totals["clipped"] += (outside & mask).sum().item() / tokens
            loss = loss + token_loss
            if kl_coef:
                kl = policy.k3_kl(logprobs, rollout.ref_logprobs[part, :width])[mask].sum() / tokens
                totals["kl"] += kl.item()
                loss = loss + kl_coef * kl
        loss.backward()
    return totals


def fit_score_head(score_head, hidden, relevance, optimizer, k=10, epochs=10):
    """Warm-up: maximise the exact V over stored hidden states, the head alone. hidden: a (K, G, D) tensor a list; relevance (K,).

    A fresh head gives random credit, which teaches the backbone nonsense from its first step (METHODS §4); one that knows its
    few lists by heart is certain of the wrong things. So every fourth list is held out, and the head of the epoch that ranks
    those best is kept. Returns its V on them (on all lists, where there are fewer than four).
    """
    held_out = range(3, len(hidden), 4) or range(len(hidden))
    fitted = [n for n in range(len(hidden)) if n not in held_out or len(hidden) < 4]
    relevance = [y.to(h.device) for y, h in zip(relevance, hidden)]

    @torch.no_grad()
    def value():
        return sum(expected_ndcg(score_head(hidden[n]).T, relevance[n], k).mean().item() for n in held_out) / len(held_out)

    best, state = value(), copy.deepcopy(score_head.state_dict())
    for _ in range(epochs):
        for n in torch.tensor(fitted)[torch.randperm(len(fitted))].tolist():
            optimizer.zero_grad()
            score_loss(score_head(hidden[n]), relevance[n], k)[0].mean().backward()
            optimizer.step()
        if (now := value()) > best:
            best, state = now, copy.deepcopy(score_head.state_dict())
    optimizer.zero_grad()
    score_head.load_state_dict(state)
    return best


# --- ranking -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    item: Item
    score: float
    rationale: str


@torch.no_grad()
def scored_rollout(model, tokenizer, score_head, lists, sampling, num_samples=1, micro_batch=32, reasoning=True):
    """The Rollout that `score_lists` averages: every rationale's own score, sampled as `sampling` says."""
    prompts = [build_prompt(tokenizer, history, candidates, reasoning) for history, candidates in lists]
    empty = [torch.zeros(len(p.suffix_ids)) for p in prompts]
    rollout = generate(model, tokenizer, prompts, empty, num_samples, sampling, reasoning)
    if score_head is not None:
        return score(None if reasoning else model, score_head, rollout, sampling.temperature, micro_batch, sampling.share_prefix)
    rollout.scores = answer_log_odds(model, tokenizer, rollout, micro_batch, sampling.share_prefix)
    return rollout


@torch.no_grad()
def score_lists(model, tokenizer, score_head, lists, sampling, num_samples=1, micro_batch=32, reasoning=True):
    """Score candidates as a trained (or, without a head, an untrained) model does.

    lists: [(history, candidates)]. Rationales are greedy for num_samples = 1, else sampled and their scores averaged.
    Returns [(scores (K,), rationales [K][num_samples])]. Without a head: log p(yes) - log p(no) at the answer position.
    """
    sampling = replace(sampling, greedy=num_samples == 1)
    rollout = scored_rollout(model, tokenizer, score_head, lists, sampling, num_samples, micro_batch, reasoning)
    texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    results, start = [], 0
    for part in rollout.lists(rollout.scores):
        rows = iter(texts[start:start + part.numel()])
        results.append((part.mean(1).float().cpu(), [[next(rows) for _ in range(part.shape[1])] for _ in range(len(part))]))
        start += part.numel()
    return results


def answer_log_odds(model, tokenizer, rollout, micro_batch=32, share_prefix=True):
    """log p(yes) - log p(no) after each rationale, (N,). A rationale that never came to its answer is asked for it."""
    contexts, words = [], {"yes": [], "no": []}
    for suffix, ids in zip(rollout.suffixes, rollout.responses):
        before, found, _ = tokenizer.decode(ids, skip_special_tokens=True).partition("<answer>")
        end = len(ids)
        while end and len(tokenizer.decode(ids[:end], skip_special_tokens=True)) > len(before):
            end -= 1
        if end and ids[end - 1] in tokenizer.all_special_ids:
            end -= 1
        ask = before[len(tokenizer.decode(ids[:end], skip_special_tokens=True)):] + ("" if found or not ids else "\n")
        endings = [tokenizer(f"{ask}<answer>{word}", add_special_tokens=False).input_ids for word in words]
        common = len(os.path.commonprefix(endings))
        contexts.append(suffix + ids[:end] + endings[0][:common])
        for word, ending in zip(words, endings):
            words[word].append(ending[common:])
    rows = (model, rollout.prefixes, rollout.owner, contexts)
    if all(len(ending) == 1 for endings in words.values() for ending in endings):  # one pass tells both
        *_, hidden = policy.all_logprobs(*rows, [[]] * len(contexts), 1.0, micro_batch, share_prefix)
        layer, bias = model.get_output_embeddings(), getattr(model.get_output_embeddings(), "bias", None)
        yes, no = (torch.tensor(endings, dtype=torch.long, device=hidden.device).flatten() for endings in words.values())
        # in float32, as bfloat16 logits of 16 and more are an eighth apart; the softmax's denominator cancels
        odds = (hidden.float() * (layer.weight[yes].float() - layer.weight[no].float())).sum(-1)
        return odds if bias is None else odds + bias[yes].float() - bias[no].float()
    yes, no = (policy.all_logprobs(*rows, endings, 1.0, micro_batch, share_prefix)[0].sum(-1) for endings in words.values())
    return yes - no


def rank(model, tokenizer, score_head, history, candidates, num_samples=1, max_new_tokens=256, temperature=1.0, micro_batch=32):
    """Rank `candidates` (Items) for a user with `history` (Items, oldest first): a list of `Ranked`, best first.

    score_head None: zero-shot. The order in which the candidates come does not matter.
    """
    reasoning = score_head.reasoning if score_head else True
    (scores, rationales), = score_lists(model, tokenizer, score_head, [(history, candidates)],
                                        policy.Sampling(max_new_tokens, temperature), num_samples, micro_batch, reasoning)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [Ranked(candidates[i], scores[i].item(), rationales[i][0]) for i in order]


def load_checkpoint(folder, device="cpu", dtype=torch.float32):
    """(model, tokenizer, score_head) of a checkpoint directory; score_head is None where there is no score_head.safetensors."""
    model, tokenizer = policy.load(str(folder), device, dtype)
    path = Path(folder).expanduser() / "score_head.safetensors"
    return model, tokenizer, ScoreHead.load(path).to(device) if path.exists() else None
