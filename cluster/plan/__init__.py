"""What a run will take before it is paid for: see docs/PLAN.md for the model.

`network` and `downloads` count, `throughput` looks up, `estimate` computes, `command` and `show`
are what a person meets. Nothing here starts Ray or reads a shard.
"""
