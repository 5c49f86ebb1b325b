"""Accuracy and speed of pruned answers on questions with known answers, beside the unpruned model's.

    questions (tasks) x configs -> runner -> results file -> summary -> table, JSON, picture

`configs`, `metrics` and `statistics` know no model; `results` knows files; `runner` alone asks the engine.
"""
