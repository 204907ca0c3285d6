"""Wide tables in outputs: a reader sees the first columns, and all of them on a click."""

import re

SHOWN = 6  # columns
ROW = re.compile(r"^\|.*\|$")


def cells_of(line):
    "The cells of a line of a table; a bar after a backslash belongs to a cell."
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def folded(lines):
    "A table in Markdown, as lines. A wide one becomes its first columns, and the whole behind them."
    columns = len(cells_of(lines[0]))
    if columns <= SHOWN:
        return lines
    front = [f"| {' | '.join(cells_of(line)[:SHOWN])} |" for line in lines]
    return [*front, "", f"<details><summary>All {columns} columns</summary>", "", *lines, "", "</details>", ""]


def fold_tables(text):
    "Markdown with its wide tables folded."
    done, table = [], []
    for line in [*text.split("\n"), ""]:
        if ROW.match(line):
            table.append(line)
            continue
        done += folded(table) if table else []
        table = []
        done.append(line)
    return "\n".join(done[:-1])


def fold_outputs(cell):
    "Fold the tables of a cell's outputs."
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = fold_tables("".join(data["text/markdown"]))
