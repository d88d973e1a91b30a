"""What train.py's loop needs of each method: its batches, its test, and the lessons of the cold start.

A source of lessons is a function of the step, so that a resumed run goes on with the very lessons that come
next: step -> [(policy.Prompt, texts)], a text for each of the prompt's suffixes, or several for its only
one.

R2Rank's "self-reflective" traces come from the template teacher (extras/toy.py), from a model
(`ask_teacher`), or from a JSONL made elsewhere. Those of a model or a file are kept only if their answer
equals the label; 1 yes to 2 no.
"""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import data
import policy
import r2r
import rerec
import rewards
from data import InputError, read_lines
from eval import ListTest, RequestTest
from extras import parallel, toy
from extras.queries import query_source
from extras.toy import answer_trace, judge_trace, look_up_exercise

LISTS_A_STEP = 4      # R2Rank: lists with up to 9 traces each
QUERIES_A_STEP = 8    # ReRec: queries with 3 traces each
PAIRS_ASKED = 1000    # (user, item) pairs that a teacher model is asked about
QUESTION = """Answer in three labelled parts:
#Initial reasoning: what in the history speaks for and against the candidate.
#Self-check: what the first part may have overlooked.
#Final conclusion: one sentence.
Then end with <answer>yes</answer> or <answer>no</answer>."""

def template_lessons(dataset, tokenizer, args):
    """R2Rank: of each list up to 3 candidates that the template teacher likes, and twice as many others."""
    targets = dataset.targets("train")

    def lessons(step):
        rng, found = random.Random(f"sft/{args.seed}/{step}"), []
        for _ in range(1000):
            target = rng.choice(targets)
            example = dataset.example(target, args.num_candidates, args.history_length, args.seed)
            reasoning = not args.no_reasoning
            traces = [(c, *judge_trace(example.history, c, reasoning)) for c in example.candidates]
            yes, no = [t for t in traces if t[2]], [t for t in traces if not t[2]]
            count = min(3, len(yes), len(no) // 2)
            if count:
                chosen = rng.sample(yes, count) + rng.sample(no, 2 * count)
                prompt = r2r.build_prompt(tokenizer, example.history, [c for c, _, _ in chosen], reasoning)
                found.append((prompt, [text for _, text, _ in chosen]))
            if len(found) == LISTS_A_STEP:
                return found
        raise InputError(f"{dataset.name}: the template teacher tells no candidates apart: it needs "
                         f"attributes that items share, such as a brand; give --teacher a model or a file of "
                         f"traces, or do without a cold start: --sft-steps 0")
    return lessons

def recorded_lessons(dataset, tokenizer, path, args):
    """R2Rank: lessons from a JSONL of {user, history, candidate, label, trace}. Raises InputError."""
    by_answer, total = {True: [], False: []}, 0
    for number, line in read_lines(path):
        total += 1
        try:
            record = json.loads(line)
            label, trace = record["label"], record["trace"]
            if label not in (0, 1, "0", "1", True, False):
                raise ValueError(f"label {label!r} is neither 0 nor 1")
            label = bool(int(label))
            history = _history(dataset, record, args.history_length)
            candidate = dataset.items[str(record["candidate"])]
            trace.encode()  # half a character, which JSON can hold, is no text
            right = r2r.parse_answer(trace) == label
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} line {number}: expected an object with user, history (item ids of the "
                             f"catalogue), candidate, label (0 or 1) and trace; {error!r}") from None
        if right:
            text = trace if not args.no_reasoning else f"<answer>{'yes' if label else 'no'}</answer>"
            by_answer[label].append((history, candidate, text))
    count = min(len(by_answer[True]), len(by_answer[False]) // 2)
    if not count:
        raise InputError(f"{path}: {len(by_answer[True])} correct yes and {len(by_answer[False])} correct no "
                         f"traces; the cold start needs 1 yes to 2 no")
    rng = random.Random(f"sft/{args.seed}")
    kept = rng.sample(by_answer[True], count) + rng.sample(by_answer[False], 2 * count)
    print(f"cold start: {len(kept)} of {total} traces kept (answer equals label, 1 yes : 2 no)")

    def lessons(step):
        chosen = random.Random(f"sft/{args.seed}/{step}").sample(kept, min(len(kept), 9 * LISTS_A_STEP // 4))
        return [(r2r.build_prompt(tokenizer, history, [candidate], not args.no_reasoning), [text])
                for history, candidate, text in chosen]
    return lessons

def _history(dataset, record, length):
    """The history of a record as RL shows it: times and ratings are looked up in the user's own sequence."""
    ids = [str(i) for i in record["history"]]
    user = str(record.get("user"))
    for position in range(1, len(dataset.sequences.get(user, ()))):
        history = dataset.history(user, position, len(ids))
        if [item.id for item in history] == ids:
            return history[-length:]
    if dataset.has_clock or any(x.rating is not None for x in next(iter(dataset.sequences.values()), ())):
        raise ValueError("prompts show times and ratings here, so `user` must be one whose interactions hold "
                         "this history in a row")
    return [dataset.items[i] for i in ids][-length:]

def ask_teacher(dataset, args, device, dtype, path):
    """Ask a model about (user, item) pairs, half of them positive; write all its right answers to a JSONL."""
    teacher, tokenizer = policy.load(args.teacher, device, dtype, dataset.texts(), args.seed)
    lines, targets = [], dataset.targets("train", f"teacher/{args.seed}")[:PAIRS_ASKED // 2]
    bar = tqdm(targets, desc="teacher", unit="list")
    for target in bar:
        example = dataset.example(target, args.num_candidates, args.history_length, args.seed)
        positive = example.relevance.index(1.0)
        pair = [example.candidates[positive], example.candidates[positive - 1]]
        prompt = r2r.build_prompt(tokenizer, example.history, pair, question=QUESTION)
        answers = policy.sample(teacher, tokenizer, prompt.prefix_ids, prompt.suffix_ids, 1,
                                max_new_tokens=512, temperature=args.temperature)
        for item, label, (ids,) in zip(pair, (1, 0), answers):
            trace = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if r2r.parse_answer(trace) == bool(label):
                lines.append(json.dumps({"user": example.user, "history": [x.id for x in example.history],
                                         "candidate": item.id, "label": label, "trace": trace}) + "\n")
        bar.set_postfix(kept=len(lines))
    Path(path).write_text("".join(lines))

def query_lessons(source, tokenizer, args):
    """ReRec: queries with three template traces each; for `tiny` half as many exercises of its look-ups."""
    def lessons(step):
        rng = random.Random(f"sft/{args.seed}/{step}")
        # Other queries than those of RL: the first round over the targets is theirs.
        found = [(q, [answer_trace(q, rng) for _ in range(3)])
                 for q in source.draw("train", QUERIES_A_STEP, start=step * 10**6)]
        if args.model == "tiny":
            for q in source.draw("train", QUERIES_A_STEP // 2, start=step * 10**6 + 1):
                exercise = replace(q, text="Go through the candidates.")
                found.append((exercise, [look_up_exercise(q, rng) for _ in range(2)]))
        return [(rerec.build_prompt(tokenizer, q, args.personalized), texts)
                for q, texts in found]
    return lessons


# --- the two methods, as the loop sees them -------------------------------------------------------------

def ranking(args, dataset):
    """What the loop needs of R2Rank: batch(step), lessons(run), test, a tiny tokenizer's texts, hash."""
    targets = dataset.targets("train")

    def batch(step):
        """The lists of a step: epochs over the targets, each in an order of its own (warm-up: below 0)."""
        lists = []
        for n in range(step * args.batch_lists, (step + 1) * args.batch_lists):
            epoch, position = divmod(n, len(targets))
            order = random.Random(f"{args.seed}/train/{epoch}").sample(targets, len(targets))
            lists.append(dataset.example(order[position], args.num_candidates, args.history_length,
                                         args.seed))
        return lists

    def lessons(run):
        if not args.teacher:
            return template_lessons(dataset, run.tokenizer, args)
        path = Path(args.teacher)
        if not path.is_file():
            path = run.out / "traces.jsonl"
            if parallel.rank() == 0 and not path.exists():
                ask_teacher(dataset, args, str(run.model.device), run.model.dtype, path)
            parallel.gather([])  # until it is there
        return recorded_lessons(dataset, run.tokenizer, path, args)

    test = ListTest(dataset, args)
    return SimpleNamespace(test=test, batch=batch, lessons=lessons, task=None,
                           texts=lambda: toy.ranking_texts(batch(0)[0], dataset),
                           hash=hash_of(dataset.training(), dataset.texts(), test.hash))

def answering(args, dataset):
    """The same of ReRec; `task` holds its curriculum and what its rewards look things up in."""
    source = query_source(dataset, args.query_kinds, 2 if args.model == "tiny" else 3, args.num_candidates,
                          args.history_length, args.seed)
    queries = {q.id: q for q in source.draw("train", args.num_queries)}
    queue = rerec.CurriculumQueue(queries, args.batch_lists, args.tau, not args.no_curriculum, args.seed)
    if unknown := set(args.reward_weights) - set(rerec.WEIGHTS):
        raise InputError(f"--reward-weights: no {', '.join(unknown)}; terms are {', '.join(rerec.WEIGHTS)}")
    embeddings = {}
    if (rerec.WEIGHTS | args.reward_weights)["preference_alignment"]:
        embeddings = rewards.item_embeddings(dataset, args.cache_dir)
    test = RequestTest(dataset, source, args)
    def batch(step):
        ids = queue.next_batch() if step else queue.ids[:queue.batch_size]  # 0: for --overfit-one-batch
        return [queries[i] for i in ids]

    return SimpleNamespace(
        test=test, batch=batch,
        lessons=lambda run: query_lessons(source, run.tokenizer, args),
        task=rerec.Task(queue, rewards.attribute_graph(source.graph_items()), embeddings),
        texts=lambda: toy.request_texts(source, dataset, args),
        hash=hash_of(dataset.texts(), [q.text for q in queries.values()], data.fingerprint(queries.values()),
                     test.hash))

def hash_of(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
