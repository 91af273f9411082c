"""How samples reach a worker: source, shards, plan, stream."""
