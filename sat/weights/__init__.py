"""Files of weights: reading what they are without loading them, fetching released ones, putting a tree together."""
