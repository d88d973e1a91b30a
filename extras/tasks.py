"""What train.py's loop needs of each method: its batches, its test, and the lessons of the cold start.

Lessons are a function of the step, so that a resumed run goes on with those that come next:
step -> [(policy.Prompt, texts)], a text for each of the prompt's suffixes, or several for its only one.
R2Rank's traces come from the template teacher (extras/toy.py), from a model, or from a JSONL of {user,
history, candidate, label, trace}; the latter two are kept where the answer equals the label, 1 yes : 2 no.
"""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import policy
import r2r
import rerec
import rewards
from data import InputError, fingerprint, read_lines
from eval import ListTest, RequestTest
from extras import parallel, toy
from extras.queries import query_source

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
    targets, reasoning = dataset.targets("train"), not args.no_reasoning
    words = toy.telling_words(dataset)

    def lessons(step):
        rng, found = random.Random(f"sft/{args.seed}/{step}"), []
        for _ in range(1000):
            target = rng.choice(targets)
            example = dataset.example(target, args.num_candidates, args.history_length, args.seed)
            traces = [(c, *toy.judge_trace(example.history, c, rng, reasoning, words))
                      for c in example.candidates]
            yes, no = [t for t in traces if t[2]], [t for t in traces if not t[2]]
            count = min(3, len(yes), len(no) // 2)
            if count:
                items, texts, _ = zip(*rng.sample(yes, count), *rng.sample(no, 2 * count))
                found.append((r2r.build_prompt(tokenizer, example.history, items, reasoning), list(texts)))
            if len(found) == LISTS_A_STEP:
                return found
        raise InputError(f"{dataset.name}: attributes alone give the template teacher no list with a yes "
                         f"and a no; give --teacher, or --sft-steps 0")
    return lessons

def recorded_lessons(dataset, tokenizer, path, args):
    """R2Rank: lessons from a JSONL of traces. Raises InputError."""
    by_answer, lines = {True: [], False: []}, list(read_lines(path))
    shown = dataset.has_clock or any(x.rating is not None for s in dataset.sequences.values() for x in s)
    for number, line in lines:
        try:
            record = json.loads(line)
            label, trace = bool((0, 1).index(int(record["label"]))), record["trace"]
            ids, user = [str(i) for i in record["history"]], str(record.get("user"))
            places = range(1, len(dataset.sequences.get(user, ())))
            past = (dataset.history(user, place, len(ids)) for place in places)
            history = next((h for h in past if [item.id for item in h] == ids), None)
            if history is None:  # of no user here: only where prompts show neither times nor ratings
                assert not shown, "prompts show times and ratings: `user` must have this history in a row"
                history = [dataset.items[i] for i in ids]
            candidate = dataset.items[str(record["candidate"])]
            trace.encode()  # half a character, which JSON can hold, is no text
            right = r2r.parse_answer(trace) == label
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, AssertionError) as error:
            raise InputError(f"{path} line {number}: expected user, history (ids of items), candidate, label "
                             f"(0 or 1) and trace; {error!r}") from None
        if right:
            text = f"<answer>{'yes' if label else 'no'}</answer>" if args.no_reasoning else trace
            by_answer[label].append((history[-args.history_length:], candidate, text))
    count, rng = min(len(by_answer[True]), len(by_answer[False]) // 2), random.Random(f"sft/{args.seed}")
    if not count:
        raise InputError(f"{path}: the cold start needs correct traces, 1 yes to 2 no")
    kept = rng.sample(by_answer[True], count) + rng.sample(by_answer[False], 2 * count)
    print(f"cold start: {len(kept)} of {len(lines)} traces kept (answer equals label, 1 yes : 2 no)")

    def lessons(step):
        chosen = random.Random(f"sft/{args.seed}/{step}").sample(kept, min(len(kept), 9 * LISTS_A_STEP // 4))
        return [(r2r.build_prompt(tokenizer, history, [candidate], not args.no_reasoning), [text])
                for history, candidate, text in chosen]
    return lessons

def ask_teacher(dataset, args, device, dtype, path):
    """Ask a model about (user, item) pairs, half of them positive; write its right answers to a JSONL."""
    teacher, tokenizer = policy.load(args.teacher, device, dtype, dataset.texts(), args.seed)
    lines, targets = [], dataset.targets("train", f"teacher/{args.seed}")[:PAIRS_ASKED // 2]
    for target in tqdm(targets, desc="teacher", unit="list"):
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
    Path(path).write_text("".join(lines))

def query_lessons(source, tokenizer, args):
    """ReRec: queries with three template traces each; for `tiny` half as many exercises of its look-ups."""
    def lessons(step):
        rng = random.Random(f"sft/{args.seed}/{step}")
        # Other queries than those of RL: the first round over the targets is theirs.
        found = [(q, [toy.answer_trace(q, rng) for _ in range(3)])
                 for q in source.draw("train", QUERIES_A_STEP, start=step * 10**6)]
        if args.model == "tiny":
            found += [(replace(q, text=toy.EXERCISE), [toy.look_up_exercise(q, rng) for _ in range(2)])
                      for q in source.draw("train", QUERIES_A_STEP // 2, start=step * 10**6 + 1)]
        return [(rerec.build_prompt(tokenizer, q, args.personalized), texts) for q, texts in found]
    return lessons

def ranking(args, dataset):
    """What the loop needs of R2Rank: batch(step), lessons(run), test, a tiny tokenizer's texts, hash."""
    targets = dataset.targets("train")

    def batch(step):
        """The lists of a step: epochs over the targets, each in an order of its own (warm-up: below 0)."""
        lists = []
        for n in range(step * args.batch_lists, (step + 1) * args.batch_lists):
            epoch, position = divmod(n, len(targets))
            target = random.Random(f"{args.seed}/train/{epoch}").sample(targets, len(targets))[position]
            lists.append(dataset.example(target, args.num_candidates, args.history_length, args.seed))
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
    digest = hash_of(dataset.training(), dataset.texts(), test.hash)
    return SimpleNamespace(test=test, batch=batch, lessons=lessons, task=None, hash=digest,
                           texts=lambda: toy.ranking_texts(batch(0)[0], dataset))

def answering(args, dataset):
    """The same of ReRec; `task` holds its curriculum and what its rewards look things up in."""
    if unknown := set(args.reward_weights) - set(rerec.WEIGHTS):
        raise InputError(f"--reward-weights: no {', '.join(unknown)}; terms are {', '.join(rerec.WEIGHTS)}")
    kinds, most = args.query_kinds, 2 if args.model == "tiny" else 3  # conditions
    source = query_source(dataset, kinds, most, args.num_candidates, args.history_length, args.seed)
    queries = {q.id: q for q in source.draw("train", args.num_queries)}
    queue = rerec.CurriculumQueue(queries, args.batch_lists, args.tau, not args.no_curriculum, args.seed)
    aligned = (rerec.WEIGHTS | args.reward_weights)["preference_alignment"]
    embeddings = rewards.item_embeddings(dataset, args.cache_dir) if aligned else {}

    def batch(step):
        # 0: for --overfit-one-batch
        return [queries[i] for i in (queue.next_batch() if step else queue.ids[:queue.batch_size])]

    test, texts = RequestTest(dataset, source, args), [q.text for q in queries.values()]
    return SimpleNamespace(
        test=test, batch=batch, lessons=lambda run: query_lessons(source, run.tokenizer, args),
        task=rerec.Task(queue, rewards.attribute_graph(source.graph_items()), embeddings),
        texts=lambda: toy.request_texts(source, dataset, args),
        hash=hash_of(dataset.texts(), texts, fingerprint(queries.values()), test.hash))

def hash_of(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
