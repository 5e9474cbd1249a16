"""report.html: `gather` reads what a run has written, `figures` draws it, `page` writes one file that needs no network.

It can be made at any time, also while the run is going on; it shows whatever is there.
"""
