"""Every table in results/README.md is what its command prints of the files beside it."""

import re
from pathlib import Path

import pytest

from extras import report

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "results/README.md").read_text()
TABLES = re.findall(r"```bash\n(python extras/report\.py [^\n]*)\n```\n\n```\n(.*?)```", TEXT, re.S)

assert len(TABLES) >= 2

@pytest.mark.parametrize("command, table", TABLES, ids=[command.split()[2] for command, _ in TABLES])
def test_a_table_is_what_its_command_prints(command, table, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = [str(path) for pattern in command.split()[2:] for path in sorted(Path(".").glob(pattern))]
    report.main(files)
    printed = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    assert printed == [line.rstrip() for line in table.strip().splitlines()]

def test_no_stored_result_names_a_place_of_the_machine_that_made_it():
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.search(r'"/(home|root|mnt|tmp|work)/', path.read_text()), path
