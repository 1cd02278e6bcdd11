"""A project with nothing but small tables, one for each kind, and their results; what its tables of kind `function` measure."""

from pathlib import Path

from actpress.tables import plan, spec
from actpress.tables.kind import Measurement, Project
from actpress.tables.result import Values
from actpress.tables.spec import Table
from actpress.train import provenance, record

FUNCTION = """
title: Two networks
source: no paper
kind: function
measure: small_tables.ratio
default: true
metrics:
  saved: {label: saved, unit: x, tolerance: 0.05}
  cosine: {label: gradient, unit: cosine}
common: [batch=2]
networks:
  - {name: A, overrides: [network=a]}
  - {name: B, overrides: [network=b]}
rows:
  - labels: {method: division}
    overrides: [method.name=division, "method.bits=[2,4]"]
    paper: {saved: 4}
"""
MEMORY = """
title: Predicted
source: a paper
kind: memory
metrics:
  saved_bytes: {label: saved, unit: MiB, tolerance: 0.1}
common: [model=resnet20]
rows:
  - labels: {method: none}
    overrides: [method=none]
    paper: {saved_bytes: 4}
  - labels: {method: actnn}
    requires: method actnn
    paper: {saved_bytes: 0.5}
"""
ERROR = """
title: Error
source: a paper
kind: error
metrics:
  max: {label: largest, unit: absolute, at_most: true}
  floor_max: {label: floor, unit: absolute}
common: [method=inverted, +derivative.variant=gelu]
rows:
  - labels: {dtype: bf16}
    overrides: [+derivative.dtype=bf16]
    paper: {max: 0.0325}
"""
TRAINING = """
title: Trained
source: no paper
kind: training
metrics:
  top1_last: {label: top-1, unit: "%", versus_baseline: difference}
baselines: [{method: none}]
seeds: [0, 1]
common: [model=resnet20, data=digits, recipe=quick]
rows:
  - labels: {method: none}
    overrides: [method=none]
  - labels: {method: division}
    overrides: [method=division]
"""
FIDELITY = """
title: Gradients
source: no paper
kind: fidelity
metrics: {}
common: [model=resnet20, data=digits]
fidelity: {weights: [init, trained], pair: [division, "division, 4 bits"]}
rows:
  - labels: {method: division}
    overrides: [method=division]
  - labels: {method: division, bits: 4 bits}
    overrides: [method=division, method.bits=4]
  - labels: {method: few-bit}
    requires: method few_bit_of_another
"""
PAPER = """
title: A title
source: a paper
kind: memory
metrics:
  saved_bytes: {label: saved, unit: MiB, tolerance: 0.02, versus_baseline: ratio}
baselines: [{method: none}]
common: [model=resnet20]
sweep: {batch: {override: recipe.batch_size, values: [1, 2]}}
rows:
  - labels: {method: none}
    overrides: [method=none]
    paper: {saved_bytes: [4.0, OOM]}
  - labels: {method: division}
    overrides: [method=division]
    paper: {saved_bytes: [1.5, 2.0]}
  - labels: {method: actnn}
    requires: method actnn
    paper: {saved_bytes: [0.4, 0.8]}
"""
TEXTS = {"function": FUNCTION, "memory": MEMORY, "error": ERROR, "training": TRAINING, "fidelity": FIDELITY}
CALLS: list[dict] = []


def ratio(row: dict) -> dict:
    """What the table of kind function measures."""
    CALLS.append(row)
    return {"saved": 4.1 if row["network"] == "a" else 3.0, "cosine": 0.9987654}


class Small(Project):
    """The project; `write` adds tables, by the names of TEXTS."""

    def write(self, *tables: str, **changes: str) -> None:
        """changes: text of a table's YAML -> what takes its place."""
        for name in tables:
            text = TEXTS[name]
            for old, new in changes.items():
                assert old in text
                text = text.replace(old, new)
            (self.tables / f"{name}.yaml").write_text(text)

    def load(self, name: str) -> Table:
        return spec.load(self.tables, name)

    def measurements(self, name: str) -> list[Measurement]:
        return plan.measurements(self.load(name), self)

    def write_runs(self, accuracy: float) -> None:
        """Records of runs for the rows of the table `training`: accuracy plus seed, percent."""
        for m in self.measurements("training"):
            name = record.run_id(m.config)
            epoch = {"epoch": 1, "test_accuracy": accuracy + m.seed, "train_seconds": 30.0, "test_seconds": 5.0}
            found = {"run_id": name, "status": "ok", "history": [epoch], "environment": provenance.environment("cpu")}
            metrics = dict.fromkeys(record.RUN["metrics"]) | {"top1_last": accuracy + m.seed}
            record.write(self.results.root / "runs" / f"{name}.json", found | {"metrics": metrics})


def paper_table(folder: Path, **changes: str) -> Table:
    """A table of two methods that have numbers of a paper and of one that the project does not have, at two batch sizes."""
    text = PAPER
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "small.yaml").write_text(text)
    return spec.load(folder, "small")


def paired_table(folder: Path) -> tuple[Table, list[Values]]:
    """The table in percent, compared by differences, and values of three seeds of two of its rows, the second with one more."""
    changes = {"kind: memory": "kind: training", "unit: MiB": 'unit: "%"'}
    table = paper_table(folder, **changes, **{"versus_baseline: ratio": "versus_baseline: difference"})
    stock = [{"seed": seed, "saved_bytes": value} for seed, value in ((0, 70.0), (1, 80.0), (2, 75.0))]
    ours = [{"seed": seed, "saved_bytes": value} for seed, value in ((2, 74.0), (0, 69.5), (1, 79.0), (3, 10.0))]
    return table, [stock, [], ours, [], [], []]


def create(root: Path) -> Small:
    """An empty project in a folder."""
    project = Small(root)
    (root / "README.md").write_text("No block of a GPU.\n")
    project.tables.mkdir(parents=True)
    project.results.root.mkdir()
    (project.results.root / "LOG.md").write_text("# Log\n")
    CALLS.clear()
    return project


def files(root: Path) -> dict[str, bytes]:
    """Path -> content of all files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
