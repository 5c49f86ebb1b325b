"""Accuracy and speed of pruned answers on questions with known answers, beside the unpruned model.

    questions x configs -> runner -> results file -> summary -> table, JSON, picture

`configs`, `metrics` and `statistics` know no model. `results` knows a file. Only `runner` asks the engine.
"""
