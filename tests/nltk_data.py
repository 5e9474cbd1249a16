"""NLTK's data, laid out as its own are, but small: without a network they cannot be had.

NLTK itself reads them. English with ten abbreviations, the stop words, and a tagger that knows some verbs, those that
begin IFBench's sample answers among them, and takes any other word for a noun.
"""

from __future__ import annotations

import json
from pathlib import Path

ABBREVIATIONS = "dr mr mrs ms st vs etc e.g i.e u.s"
STOPWORDS = """
a about above after again against ain all am an and any are aren aren't as at be because been before being below between
both but by can couldn couldn't d did didn didn't do does doesn doesn't doing don don't down during each few for from
further had hadn hadn't has hasn hasn't have haven haven't having he he'd he'll he's her here hers herself him himself
his how i i'd i'll i'm i've if in into is isn isn't it it'd it'll it's its itself just ll m ma me mightn mightn't more
most mustn mustn't my myself needn needn't no nor not now o of off on once only or other our ours ourselves out over own
re s same shan shan't she she'd she'll she's should should've shouldn shouldn't so some such t than that that'll the
their theirs them themselves then there these they they'd they'll they're they've this those through to too under until
up ve very was wasn wasn't we we'd we'll we're we've were weren weren't what when where which while who whom why will
with won won't wouldn wouldn't y you you'd you'll you're you've your yours yourself yourselves
"""
VERBS = "write name give take make begin prove whirring identify"


def make(root: Path) -> Path:
    """Write them below `root`, for NLTK_DATA, and return it."""
    punkt, words = root / "tokenizers/punkt_tab/english", root / "corpora/stopwords"
    name = "averaged_perceptron_tagger_eng"
    tagger = root / "taggers" / name
    for directory in (punkt, words, tagger):
        directory.mkdir(parents=True, mode=0o700)
    (punkt / "abbrev_types.txt").write_text("\n".join(ABBREVIATIONS.split()))
    for other in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (punkt / other).write_text("")
    (words / "english").write_text("\n".join(STOPWORDS.split()))
    tags = dict.fromkeys([*VERBS.split(), *VERBS.title().split()], "VB")
    model = {"weights": {"bias": {"NN": 1.0}}, "tagdict": tags, "classes": ["NN", "VB"]}
    for part, of in model.items():
        (tagger / f"{name}.{part}.json").write_text(json.dumps(of))
    return root
