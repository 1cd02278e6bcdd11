"""Pages: Markdown for results/tables, HTML for results/report.html, text for the terminal."""
