"""Models: what is known of them, and loading them without a hub or remote code."""
