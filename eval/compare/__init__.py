"""Adapters against each other at equal budget, over subjects and seeds: `singlora compare`.

`grid` says what is to be run, `cell` runs one training with its images and scores, `engines` spread cells over
processes, `tuning` chooses each method's rate on the tuning subjects, `verdicts` compares on the test subjects.
"""
