"""Speed: times, memory and limits, and the budget as an acceleration."""
