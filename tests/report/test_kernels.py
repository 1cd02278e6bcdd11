"""The page and the plot of kernel times."""

import pytest

from actpress.bench import kernel_rows
from actpress.report import kernels


def invented(case, dtype, what, config="", ms=(1.0, 1.1, 1.2), status="ok", flops=""):
    """A row with numbers that were not measured, for the page and the plot alone."""
    values = {"case": case, "dtype": dtype, "what": what, "config": config, "status": status, "flops": flops}
    where = {"device": "Invented GPU", "torch": "0", "triton": "0", "commit": "0", "date": "2000-01-01"}
    return kernel_rows.row(ms, floor_bytes=2**30, moved_bytes=2**30, **values, **where)


@pytest.fixture
def rows():
    """An encoder at .9 and .8 of copy bandwidth, a faster second configuration; a product 2.5 times faster than stock; one that is red."""
    found = []
    for dtype, ms in (("float32", 1.0), ("bfloat16", 1.125)):
        found += kernel_rows.compared(
            [
                invented("encode", dtype, "copy", ms=(0.9, 0.9, 0.9)),
                invented("encode", dtype, "kernel", "default A=1", ms=(ms, ms, ms)),
                invented("encode", dtype, "kernel", "A=2", ms=(0.95, 0.95, 0.95)),
            ]
        )
    found += kernel_rows.compared(
        [
            invented("product", "float32", "copy", ms=(0.1,), flops=10**12),
            invented("product", "float32", "kernel", "default B=1", ms=(2.0,), flops=10**12),
            invented("product", "float32", "stock", ms=(5.0,), flops=10**12),
        ]
    )
    return [*found, invented("broken", "float32", "kernel", "default", ms=(), status="red: tensor 0: all | differ")]


def test_page(rows):
    page = kernels.page(rows)
    assert page.startswith("# Kernels: Invented GPU\n") and "interpreter" not in page
    moving, products = page.split("## Matrix products")
    assert "| encode | float32 | 3 | 1 (1 to 1) | 1e+03 | 0.9 | 1.00 |" in moving.replace("1000", "1e+03")
    assert "At 85% of copy bandwidth or better: 1 of 2." in moving
    assert "| product | float32 | 1 | 2 (2 to 2) | 500 | 2.5 | 5 (5 to 5) |" in products
    assert "- encode bfloat16: A=2, 0.95 (0.95 to 0.95) instead of 1.12 (1.12 to 1.12)" in page
    assert "| broken | float32 | kernel default | red: tensor 0: all / differ |" in page
    assert "Measured on 2000-01-01: Invented GPU, torch 0, triton 0, commit 0." in page


def test_plot(rows, tmp_path):
    left, right = kernels.figure(rows).axes
    assert [bar.get_width() for bar in left.patches] == [0.8, 0.9], "the first case on top"
    assert [label.get_text() for label in left.get_yticklabels()] == ["encode, bfloat16", "encode, float32"]
    assert [bar.get_width() for bar in right.patches] == [2.5]
    goals = [[line.get_xdata()[0] for line in axes.lines] for axes in (left, right)]
    assert goals == [[0.85], [2, 3]]


def test_page_and_plot_of_nothing(tmp_path):
    path = tmp_path / "empty.csv"
    kernel_rows.write(path, [])
    kernels.render(path)
    assert path.with_suffix(".png").stat().st_size > 0 and "nothing measured" in path.with_suffix(".md").read_text()
