"""R2Rank: reason about each (user, candidate) pair, score the rationale, rank (arXiv 2602.12530).

Read top to bottom: prompt, score head, Plackett-Luce, credit, training step, ranking. With s_{i,g} the score
of candidate i = 1..K under its g-th rationale, g = 1..G, and R(sigma) = NDCG@10 the utility of a ranking:

    pl_log_prob    log P(sigma|s) = sum_{k<=k'} [s_{sigma_k} - log sum_{j not in sigma_1..k-1} e^{s_j}]
    pl_sample      sigma ~ PL(s): sort s + Gumbel noise
    expected_ndcg  V(s) = E_{sigma~PL(s)} R(sigma), exactly and differentiably
    score_loss     -V(s), or REINFORCE, -mean_m (R_m - b_m) log P(sigma_m|s), b_m the other R's mean  (--pl)
    item_credit    Q_{i,g} - mean_g Q_{i,g},  Q_{i,g} = mean_{g'} V(s_{1,g'},..,s_{i,g},..,s_{K,g'})
    advantages     item: item_credit / (std Q + delta);  list: (R_g - mean R) / (std R + delta)  (--credit)
    train_step     score loss (mean over lists, columns) + w (clipped token loss + beta k3, mean over tokens)

Deviations and choices (the paper leaves them open unless said otherwise):
  1. s = f(h) reads the state h at the rationale's last token: the score can depend on what was reasoned.
     One that the limit cuts is read in a state that the head was not fitted on: watch `truncated`.
  2. V is exact: with T_j ~ Exp(e^{s_j}) racing, P(rank_i = r) = E[PoiBin_{r-1}({P(T_j < T_i)}_j)], a dynamic
     programme over j. The expectation is an integral over y = s_i + log T_i, by the trapezoid rule, whose
     error does not grow with the gaps between scores (below 1e-7 with 43 nodes).
  3. Item credit is ours: the worth of one rationale with the others resampled. It costs no generation.
  4. Nothing in a prompt depends on the other candidates, so scores do not depend on their order.
  5. The instruction is in the system message, before the history: the suffix is the candidate alone.
  6. A warm-up fits the head alone, on rationales of the model as it is, before credit acts.
  7. Scores are read from the states that sampling computes anyway, and a first update takes the old
     log-probabilities from its own pass. In bfloat16 these states differ from the update's by rounding.
  8. The token loss has weight 1 (10 on the toy, --token-weight). The gradient of E[V] itself would weigh it
     K * mean length * std Q times (18 on the toy), which the divisions by all tokens and by std Q take away.
"""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import policy
import rewards
from data import InputError, Item, describe
from rewards import CUTOFF

PERMUTATIONS = 32           # M, rankings drawn a column with --pl sample
DELTA = 1e-4                # beside standard deviations: equal to within rounding is no advantage
CREDIT_ELEMENTS = 2**24     # numbers held at once while lists are scored again: some 64 MB, several times

SYSTEM = "You are a recommender. Judge whether the user will choose the candidate next."
QUESTION = "Reason step by step, then end with <answer>yes</answer> or <answer>no</answer>."
QUESTION_WITHOUT_REASONING = "Answer with <answer>yes</answer> or <answer>no</answer>."
ANSWER = re.compile(r"<answer>\s*(yes|no)\s*</answer>", re.IGNORECASE)


# --- prompt ---------------------------------------------------------------------------------------------

def build_prompt(tokenizer, history, candidates, reasoning=True, question=None):
    """policy.Prompt of a list: all before the candidate is the prefix; then one suffix a candidate."""
    question = question or (QUESTION if reasoning else QUESTION_WITHOUT_REASONING)
    prefix = "The user's history, oldest first:\n" + "".join(f"- {describe(item)}\n" for item in history)
    suffixes = [f"\nCandidate: {describe(item)}" for item in candidates]
    return policy.encode_prompt(tokenizer, f"{SYSTEM} {question}", prefix, suffixes)

def parse_answer(text):
    """True for a final <answer>yes</answer>, False for no, None where there is neither."""
    found = ANSWER.findall(text)
    return found[-1].lower() == "yes" if found else None


# --- score head -----------------------------------------------------------------------------------------

class ScoreHead(nn.Module):
    """f(h) = Linear(D -> 1024) . GELU . Linear(1024 -> 1), in float32. hidden (..., D) -> scores (...).

    `reasoning` tells what it was trained to read: a rationale's last token, or (False) the bare prompt's.
    """

    def __init__(self, hidden_size, width=1024, reasoning=True):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, 1))
        self.reasoning = reasoning
        nn.init.normal_(self.layers[2].weight, std=0.01 / math.sqrt(width))  # all alike at first
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, hidden):
        return self.layers(hidden.float()).squeeze(-1)

    def save(self, path):
        save_file(self.state_dict(), path, metadata={"reasoning": str(self.reasoning)})

    @classmethod
    def load(cls, path):
        """Raises InputError for a file that is no score head."""
        try:
            with safe_open(path, framework="pt") as f:
                state, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
            width, hidden_size = state["layers.0.weight"].shape
            head = cls(hidden_size, width, metadata.get("reasoning") != "False")
            head.load_state_dict(state)
            return head
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: not a readable score head ({error})") from None


# --- Plackett-Luce --------------------------------------------------------------------------------------

def pl_log_prob(scores, permutation, top_k=None):
    """log P(permutation | scores), truncated after top_k places. (..., K), (..., K) broadcast -> (...)."""
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

def expected_ndcg(scores, relevance, k=CUTOFF):
    """V(s) = E_{sigma ~ PL(s)} NDCG@k(sigma), exact and differentiable. (..., K), (K,) -> (...)."""
    relevance = torch.as_tensor(relevance, dtype=scores.dtype, device=scores.device)
    k = min(k, scores.shape[-1])
    gains, discounts, ideal = rewards.discounted_gains(relevance, k)
    worthy = gains.nonzero().squeeze(-1)  # only items with a gain need the distribution of their rank
    y = torch.arange(-17.0, 4.5, 0.5, dtype=scores.dtype, device=scores.device)
    weights = (y - y.exp()).exp()  # density of y = s_i + log T_i
    weights = weights / weights.sum()
    gaps = scores[..., None, :] - scores[..., worthy, None]  # (..., P, K): s_j - s_i
    # P(T_j < T_i | y) = 1 - exp(-e^{s_j - s_i + y}); beyond e^30 it is 1, and inf * 0 spoils a gradient
    ahead = -torch.expm1(-(gaps[..., None, :] + y[:, None]).clamp(max=30.0).exp())  # (..., P, U, K)
    same = torch.zeros_like(gaps, dtype=torch.bool)
    same[..., torch.arange(len(worthy)), worthy] = True
    ahead = ahead.masked_fill(same[..., None, :], 0.0)
    # counts[r] = P(r others are ahead): (..., P, U, k), so far of no others
    counts = nn.functional.pad(torch.ones_like(ahead[..., :1]), (0, k - 1))
    for q in ahead.unbind(-1):
        q = q[..., None]
        counts = counts * (1 - q) + nn.functional.pad(counts, (1, -1)) * q
    at_rank = torch.einsum("...puk,u->...pk", counts, weights)  # P(rank_i = r + 1)
    return torch.einsum("...pk,p,k->...", at_rank, gains[worthy], discounts) / ideal.clamp(min=1e-9)

def permutation_ndcg(permutation, relevance, k=CUTOFF):
    """NDCG@k of each permutation: (..., K), (K,) -> (...)."""
    gains, discounts, ideal = rewards.discounted_gains(relevance, min(k, permutation.shape[-1]))
    return (gains[permutation][..., :k] * discounts).sum(-1) / ideal.clamp(min=1e-9)

def value(scores, relevance, k=CUTOFF, noise=None):
    """V(s): exact, or a mean over rankings drawn with Gumbel noise (M, K). (..., K) -> (...).

    The noise is the same for all lists: what two lists differ in is then their scores and not their luck.
    """
    if noise is None:
        return expected_ndcg(scores, relevance, k)
    permutations = (scores.detach()[..., None, :] + noise).argsort(-1, descending=True)  # (..., M, K)
    return permutation_ndcg(permutations, relevance, k).mean(-1)

def score_loss(scores, relevance, k=CUTOFF, noise=None):
    """A loss with the gradient -dV/ds, a column each: (K, G) -> (loss (G,), utility (G,) without gradient).

    noise None: exact. noise (M, K): REINFORCE over M permutations a column; baseline: the others' mean.
    """
    columns = scores.T  # (G, K)
    if noise is None:
        utility = expected_ndcg(columns, relevance, k)
        return -utility, utility.detach()
    permutations = (columns.detach()[:, None] + noise).argsort(-1, descending=True)  # (G, M, K)
    utility = permutation_ndcg(permutations, relevance, k)  # (G, M)
    M = utility.shape[1]
    baseline = (utility.sum(1, keepdim=True) - utility) / (M - 1) if M > 1 else 0.0
    return -((utility - baseline) * pl_log_prob(columns[:, None], permutations, k)).mean(1), utility.mean(1)


# --- credit ---------------------------------------------------------------------------------------------

def item_values(scores, relevance, k=CUTOFF, noise=None):
    """Q_{i,g} = mean_{g'} V(column g' with its i-th score replaced by s_{i,g}). (K, G) -> (K, G)."""
    K, scores = len(scores), scores.detach()
    replaced = torch.eye(K, dtype=torch.bool, device=scores.device)[:, None, None, :]  # (K, 1, 1, K)
    lists = torch.where(replaced, scores[:, :, None, None], scores.T[None, None])  # (K, G, G', K)
    at_once = max(1, CREDIT_ELEMENTS // (K * (64 if noise is None else len(noise))))  # bounds the memory
    values = torch.cat([value(rows, relevance, k, noise) for rows in lists.flatten(0, 2).split(at_once)])
    return values.view(lists.shape[:3]).mean(-1)

def item_credit(scores, relevance, k=CUTOFF, noise=None):
    """Q_{i,g} - mean_g Q_{i,g}: what this rationale adds to the list, unscaled. (K, G) -> (K, G)."""
    values = item_values(scores, relevance, k, noise)
    return values - values.mean(1, keepdim=True)

def advantages(scores, relevance, k=CUTOFF, credit="item", noise=None):
    """The advantage of every rationale, (K, G) -> (K, G). Equal worth gives zero, to within rounding."""
    if scores.shape[1] < 2 or credit == "none":
        return torch.zeros_like(scores)
    if credit == "item":
        values = item_values(scores, relevance, k, noise)
        return (values - values.mean(1, keepdim=True)) / (values.std() + DELTA)
    returns = value(scores.detach().T, relevance, k, noise)  # R_g, one a column
    return ((returns - returns.mean()) / (returns.std() + DELTA)).expand_as(scores).clone()


# --- training step --------------------------------------------------------------------------------------

def learning_signal(rollout, scores, relevance, num_lists, pl="exact", credit="item"):
    """What scores (N,) teach: gradient (N,) of the score loss, advantages (N,), V of each list, alive.

    The score loss is a mean over `num_lists` lists, those of all processes. alive: the lists with any signal.
    """
    gradients, credits, utility, alive = [], [], [], []
    for n, (s, y) in enumerate(zip(rollout.by_list(scores), relevance)):
        y = y.to(s.device)
        noise = gumbel((PERMUTATIONS, len(s)), device=s.device) if pl == "sample" else None
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            loss, values = score_loss(leaf, y, noise=noise)
            (gradient,) = torch.autograd.grad(loss.mean(), leaf)
        advantage = advantages(s, y, credit=credit, noise=noise)
        if not s.isfinite().all():  # sorting such scores looks fine; the optimizer refuses what is no number
            gradient = torch.full_like(gradient, math.nan)
        if not (gradient.abs().max() <= 1e-7 and advantage.abs().max() <= 1e-3):
            alive.append(n)
        gradients.append(gradient.flatten() / num_lists)
        credits.append(advantage.flatten())
        utility.append(values.mean().item())
    empty = [scores.new_zeros(0)]  # a process may have no list in this step
    return torch.cat(gradients + empty), torch.cat(credits + empty), utility, alive

def backward(model, head, rollout, signal, tokens, args, old_logprobs=None, ref_logprobs=None):
    """Add the gradient of score loss + token_weight * (token loss + kl_coef * k3). Returns metrics.

    The token loss is divided by `tokens`, those of the whole step: micro-batches, padding and skipped lists
    do not change it. Lists without signal are skipped, unless they pay their KL. old_logprobs None: this is
    the first update on the rollout, and the old log-probabilities are those of now.
    """
    gradient, advantage, _, alive = signal
    sums = dict.fromkeys(("token_loss", "kl", "clipped", "entropy", "updated"), 0.0)
    rows = [n for n, owner in enumerate(rollout.owner) if owner in alive or args.kl_coef]
    for rows, logprobs, mask, hidden in policy.micro_batches(
            model, rollout, args.micro_batch, args.temperature, rows):
        if args.score_gradient == "head":  # then the model learns by the token loss alone
            hidden = hidden.detach()
        loss = (gradient[rows] * head(hidden)).sum()  # its gradient is that of the score loss
        if mask.any():
            old, ref = (x if x is None else x[rows, :mask.shape[1]] for x in (old_logprobs, ref_logprobs))
            token_loss, found = policy.token_loss(
                logprobs, mask, advantage[rows, None], tokens, old, ref, args.kl_coef)
            sums = {name: sums[name] + found[name] for name in sums}
            loss = loss + args.token_weight * token_loss
        loss.backward()
    return sums

def reason(model, tokenizer, lists, args, num_samples, greedy=False):
    """Rationales of lists [(history, candidates)]; without reasoning only the states after the prompts."""
    prompts = [build_prompt(tokenizer, h, candidates, not args.no_reasoning) for h, candidates in lists]
    if not args.no_reasoning:
        sampling = policy.Sampling(args.max_new_tokens, args.temperature, greedy)
        return policy.sample_rows(model, tokenizer, prompts, num_samples, sampling)
    rollout = policy.Rollout(prompts, 1)  # one empty response a candidate
    _, rollout.hidden = policy.all_logprobs(model, rollout, args.micro_batch)
    return rollout

def train_step(model, tokenizer, head, lists, optimizer, args, reference=None):
    """One step of RL on this process's share of the step's lists (data.Example). Returns metrics.

    optimizer: parallel.Optimizer, which adds up over processes; reference: the model before RL, for the KL.
    """
    started = time.perf_counter()
    # 1. G rationales of every candidate, and the model's state at the end of each.
    rollout = reason(model, tokenizer, [(e.history, e.candidates) for e in lists], args, args.group_size)
    relevance = [torch.tensor(e.relevance) for e in lists]
    sampled = time.perf_counter()
    # What losses are divided by is counted over all processes: their gradients then just add up.
    count = optimizer.sum({"lists": len(lists), "rationales": len(rollout.owner),
                           "tokens": sum(map(len, rollout.responses))})
    old, ref, utility = None, None, None
    if args.ppo_epochs > 1:
        old, _ = policy.all_logprobs(model, rollout, args.micro_batch, args.temperature)
    if args.kl_coef:
        ref, _ = policy.all_logprobs(reference, rollout, args.micro_batch, args.temperature)

    for epoch in range(args.ppo_epochs):
        # 2. Scores f(h); the gradient of V with respect to them; what each rationale is worth.
        if epoch:  # the scores have moved
            _, rollout.hidden = policy.all_logprobs(model, rollout, args.micro_batch)
        with torch.no_grad():
            scores = head(rollout.hidden) if lists else torch.zeros(0, device=model.device)
        signal = learning_signal(rollout, scores, relevance, count["lists"], args.pl, args.credit)
        utility = utility or signal[2]
        # 3. Score loss and token loss, a micro-batch at a time.
        sums = backward(model, head, rollout, signal, max(1, count["tokens"]), args, old, ref)
        norm = optimizer.step()

    texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    sums = optimizer.sum(sums | {
        "utility": sum(utility) / count["lists"], "dead_lists": len(lists) - len(signal[3]),
        "format_rate": sum(parse_answer(t) is not None for t in texts) / count["rationales"],
        "truncated": sum(len(r) >= args.max_new_tokens for r in rollout.responses) / count["rationales"],
        "score_std": sum(s.std().item() for s in rollout.by_list(scores)) / count["lists"]})
    sums["entropy"] /= max(1, sums.pop("updated"))
    if args.data == "toy" and not args.no_reasoning:  # there it is known what is worth looking up
        from extras.toy import relevant_lookups
        sums["relevant_lookups"] = relevant_lookups(optimizer.gather(texts))
    return sums | {"grad_norm": norm, "tokens": count["tokens"],
                   "length": count["tokens"] / count["rationales"],
                   "seconds_sample": sampled - started, "seconds": time.perf_counter() - started}


# --- ranking --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ranked:
    item: Item
    score: float
    rationale: str

@torch.no_grad()
def score_lists(model, tokenizer, head, lists, args, num_samples=1):
    """Scores of lists [(history, candidates)]: [(scores (K,), rationales [K][num_samples])].

    One greedy rationale a candidate, or `num_samples` sampled ones whose scores are averaged. head None: the
    model was not trained; then log p(yes) - log p(no) at its answer.
    """
    rollout = reason(model, tokenizer, lists, args, num_samples, greedy=num_samples == 1)
    if getattr(args, "swap_rationales", False):  # does the score listen? each gets its neighbour's rationale
        rows = [block.roll(1, 0).flatten() for block in rollout.by_list(torch.arange(len(rollout.owner)))]
        rollout.responses = [rollout.responses[n] for n in torch.cat(rows).tolist()]
        _, rollout.hidden = policy.all_logprobs(model, rollout, args.micro_batch)
    scores = head(rollout.hidden) if head else answer_log_odds(model, tokenizer, rollout, args.micro_batch)
    texts = iter(tokenizer.batch_decode(rollout.responses, skip_special_tokens=True))
    return [(s.mean(1).float().cpu(), [[next(texts) for _ in row] for row in s])
            for s in rollout.by_list(scores)]

def answer_log_odds(model, tokenizer, rollout, micro_batch=32):
    """log p(yes) - log p(no) after each rationale, (N,). One that never came to its answer is asked."""
    total = {"yes": 0.0, "no": 0.0}
    for word in total:
        responses = []
        for response in rollout.responses:
            thought, found, _ = tokenizer.decode(response, skip_special_tokens=True).partition("<answer>")
            ask = thought + ("" if found or not response else "\n") + f"<answer>{word}"
            responses.append(tokenizer(ask, add_special_tokens=False).input_ids)
        asked = policy.Rollout(rollout.prompts, rollout.num_samples, responses)
        # The thought has the same log-probability before either word: it cancels.
        total[word] = policy.all_logprobs(model, asked, micro_batch)[0].sum(-1)
    return total["yes"] - total["no"]

def rank(model, tokenizer, head, history, candidates, num_samples=1, max_new_tokens=256, temperature=1.0,
         micro_batch=32):
    """Rank candidates for a user with a history, oldest first (data.Items): a list of Ranked, best first.

    head None: zero-shot. The order of the candidates does not matter. Raises TypeError for what is no Item.
    """
    if not all(isinstance(item, Item) for item in [*history, *candidates]):
        raise TypeError("r2r.rank takes lists of data.Item, such as dataset.items[item_id]")
    args = SimpleNamespace(no_reasoning=bool(head) and not head.reasoning, max_new_tokens=max_new_tokens,
                           temperature=temperature, micro_batch=micro_batch)
    (scores, rationales), = score_lists(model, tokenizer, head, [(history, candidates)], args, num_samples)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [Ranked(candidates[i], scores[i].item(), rationales[i][0]) for i in order]

def recommend(model, tokenizer, head, dataset, user, item_ids, top=10, history_length=10, **settings):
    """The best `top` of the items `item_ids` for a user of the data set, as `rank` orders them."""
    history = dataset.history(user, len(dataset.sequences[user]), history_length)
    return rank(model, tokenizer, head, history, [dataset.items[i] for i in item_ids], **settings)[:top]

def load_checkpoint(folder, device="cpu", dtype=torch.float32):
    """(model, tokenizer, head) of a checkpoint's folder; head None where it has none."""
    model, tokenizer = policy.load(str(folder), device, dtype)
    path = Path(folder).expanduser() / "score_head.safetensors"
    return model, tokenizer, ScoreHead.load(path).to(device) if path.exists() else None
