"""Accuracy and speed of pruned answers on questions with known answers, beside the unpruned model.

    questions (tasks) x configs -> runner -> results file -> summary -> table, JSON, picture

`configs`, `metrics` and `statistics` know no model. `results` knows files. Only `runner` asks the engine.
"""
