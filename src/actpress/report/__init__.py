"""Pages made from results; the only code that renders.

markdown.py, html.py, terminal.py   a table's result as Markdown, as a part of results/report.html, as text
text.py, plots.py                   numbers and figures that these share
pages.py                            the pages of results/: write them, and find those that do not fit the records
reproduce.py                        measure what a table lacks, then print and write it
battery.py, kernels.py              the pages of a GPU battery and of kernel benchmarks
"""
