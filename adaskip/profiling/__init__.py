"""What sublayers take: clocks, interleaved rounds, intervals, memory."""
