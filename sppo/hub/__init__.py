"""The Hub: what a run made, pushed where --org asks for it, one commit a repository with a card and a tag.

push.py says what is pushed, upload.py pushes it, and errors.py says what went wrong. When a push fails, nothing here is
lost.
"""
