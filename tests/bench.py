"""Benchmarks; pytest does not collect this file.

    python tests/bench.py load                     1,000,000 interactions and 100,000 items, in the true formats: seconds, peak memory
    python tests/bench.py lightgcn --data beauty   LightGCN on a data set's training interactions: seconds, peak memory
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

LOAD = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import data
started, cpu = time.perf_counter(), time.process_time()
d = data.load(sys.argv[2], cache_dir=sys.argv[3])
print(time.perf_counter() - started, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, len(d.items), sum(map(len, d.sequences.values())))
"""


def write_amazon(cache, users, items, interactions):
    """Files of Amazon 2014 and 2023 in the official formats, with lines as long as the real ones."""
    rng = random.Random(0)
    words = [f"word{n}" for n in range(5000)]
    asins = [f"B{n:09d}" for n in range(items)]
    text = lambda n: " ".join(rng.choices(words, k=n))
    texts = [text(90) for _ in range(500)]
    pairs = [(f"A{rng.randrange(users):012d}", asins[n] if n < items else rng.choice(asins), rng.randint(1, 5), 10**9 + rng.randrange(4 * 10**8))
             for n in range(interactions)]
    old, new = cache / "amazon-2014", cache / "amazon-2023"
    old.mkdir(parents=True)
    new.mkdir()
    with gzip.open(old / "reviews_Beauty_5.json.gz", "wt", compresslevel=1) as f:
        for user, item, rating, t in pairs:
            f.write(json.dumps({"reviewerID": user, "asin": item, "reviewerName": "Some One", "helpful": [0, 0], "reviewText": rng.choice(texts),
                                "overall": float(rating), "summary": "Good", "unixReviewTime": t, "reviewTime": "01 30, 2014"}) + "\n")
    with gzip.open(old / "meta_Beauty.json.gz", "wt", compresslevel=1) as f:
        for item in asins:
            f.write(repr({"asin": item, "description": text(60), "title": text(9), "imUrl": "http://ecx.images-amazon.com/images/I/51.jpg",
                          "price": 9.99, "related": {k: rng.sample(asins, 50) for k in ("also_bought", "also_viewed", "bought_together")},
                          "salesRank": {"Beauty": 12345}, "brand": text(1), "categories": [["Beauty", "Hair Care", text(1)]]}) + "\n")
    with gzip.open(new / "Video_Games.csv.gz", "wt", compresslevel=1) as f:
        f.write("user_id,parent_asin,rating,timestamp\n" + "".join(f"{u},{i},{r}.0,{t}000\n" for u, i, r, t in pairs))
    with gzip.open(new / "meta_Video_Games.jsonl.gz", "wt", compresslevel=1) as f:
        for item in asins:
            f.write(json.dumps({"main_category": "Video Games", "title": text(9), "average_rating": 4.1, "rating_number": 100, "price": 19.99,
                                "features": [text(15) for _ in range(5)], "description": [text(80)], "images": [{"large": "x" * 60}] * 6,
                                "store": text(1), "categories": ["Video Games", "PC", text(1)], "details": {"k": text(20)},
                                "parent_asin": item}) + "\n")


def load(args):
    with tempfile.TemporaryDirectory() as folder:
        print("writing the files …", flush=True)
        write_amazon(Path(folder), args.interactions // 8, args.items, args.interactions)
        for name in ("beauty", "amazon2023:Video_Games"):
            for state in ("files", "cache", "cache"):
                out = subprocess.run([sys.executable, "-c", LOAD, str(ROOT), name, folder], capture_output=True, text=True, check=True).stdout
                seconds, cpu, gigabytes, items, interactions = out.split()
                print(f"{name:<24} from the {state:<6} {float(seconds):6.1f} s ({float(cpu):.1f} s CPU)   peak {float(gigabytes):.2f} GB   {items} items, "
                      f"{interactions} interactions", flush=True)


LIGHTGCN = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch, data, eval as evaluation
d = data.load(sys.argv[2])
started = time.perf_counter()
ranker = evaluation.fit_baselines(d, ["lightgcn"])["lightgcn"]
seconds = time.perf_counter() - started
gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
rows = evaluation.full_ranking(d, ranker, d.targets("validation")[:5000])
print(seconds, gigabytes, sum(r["ndcg@10"] for r in rows) / len(rows), sum(map(len, d.training().values())), torch.get_num_threads())
"""


def lightgcn(args):
    out = subprocess.run([sys.executable, "-c", LIGHTGCN, str(ROOT), args.data], capture_output=True, text=True, check=True).stdout
    seconds, gigabytes, ndcg, interactions, threads = out.split()
    print(f"LightGCN, {interactions} training interactions of {args.data}, {threads} threads: {float(seconds):.0f} s with its validation, peak "
          f"{float(gigabytes):.2f} GB; NDCG@10 over the whole catalogue {float(ndcg):.4f} (validation)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("load")
    p.add_argument("--interactions", type=int, default=10**6)
    p.add_argument("--items", type=int, default=10**5)
    p.set_defaults(run=load)
    p = commands.add_parser("lightgcn")
    p.add_argument("--data", default="beauty")
    p.set_defaults(run=lightgcn)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
