"""A corpus into shards of vectors: each row once, however often the work is killed."""
