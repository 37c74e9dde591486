"""RESULTS.md: the published answer, made from the shards that the study's sweeps left in sweeps/study.

`python -m altgrad.results` (make results) writes it again. Nothing of it is typed in: every number and every word that
depends on one is computed here from what is committed, by the library that makes reports; sweeps/study.md says what
was asked before anything was judged.
"""
