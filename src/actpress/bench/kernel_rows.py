"""Times of kernels as rows of a CSV file, results/kernels/<device>.csv. Needs no Hydra.

A row is a dict of strings for one thing that was timed: `what` is kernel (in one of its configurations), stock, reference, compiled or
copy. p20, p50 and p80 are quantiles of n single runs. floor_bytes: each input read once and each output written once; moved_bytes: what the
kernel declares. gib_per_s is floor_bytes over p50, for stock too, whatever it moves. fraction_of_copy is the time of a plain copy of
floor_bytes over that of the row, speedup_over_stock that of stock. All rows of a case come from one process on one device.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from actpress.train import files

FIELDS = (
    *("case", "dtype", "what", "config", "status", "n", "p20_ms", "p50_ms", "p80_ms"),
    *("floor_bytes", "moved_bytes", "flops", "gib_per_s", "moved_gib_per_s", "tflops"),
    *("fraction_of_copy", "speedup_over_stock"),
    *("device", "torch", "triton", "cuda", "driver", "commit", "date"),
)
NO_COUNTERPART = "skipped: PyTorch has no counterpart"
Row = dict[str, str]


def row(ms: Iterable[float] = (), **values: object) -> Row:
    """One row, without comparisons and environment. ms: times of single runs, none if the status is not ok."""
    made = dict.fromkeys(FIELDS, "") | {key: str(value) for key, value in values.items()}
    ms = list(ms)
    if ms:
        seconds = float(np.median(ms)) / 1000
        made |= {f"p{q}_ms": f"{np.percentile(ms, q):.6g}" for q in (20, 50, 80)} | {"n": str(len(ms))}
        made["gib_per_s"] = f"{int(made['floor_bytes']) / seconds / 2**30:.5g}"
        if made["what"] == "kernel":
            made["moved_gib_per_s"] = f"{int(made['moved_bytes']) / seconds / 2**30:.5g}"
        if made["flops"] and made["what"] != "copy":
            made["tflops"] = f"{int(made['flops']) / seconds / 1e12:.5g}"
    return made


def compared(rows: list[Row]) -> list[Row]:
    """Fill in fraction_of_copy and speedup_over_stock. rows: of one case, measured in one process."""
    for column, what in (("fraction_of_copy", "copy"), ("speedup_over_stock", "stock")):
        base = next((float(row["p50_ms"]) for row in rows if row["what"] == what and row["p50_ms"]), None)
        for row in rows:
            if base is not None and row["p50_ms"] and row["what"] not in ("copy", what):
                row[column] = f"{base / float(row['p50_ms']):.4g}"
    return rows


def read(path: Path) -> list[Row]:
    """Rows of a file, none if there is no file. Raises ValueError for a table of other columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path} is not a table of this version of scripts/bench_kernels.py; move it away")
        return list(reader)


def write(path: Path, rows: list[Row]) -> None:
    """Replace the file atomically: a run that is interrupted leaves a whole table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def line(row: Row) -> str:
    """A row on one line for the terminal."""
    words = [f"{row['case']} {row['dtype']} {row['what']} {row['config']}".rstrip() + ":"]
    if row["status"] != "ok":
        return " ".join([*words, row["status"]])
    words.append(f"{row['p50_ms']} ms, {row['gib_per_s']} GiB/s")
    words += [
        f"{row[key]} {unit}" for key, unit in (("tflops", "TFLOP/s"), ("fraction_of_copy", "of copy")) if row[key]
    ]
    return ", ".join([" ".join(words[:2]), *words[2:]])
