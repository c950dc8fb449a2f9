"""Judges: each gives a response a score of 0-100 for one trait, or None when it cannot say.

`embedded` needs no LLM: it is learned from labelled answers that the mixture did not use. ALL_CAPS needs no judge at
all (`traits.is_all_caps`). The pocket world also has an exact oracle (`pocket.oracle`), reported beside the judge.
"""
