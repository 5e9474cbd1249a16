"""report.html: reads what a run has written, draws it (`figures`), and writes one file that needs no network (`page`).

Reads  <run_dir>: recipes, manifests, data sets, metrics, reports; whatever is there, at any time.
Writes <run_dir>/report.html.
"""
