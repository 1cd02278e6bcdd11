"""Tables: what a paper printed beside what was measured here.

spec.py       a table's YAML file, checked: metrics, rows, the paper's numbers
kinds/        how a row is measured and where its record lies, one file for each kind of table
kind.py       the interface of a kind; measurements and folders
plan.py       what is recorded, what is to be measured, what cannot run here
result.py     a table's result: what all its pages are rendered from
headlines.py  claims of papers beside results
gradients.py, networks.py  what tables of kind fidelity and the table `networks` compute

A number that was not measured reads "not run" and says what it needs; the paper's "OOM" is a value like any other.
"""
