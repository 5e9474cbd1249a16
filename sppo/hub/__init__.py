"""The Hub: what a run made, pushed when it is asked for.

Reads $DATA or $MODEL, and the manifests there.
Does one commit a repository, with a card and a tag; nothing here is lost when it fails.
Writes the repositories on the Hub, and what arrived into pushed.json.
"""
