"""What a run will take: time, S3, cache, memory, cost, and what limits it; see docs/PLAN.md."""
