"""`bench.py gpu`: its report is whole at any moment, whatever becomes of a part."""

import json
import time

import gpu
import policy

def test_a_part_that_fails_is_noted_and_the_others_go_on(tmp_path):
    def part(row, name, do=int):
        row["begun"] = policy.SHARE_PREFIX = name
        ran.append(name)
        do()

    ran, report = [], gpu.Report(tmp_path, {"model": "m"}, 2)
    report.part("right", 1.0, part, "right")
    report.part("wrong", 1.0, part, "wrong", lambda: 1 / 0)
    report.part("slow", 1.0, part, "slow", lambda: time.sleep(60))
    report.part("late", 0.0, part, "late")
    written = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert ran == ["right", "wrong", "slow"] and policy.SHARE_PREFIX is True
    found = [(row.get("begun"), row.get("error", "").split(":")[0]) for row in written.values()]
    assert found == [("right", ""), ("wrong", "ZeroDivisionError"), ("slow", "TimeoutError"),
                     (None, "TimeoutError")]

def test_passes_agree(toy, monkeypatch):
    monkeypatch.setattr(policy, "stop_ids", policy.stop_ids)  # the bench replaces it
    monkeypatch.setattr(gpu.bench.data, "load", lambda name: toy)
    row = {}
    gpu.passes(row, gpu.parse(["--device", "cpu", "--num-candidates", "3", "--new-tokens", "4"]))
    assert row["ok"] and row["float32"]["states_while_sampling"] < 1e-4 and 0 < row["most_nats"] < 0.2
