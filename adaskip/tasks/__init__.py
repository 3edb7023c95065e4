"""Tasks: LongBench and the offline sample, as rows and prompts."""
