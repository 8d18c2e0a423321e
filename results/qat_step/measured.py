"""Files that these scripts leave, in the folder of this processor's instructions."""

import csv
import json
from pathlib import Path

from adq_search.provenance import instructions

OUT = Path(__file__).parent / instructions()


def write_table(name, rows, table):
    """Write what was measured, and a table of it: `name`.csv and `name`.md."""
    OUT.mkdir(exist_ok=True)
    with (OUT / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (OUT / f"{name}.md").write_text(table)


def write_made(name, made):
    """Write how it was measured: `name`.json."""
    (OUT / f"{name}.json").write_text(json.dumps(made, indent=2) + "\n")
