"""Tasks → whether an artifact answers as its checkpoint does, and how well each of them answers."""
