"""Tasks: LongBench, the offline sample and retrieval tasks, as rows and prompts."""
