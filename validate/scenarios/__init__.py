"""Ring geometry → what both sides are asked, call by call."""
